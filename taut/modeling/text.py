"""`TextModel`: the Hugging Face-shaped door around a packed decoder or encoder, which text models share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from taut.batch import Batch, Padding, pack
from taut.config import ModelConfig
from taut.engine.dynamic_cache import DynamicCache
from taut.errors import RequestError
from taut.kernels.attention import attention_weights
from taut.layers.block import Decoder, Stack
from taut.layers.encoder import Encoder
from taut.modeling.base import PreTrainedModel


@dataclass
class Encoded:
    """What a model's stack made of one call: `hidden` `[tokens, dim]`, where its tokens stand, and on request
    the hidden states around its blocks and the weights of its attention."""

    batch: Batch
    padding: Padding
    hidden: Tensor
    states: list[Tensor] = field(default_factory=list)
    weights: list[tuple[Tensor, ...]] = field(default_factory=list)

    def extras(self) -> dict[str, Any]:
        """`hidden_states`, one `[rows, width, dim]` before each block and one at the end, and `attentions`,
        one `[rows, heads, width, width]` a block; zeros at padding, None where not asked for."""
        return {
            "hidden_states": self.hidden_states,
            "attentions": tuple(self.grid(rows, self) for rows in self.weights) or None,
        }

    @property
    def hidden_states(self) -> tuple[Tensor, ...] | None:
        return tuple(self.padding.unpack(state) for state in self.states) or None

    def columns(self) -> list[tuple[int, Tensor]]:
        """Of each row of the batch, its row and columns in the padded shape."""
        width, device = self.padding.width, self.hidden.device
        index = self.padding.index
        index = torch.arange(self.batch.tokens) if index is None else index.cpu()
        spans = pairwise(self.batch.starts.tolist())
        return [
            (int(index[begin]) // width if begin < end else -1, (index[begin:end] % width).to(device))
            for begin, end in spans
        ]

    def grid(self, rows: tuple[Tensor, ...], keys: Encoded) -> Tensor:
        """One block's weights in the padded shape, `[rows, heads, width, width of the keys]`."""
        heads = rows[0].shape[0] if rows else 0
        whole = self.hidden.new_zeros(self.padding.rows, heads, self.padding.width, keys.padding.width)
        left = iter(rows)
        for (row, columns), (_, seen) in zip(self.columns(), keys.columns(), strict=True):
            if len(columns):
                weights = next(left).to(whole.dtype)
                whole[row, :, columns[:, None], seen] = weights
        return whole


class TextModel(PreTrainedModel):
    """A packed decoder or encoder, `model`, behind a padded door; a subclass adds its head."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config)
        if config.kind == "encoder":
            self.model = Encoder(config, pooler=self.suffix in config.heads.pooled, dtype=dtype)
        else:
            self.model = Decoder(config, dtype=dtype)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def encode(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        features: Mapping[str, Tensor | None] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        past: DynamicCache | None = None,
    ) -> Encoded:
        """Pack a padded batch and run the stack over it.

        `input_ids` `[rows, width]` int64 or `inputs_embeds` `[rows, width, dim]`; `attention_mask`
        `[rows, width]` with padding anywhere; `position_ids` `[rows, width]` that may restart to mark packed
        sequences; `features`: what comes with each token, `[rows, width]` (`bbox`: `[rows, width, 4]`), by
        the name of its argument; `past`: rows that these go on from, which are extended. Raises
        `RequestError` for shapes that don't match and, on a CPU, for values that no table has.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise RequestError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            check_ids(input_ids, self.config.vocab_size)
        grid = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        encoder = isinstance(self.model, Encoder)
        if position_ids is not None and encoder and self.config.positions is not None:
            position_ids = position_ids - self.config.positions.offset  # encoders' are rows of the table
        columns = self._columns(features or {}, grid)
        inside = position_ids if past is None else None  # they follow from rows that there are
        batch, padding = pack(input_ids, attention_mask, inside, inputs_embeds, columns)
        if past is not None:
            with torch.no_grad():
                batch = past.extend(self, batch)
            _check_positions(position_ids, batch, padding)
        return run(
            self,
            self.model,
            batch,
            padding,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            past=past,
        )

    def _columns(self, given: Mapping[str, Tensor | None], grid: torch.Size) -> Tensor | None:
        """The features of each token as the model's tables take them, `[rows, width, features]`; None where
        nothing is given."""
        given = {name: value for name, value in given.items() if value is not None}
        known = {features.given: features.tables for features in self.config.features}
        if (odd := next((name for name in given if name not in known), None)) is not None:
            has = f"takes {', '.join(known)}" if known else "takes nothing of the kind"
            raise RequestError(f"{odd} is given, and a {self.config.model_type} {has}; leave it out")
        if not given:
            return None
        device = next(iter(given.values())).device
        columns = []
        for name, tables in known.items():
            value = given.get(name)
            if value is None:
                columns.append(torch.zeros(*grid, len(tables), dtype=torch.int64, device=device))
                continue
            shape = (*grid, 4) if name == "bbox" else grid
            if value.shape != shape or value.is_floating_point():
                raise RequestError(
                    f"{name} is {value.dtype} {list(value.shape)}; expected int64 {list(shape)}, one a token"
                )
            value = _edges(value) if name == "bbox" else value[..., None]
            for column, (table, count) in enumerate(tables):
                if (bad := _outside(value[..., column], count)) is not None:
                    at, wrong = bad
                    raise RequestError(
                        f"{name}: {wrong} at {at} is not a row of {table}, which has 0 to {count - 1}"
                    )
            columns.append(value.to(torch.int64))
        return torch.cat(columns, -1)


