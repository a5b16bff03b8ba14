"""`CausalLM`: the Hugging Face-shaped door around a packed decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taut.batch import Batch, pack
from taut.config import ModelConfig
from taut.engine.generation import GenerationConfig
from taut.errors import RequestError
from taut.kernels.linear_ce import linear_cross_entropy
from taut.layers.block import Decoder
from taut.layers.linear import Linear
from taut.modeling.base import PreTrainedModel
from taut.modeling.generation import GenerationMixin
from taut.modeling.output import Later, ModelOutput


class CausalLM(GenerationMixin, PreTrainedModel):
    """A decoder with a language-model head.

    `model.decoder(batch)` is the packed call that everything goes through; `model(input_ids, ...)` and
    `model.generate(...)` are the padded ones. Weights are empty until `from_pretrained` or `init_weights`.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config)
        self.generation_config = GenerationConfig.from_dict(token_ids(config))
        self.model = Decoder(config, dtype=dtype)
        self.lm_head = None
        if not config.tied:
            width = config.embed_dim or config.dim
            self.lm_head = Linear(width, config.vocab_size, bias=config.head_bias, dtype=dtype)
        self.eval()

    # ------------------------------------------------------------------------------------ what it is

    @property
    def decoder(self) -> Decoder:
        """`decoder(batch) -> hidden [tokens, dim]`."""
        return self.model

    def ignored(self) -> tuple[str, ...]:
        return ("lm_head.weight",) if self.config.tied else ()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.model.embed_tokens if self.lm_head is None else self.lm_head

    # ------------------------------------------------------------------------------------ computing

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits `[n, vocab]` (float64 for a float64 model) of hidden states `[n, dim]`."""
        scores = self.model.embed_tokens.project(hidden) if self.lm_head is None else self.lm_head(hidden)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.config.logit_scale is not None:
            scores = scores * self.config.logit_scale
        if self.config.logit_softcap is not None:
            scores = self.config.logit_softcap * torch.tanh(scores / self.config.logit_softcap)
        return scores

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
        logits_to_keep: int = 0,
        num_items_in_batch: int | Tensor | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """Logits, and the loss where `labels` are given, in the padded shape.

        `input_ids` `[rows, width]` int64 (or `inputs_embeds` `[rows, width, dim]`), `attention_mask`
        `[rows, width]` with padding anywhere, `position_ids` `[rows, width]` that may restart to mark
        packed sequences, `labels` `[rows, width]` with -100 where there is nothing to predict. Each row is
        computed as if it were alone. Gives `loss` (mean over predicted tokens, or their sum divided by
        `num_items_in_batch`), `logits` `[rows, width, vocab]` float32, zeros at padding (the last
        `logits_to_keep` positions alone, if positive; beside a loss they are computed when somebody looks at
        them) and `hidden_states` if asked.

        Raises `RequestError` for shapes that don't match, ids out of range and options of later releases.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise RequestError("give exactly one of input_ids and inputs_embeds")
        if past_key_values is not None:
            raise RequestError("past_key_values is not supported by forward; model.generate keeps the cache")
        if output_attentions:
            raise RequestError("output_attentions is not supported: attention weights are never materialised")
        if input_ids is not None:
            self._check_ids(input_ids)
        batch, padding = pack(input_ids, attention_mask, position_ids, inputs_embeds)
        with self._collect(output_hidden_states) as states:
            hidden = self.packed(self.decoder, batch)
        kept, grid = (hidden, padding) if not logits_to_keep else padding.last(hidden, logits_to_keep)
        loss = logits = None
        if labels is not None:
            if labels.shape != (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]:
                raise RequestError(f"labels has shape {list(labels.shape)}; expected the shape of the inputs")
            if logits_to_keep:
                raise RequestError("labels need every position's logits; leave logits_to_keep at 0")
            targets = next_tokens(padding.pack(labels.to(hidden.device)), batch)
            loss = self._loss(hidden, targets, num_items_in_batch)
            # A long batch's logits are large, and who trains seldom looks at them.
            logits = Later(lambda: grid.unpack(self.logits(kept)))
        output = ModelOutput(
            loss=loss,
            logits=grid.unpack(self.logits(kept)) if logits is None else logits,
            past_key_values=None,
            hidden_states=tuple(padding.unpack(state) for state in states) or None,
        )
        return output if return_dict else output.to_tuple()

    def _loss(self, hidden: Tensor, targets: Tensor, items: int | Tensor | None) -> Tensor:
        """Cross-entropy of the logits of `hidden` `[tokens, dim]` against `targets` `[tokens]`, a mean or a
        sum over `items`; in chunks of tokens, so that not all logits are there at once."""
        c, head = self.config, self.lm_head if self.lm_head is not None else self.model.embed_tokens
        watched = head._forward_hooks or head._forward_pre_hooks
        if watched or head.weight is None or head.weight.is_mkldnn:
            losses = F.cross_entropy(self.logits(hidden), targets, reduction="sum")
            return losses / ((targets != -100).sum() if items is None else items)
        return linear_cross_entropy(
            hidden,
            head.weight,
            targets,
            getattr(head, "bias", None),
            scale=1.0 if c.logit_scale is None else c.logit_scale,
            softcap=c.logit_softcap,
            divisor=items,
        )

    def prepare_inference(self) -> None:
        super().prepare_inference()
        if self.lm_head is None and not self.training:
            self.model.embed_tokens.block()

    def _check_ids(self, ids: Tensor) -> None:
        if ids.dim() != 2 or ids.is_floating_point():
            raise RequestError(f"input_ids is {ids.dtype} {list(ids.shape)}; expected int64 [rows, width]")
        # Looking at values on a GPU would wait for it; there the embedding kernel reports them itself.
        if ids.device.type == "cpu" and ids.numel():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                row, column = (ids == bad).nonzero()[0].tolist()
                raise RequestError(
                    f"input_ids[{row}, {column}] is {bad}; the vocabulary has ids 0 to "
                    f"{self.config.vocab_size - 1}: is the tokenizer the one of this model?"
                )

    @contextmanager
    def _collect(self, wanted: bool) -> Iterator[list[Tensor]]:
        """What enters each block, and what leaves the decoder, as they are computed."""
        states: list[Tensor] = []
        hooks = []
        if wanted:
            hooks = [
                layer.register_forward_pre_hook(lambda _m, given: states.append(given[0]))
                for layer in self.model.layers
            ]
            hooks.append(self.model.register_forward_hook(lambda _m, _i, out: states.append(out)))
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def locate_nonfinite(self, batch: Batch) -> str:
        """The first module whose weights or output are not finite for this batch, in order of computation;
        runs the batch once more."""
        with self._first_nonfinite() as found:
            self.logits(self.decoder(batch))
        return found[0] if found else "the head's logits"


def next_tokens(labels: Tensor, batch: Batch) -> Tensor:
    """What each token is to predict, `[tokens]`: the label of its row's next one; -100 for a row's last."""
    targets = torch.full_like(labels, -100)
    if len(labels):
        targets[:-1] = labels[1:]
        # Where a row without tokens ends, another does too.
        targets.index_fill_(0, (batch.starts[1:].long() - 1) % len(labels), -100)
    return targets


def token_ids(config: ModelConfig) -> dict[str, Any]:
    """The special tokens that a `config.json` names, as options of generation."""
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }
    return {name: value for name, value in ids.items() if value is not None}
