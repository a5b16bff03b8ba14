"""`DynamicCache`: rows of a padded batch with their keys and values, to go on from (`past_key_values`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from taut.batch import Batch, PagedKV, Source
from taut.errors import RequestError

PAGE_SIZE = 16


class DynamicCache:
    """Rows to go on from: `model(..., use_cache=True)` and `generate(..., return_dict_in_generate=True)` give
    one, and both take one as `past_key_values`; they extend the one they take.

    It owns its keys and values, in pages of its own, and they go with it. `generate` needs its tokens alone:
    of these, what the model's engine still holds is not computed again. And one that `generate` gives has
    keys once a forward needs them.
    """

    def __init__(self) -> None:
        self.width = 0  # columns of the padded batch so far
        self.lengths: list[int] = []  # tokens of each row
        self.tokens: list[list[int]] | None = []  # and which; None after embeddings
        self.keys: tuple[Tensor, ...] = ()  # a layer each: [rows * pages, page_size, kv_heads, head_dim]
        self.values: tuple[Tensor, ...] = ()
        self.computed = False  # whether keys and values are those of all tokens

    @staticmethod
    def of(rows: Sequence[Sequence[int]], width: int) -> DynamicCache:
        """Rows of these tokens, in a padded batch of `width` columns."""
        cache = DynamicCache()
        cache.become(rows, width)
        return cache

    @staticmethod
    def asked(given: Any, use_cache: bool | None = None, labels: Tensor | None = None) -> DynamicCache | None:
        """The rows that a call of a model goes on from and extends; None where it is not asked to."""
        if given is None and not use_cache:
            return None
        if labels is not None:
            raise RequestError(
                "a loss has gradients and the cache keeps none; leave out use_cache and past_key_values"
            )
        if use_cache is False:
            raise RequestError("past_key_values is given and use_cache is False; leave out one of the two")
        if given is not None and not isinstance(given, DynamicCache):
            raise RequestError(
                f"past_key_values is a {type(given).__name__}; expected what a call with use_cache=True "
                "gave, or an empty taut.DynamicCache()"
            )
        return DynamicCache() if given is None else given

    def become(self, rows: Sequence[Sequence[int]], width: int) -> None:
        """Be the rows of these tokens instead."""
        self.width, self.tokens = width, [list(row) for row in rows]
        self.lengths = [len(row) for row in rows]
        self.keys, self.values, self.computed = (), (), False

    # -- as people use it ----------------------------------------------------------------------------------

    def get_seq_length(self, layer: int = 0) -> int:
        """Columns of the padded batch so far."""
        return self.width

    def __len__(self) -> int:
        return self.width

    def crop(self, max_length: int) -> None:
        """Forget all but the first `max_length` columns (or, if negative, the last so many)."""
        gone = -max_length if max_length < 0 else self.width - max_length
        if gone <= 0:
            return
        self.width = max(self.width - gone, 0)
        self.lengths = [max(length - gone, 0) for length in self.lengths]
        if self.tokens is not None:
            self.tokens = [row[:length] for row, length in zip(self.tokens, self.lengths, strict=True)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row `beam_idx[i]`."""
        self._take(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._take([row for row in range(len(self.lengths)) for _ in range(repeats)])

    def _take(self, rows: list[int]) -> None:
        count = len(self.lengths)
        self.lengths = [self.lengths[row] for row in rows]
        if self.tokens is not None:
            self.tokens = [list(self.tokens[row]) for row in rows]

        def taken(cache: Tensor) -> Tensor:
            return cache.unflatten(0, (count, -1))[rows].flatten(0, 1)

        with torch.inference_mode(False):  # which the next call may be outside of
            self.keys, self.values = tuple(map(taken, self.keys)), tuple(map(taken, self.values))

    # -- for a forward -------------------------------------------------------------------------------------

    def new_columns(self, attention_mask: Tensor | None, width: int) -> Tensor | None:
        """The part of a mask `[rows, columns so far + width]`, or `[rows, width]`, that is of new tokens."""
        if attention_mask is None:
            return None
        if attention_mask.dim() != 2 or attention_mask.shape[1] not in (width, self.width + width):
            raise RequestError(
                f"attention_mask has shape {list(attention_mask.shape)}; expected {self.width + width} "
                f"columns, {self.width} of past_key_values and {width} new ones"
            )
        return attention_mask[:, attention_mask.shape[1] - width :]

    def extend(self, model: Any, batch: Batch, source: Source | None = None) -> Batch:
        """A batch of new tokens as the continuation of these rows, with room for its keys. Computes the rows
        first, where that is still to be done. `model` has a config and a packed `decoder`, which attends to
        the `source`."""
        rows = batch.rows
        if self.lengths and rows != len(self.lengths):
            raise RequestError(f"past_key_values has {len(self.lengths)} rows, and the call {rows}")
        self.lengths = self.lengths or [0] * rows
        if not self.computed and any(self.lengths):
            tokens, self.lengths = self.tokens, [0] * rows
            self.tokens = [[] for _ in tokens]
            before = replace(Batch.of(tokens, batch.positions.device), source=source)
            model.decoder(self._step(model, before))
            self.tokens, self.lengths = tokens, [len(row) for row in tokens]
        self.computed = True
        return self._step(model, batch)

    def advance(self, batch: Batch, width: int) -> None:
        """The batch has run: its keys are there."""
        before, self.lengths = self.lengths, batch.kv.lengths.tolist()
        self.width += width
        if batch.ids is None:
            self.tokens = None
        if self.tokens is not None:
            new = batch.ids.split([now - was for now, was in zip(self.lengths, before, strict=True)])
            known = self.tokens or [[] for _ in before]
            self.tokens = [row + ids.tolist() for row, ids in zip(known, new, strict=True)]

    def _step(self, model: Any, batch: Batch) -> Batch:
        """`batch` with positions, lengths and slots behind what there is."""
        config, device = model.config, batch.positions.device
        counts = batch.starts.diff()
        new = counts.tolist()
        lengths = [length + count for length, count in zip(self.lengths, new, strict=True)]
        longest = max(lengths, default=0)
        if longest > config.context:
            raise RequestError(
                f"with past_key_values a row has {longest} tokens, and the model's context is "
                f"{config.context}"
            )
        bound = config.rope_boundary
        if bound is not None and any(
            0 < was <= bound < now for was, now in zip(self.lengths, lengths, strict=True)
        ):
            raise RequestError(
                f"a row passes {bound} tokens, beyond which all of its keys turn by other angles. Next step: "
                "compute it again from its first token, without past_key_values"
            )
        pages = self._room(model, len(lengths), longest, device)
        offsets = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        each = counts.long()
        row = torch.arange(len(lengths), device=device).repeat_interleave(each, output_size=batch.tokens)
        positions = batch.positions + offsets[row]
        slots = row * pages * PAGE_SIZE + positions.long()
        table = torch.arange(len(lengths) * pages, dtype=torch.int32, device=device).view(-1, pages)
        kv = PagedKV(
            self.keys,
            self.values,
            table,
            offsets + counts.int(),
            slots,
            longest,
            first=0 if len(lengths) == 1 else None,
            fresh=not any(self.lengths),
        )
        return replace(batch, positions=positions, kv=kv, totals=kv.lengths)

    def _room(self, model: Any, rows: int, longest: int, device: torch.device) -> int:
        """Pages of each row, enough for `longest` tokens."""
        have = self.keys[0].shape[0] // rows if self.keys else 0
        if have * PAGE_SIZE >= longest:
            return have
        pages = max(-(-longest // PAGE_SIZE), have + have // 2 + 1)

        def grown(old: Tensor | None, heads: int, dim: int) -> Tensor:
            new = torch.zeros(rows, pages, PAGE_SIZE, heads, dim, dtype=model.dtype, device=device)
            if old is not None:
                new[:, :have] = old.unflatten(0, (rows, have))
            return new.flatten(0, 1)

        attentions = [layer.attn for layer in model.config.layers]
        sizes = [(attn.kv_heads, attn.head_dim) for attn in attentions]
        with torch.inference_mode(False):
            self.keys, self.values = (
                tuple(grown(old, *size) for old, size in zip(kept or [None] * len(sizes), sizes, strict=True))
                for kept in (self.keys, self.values)
            )
        return pages
