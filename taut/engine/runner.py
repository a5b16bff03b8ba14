"""`Runner`: owns the paged cache and turns the scheduler's decisions into tensors and logits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from taut.batch import Batch, PagedKV
from taut.config import Dynamic, ModelConfig
from taut.engine.integers import fields, room
from taut.engine.replay import Replays
from taut.engine.request import Row
from taut.engine.scheduler import Work
from taut.engine.tapes import Tapes


class _Part(NamedTuple):
    """Tokens [start, stop) of a row, with what is guessed behind it, as one row of a batch; `total`: the
    length that its angles are made for; `asked`: of how many of its last tokens logits are wanted."""

    row: Row
    start: int
    stop: int
    total: int
    asked: int
    drafts: tuple[int, ...] = ()

    def tokens(self) -> list[int]:
        length = self.row.length
        known = self.row.tokens(self.start, min(self.stop, length))
        return known + list(self.drafts[max(self.start - length, 0) : max(self.stop - length, 0)])


class Runner:
    """Runs work through a model and keeps its keys and values: for each layer a pair of
    `[pages, page_size, kv_heads, head_dim]` tensors, in the model's dtype on its device."""

    def __init__(self, model, page_size: int, num_pages: int):
        self.model, self.page_size, self.device = model, page_size, torch.device(model.device)
        self.replays = Replays(model, model.decoder)
        self.encoder = None if model.config.encoder is None else Replays(model, model.encoder)
        # On a CPU, steps that score every token they compute.
        self.scores = Tapes(model, lambda batch: model.logits(model.decoder(batch)))
        attentions = [layer.attn for layer in model.config.layers]

        def cache() -> tuple[Tensor, ...]:
            return tuple(
                _zeros((num_pages, page_size, attn.kv_heads, attn.head_dim), model.dtype, self.device)
                for attn in attentions
            )

        self.keys, self.values = cache(), cache()
        self.replay = turns_by_length(model.config)
        cuda = self.device.type == "cuda"
        self._pinned = torch.empty(0, dtype=torch.int32, pin_memory=True) if cuda else None
        self._copied = torch.cuda.Event() if cuda else None

    @torch.inference_mode()
    def __call__(self, work: list[Work], *, busy: bool = False) -> Tensor | None:
        """Compute the work; logits `[n, vocab]` after the last token of all that is ready and after each of
        its drafts, valid until the next call; None where nothing is ready. `busy`: the device still has other
        work, so that it doesn't wait for launches and a graph would gain nothing."""
        if not work:
            return None
        batch, last = self._build(work)
        if self.device.type == "cpu" and last.shape[0] == batch.tokens:
            return self.scores(batch)
        hidden = self.model.decoder(batch) if busy else self.replays(batch)  # [tokens, dim]
        if last.shape[0] == 0:
            return None
        return self.model.logits(hidden if last.shape[0] == batch.tokens else hidden.index_select(0, last))

    @torch.inference_mode()
    def encode(self, rows: Sequence[Row]) -> None:
        """Encode the sources of rows, and fill their pages with the keys made of them."""
        if not rows:
            return
        ids = [row.source for row in rows if not isinstance(row.source, Tensor)]
        made: Iterator[Tensor] = iter(())
        if ids:
            made = iter(self.encoder(Batch.of(ids, self.device)).split([len(source) for source in ids]))
        hidden = torch.cat(
            [
                row.source.to(self.device, self.model.dtype) if isinstance(row.source, Tensor) else next(made)
                for row in rows
            ]
        )
        slots = np.concatenate([self._slots(row.source_pages, 0, len(row.source)) for row in rows])
        self.model.store(hidden, self.keys, self.values, torch.from_numpy(slots).to(self.device))

    def _slots(self, pages: Sequence[int], start: int, stop: int) -> np.ndarray:
        """Where the keys of tokens [start, stop) of these pages lie."""
        place = np.arange(start, stop)
        return np.array(pages)[place // self.page_size] * self.page_size + place % self.page_size

    def batch(self, work: list[Work]) -> Batch:
        """The batch that the work makes."""
        return self._build(work)[0]

    def copy(self, pages: Mapping[int, int]) -> None:
        """Fill each page with what another one holds: `{page: other}`."""
        if not pages:
            return
        to, of = torch.tensor([list(pages), list(pages.values())], device=self.device)
        for cache in (*self.keys, *self.values):
            cache.index_copy_(0, to, cache.index_select(0, of))

    def scrub(self, pages: list[int]) -> None:
        """Zero pages that hold keys that aren't finite, before another row gets them."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.device)
        for cache in (*self.keys, *self.values):
            cache.index_fill_(0, index, 0)

    def _parts(self, work: list[Work]) -> list[_Part]:
        """One for each work; where angles are replayed, drafts and output that is computed again take one a
        token: all keys of a batch are written before any is read, so one batch still does."""
        parts = []
        for row, start, count, ready, drafts in work:
            stop, prompt = start + count + len(drafts), len(row.prompt)
            asked = ready + len(drafts)
            if not self.replay or stop <= prompt or stop - start == 1:
                total = max(prompt, stop) if self.replay else row.length
                parts.append(_Part(row, start, stop, total, asked, drafts))
                continue
            if start < prompt:
                parts.append(_Part(row, start, prompt, prompt, int(asked > stop - prompt)))
            for at in range(max(start, prompt), stop):
                parts.append(_Part(row, at, at + 1, at + 1, int(at >= stop - asked), drafts))
        return parts

    def _build(self, work: list[Work]) -> tuple[Batch, Tensor]:
        """The batch, and the index `[n]` of each token whose successor is asked for."""
        rows, size = self._parts(work), self.page_size
        tokens = sum(row.stop - row.start for row in rows)
        longest = max(row.stop for row in rows)
        count, width = len(rows), -(-longest // size)
        asked = sum(row.asked for row in rows)
        # All integers of a batch share one buffer, 64-bit ones first: a single copy to the device.
        parts = [2 * tokens, 2 * tokens, 2 * asked, tokens, count + 1, count, count, count * width]
        wide = max(len(row.row.source_pages) for row in rows)  # 0 without sources
        parts += [count * (wide > 0), count * wide]
        host = self._host(room(parts))
        ids, slots, last, positions, starts, lengths, totals, table, source_lengths, source_table = (
            t.numpy() for t in fields(host, parts, 3)
        )
        table, source_table = table.reshape(count, width), source_table.reshape(count, wide)
        at = sampled = widest = 0
        for index, part in enumerate(rows):
            row, start, stop, total, wanted, drafts = part
            pages, new = row.pages, stop - start
            if new == 1 and not drafts:
                ids[at] = row.token(start)
                positions[at] = start
                slots[at] = pages[start // size] * size + start % size
            else:
                ids[at : at + new] = part.tokens()
                positions[at : at + new] = np.arange(start, stop)
                slots[at : at + new] = self._slots(pages, start, stop)
            starts[index], lengths[index], totals[index] = at, stop, total
            used = -(-stop // size)
            table[index, :used] = pages[:used]
            # Unused entries name a page of the row's own: no row ever reads another's numbers.
            table[index, used:] = pages[0]
            if wide:
                fill_source(source_lengths, source_table, index, row)
            at += new
            widest = max(widest, new)
            if wanted:
                last[sampled : sampled + wanted] = np.arange(at - wanted, at)
                sampled += wanted
        starts[count] = at
        sent = fields(self._send(host), parts, 3)
        ids, slots, last, positions, starts, lengths, totals, table, source_lengths, source_table = sent
        fresh = all(row.start == 0 for row in rows)
        table, first = table.view(count, width), _in_order(rows[0].row.pages[:width]) if count == 1 else None
        kv, source = PagedKV(self.keys, self.values, table, lengths, slots, longest, first, fresh), None
        if wide:
            first = _in_order(rows[0].row.source_pages) if count == 1 else None
            longest = max(len(row.row.source) for row in rows)
            table = source_table.view(count, wide)
            source = PagedKV(self.keys, self.values, table, source_lengths, None, longest, first)
        return Batch(ids, positions, starts, widest, kv=kv, totals=totals, source=source), last

    def _host(self, size: int) -> Tensor:
        """A buffer for `size` 32-bit integers, pinned where the model is on a CUDA device."""
        if self._pinned is None:
            return torch.empty(size, dtype=torch.int32)
        self._copied.synchronize()  # the copy of the batch before may still read it
        if self._pinned.shape[0] < size:
            self._pinned = torch.empty(2 * size, dtype=torch.int32, pin_memory=True)
        return self._pinned[:size]

    def _send(self, host: Tensor) -> Tensor:
        if self._pinned is None:
            return host
        sent = host.to(self.device, non_blocking=True)
        self._copied.record(torch.cuda.current_stream(self.device))
        return sent


def fill_source(lengths: np.ndarray, table: np.ndarray, index: int, row: Row) -> None:
    """Write where the source of a batch's row `index` lies."""
    pages = row.source_pages
    lengths[index] = len(row.source)
    table[index, : len(pages)] = pages
    table[index, len(pages) :] = pages[0]


def _in_order(pages: list[int]) -> int | None:
    """The first of pages that lie one after the other; None for others."""
    return pages[0] if pages == list(range(pages[0], pages[0] + len(pages))) else None


def turns_by_length(config: ModelConfig) -> bool:
    """Whether each token's angles are those of the length that its row had when it was new (NTK-aware,
    "dynamic"), so that equal tokens of two prompts have different keys."""
    ropes = [layer.attn.rope for layer in config.layers]
    return any(rope is not None and isinstance(rope.scaling, Dynamic) for rope in ropes)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, since a kernel may read unused slots with weight 0, and 0 * NaN is NaN. On the CPU they come
    from calloc, which takes no memory for what is never written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