def run(
    model: PreTrainedModel,
    stack: Stack,
    batch: Batch,
    padding: Padding,
    *,
    output_hidden_states: bool | None = None,
    output_attentions: bool | None = None,
    past: DynamicCache | None = None,
    bare: bool = False,
) -> Encoded:
    """What a stack of `model` makes of a batch, which may extend the rows of `past`: then without gradients,
    since cached keys keep none. `bare`: the last of the hidden states is that before the final norm."""
    found = Encoded(batch, padding, batch.positions)
    collected = attention_weights() if output_attentions else nullcontext([])
    states = _collect(stack, bool(output_hidden_states), bare)
    with states as found.states, collected as found.weights:
        if past is not None:
            with torch.no_grad():
                found.hidden = stack(batch)
            past.advance(batch, padding.width)
        else:
            found.hidden = stack(batch) if output_attentions else model.packed(stack, batch)
    return found


def _check_positions(position_ids: Tensor | None, batch: Batch, padding: Padding) -> None:
    """Raise unless given positions are those of the tokens of a batch that continues rows."""
    if position_ids is None:
        return
    given = padding.pack(position_ids.expand(padding.rows, padding.width).to(batch.positions.device))
    if not torch.equal(given.to(batch.positions.dtype), batch.positions):
        raise RequestError(
            "position_ids are not those of the tokens behind past_key_values, each row's own count "
            "from 0; leave position_ids out"
        )


@contextmanager
def _collect(stack: Stack, wanted: bool, bare: bool) -> Iterator[list[Tensor]]:
    """What enters each block, and what leaves the stack or, `bare`, its last block, as they are computed."""
    states: list[Tensor] = []
    hooks = []
    if wanted:
        hooks = [
            layer.register_forward_pre_hook(lambda _m, given: states.append(given[0]))
            for layer in dict.fromkeys(stack.layers)
        ]
        last = stack.layers[-1] if bare else stack
        hooks.append(last.register_forward_hook(lambda _m, _i, out: states.append(out)))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def check_ids(ids: Tensor, vocab: int, name: str = "input_ids") -> None:
    """Raise `RequestError` unless `ids` are integers `[rows, width]` and, on a CPU, below `vocab`."""
    if ids.dim() != 2 or ids.is_floating_point():
        raise RequestError(f"{name} is {ids.dtype} {list(ids.shape)}; expected int64 [rows, width]")
    if (bad := _outside(ids, vocab)) is not None:
        at, value = bad
        raise RequestError(
            f"{name}{at} is {value}; the vocabulary has ids 0 to {vocab - 1}: is the tokenizer the one of "
            "this model?"
        )


def token_labels(labels: Tensor, encoded: Encoded) -> Tensor:
    """`labels` `[rows, width]` of each token, `[tokens]`, on the device of the hidden states."""
    grid = encoded.padding
    if labels.shape != (grid.rows, grid.width):
        raise RequestError(f"labels has shape {list(labels.shape)}; expected the shape of the inputs")
    return grid.pack(labels.to(encoded.hidden.device))


def _edges(bbox: Tensor) -> Tensor:
    """`[..., (x0, y0, x1, y1)]` -> `[..., (x0, y0, x1, y1, height, width)]`."""
    x0, y0, x1, y1 = bbox.unbind(-1)
    return torch.stack((x0, y0, x1, y1, y1 - y0, x1 - x0), -1)


def _outside(ids: Tensor, count: int) -> tuple[list[int], int] | None:
    """Where and what the first id is that a table of `count` rows hasn't; None too on a GPU, where looking
    would wait for it: there the lookup itself reports it."""
    if ids.device.type != "cpu" or not ids.numel():
        return None
    low, high = int(ids.min()), int(ids.max())
    if low >= 0 and high < count:
        return None
    value = low if low < 0 else high
    return (ids == value).nonzero()[0].tolist(), value
