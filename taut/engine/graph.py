"""`DecodeGraph`: a whole decode step, sampler included, as one CUDA graph whose steps chain on the device.

A step writes its tokens into the next step's input and advances positions, lengths and draws, so the host
need not see a token before the next step starts: it reads them from pinned memory while that step runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from taut.batch import Batch, PagedKV
from taut.engine.integers import fields, room
from taut.engine.replay import graphs_refuse
from taut.engine.request import Request
from taut.engine.runner import Runner, fill_source
from taut.engine.scheduler import Work
from taut.kernels.attention import Call, Pages, explain, restrictions
from taut.kernels.device import Workspace, using
from taut.kernels.sample import Sampling, sample
from taut.layers.attention import Attention

# A graph is captured for so many rows; a step of fewer leaves the others idle.
ROW_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
LEAST_PAGES = 32


def refuses(model) -> str | None:
    """Why decode steps of a model can't be graphs, or None."""
    if (why := graphs_refuse(torch.device(model.device), model.dtype)) is not None:
        return why
    for attn in (m for m in model.decoder.modules() if isinstance(m, Attention)):
        c = attn.config
        q = torch.empty(1, c.heads, c.head_dim, dtype=model.dtype, device=model.device)
        kv = q.new_empty(1, 1, c.kv_heads, c.head_dim)
        row = torch.zeros(1, dtype=torch.int32, device=q.device)
        offers = explain(Call(q, 1, 1, attn.scoring, Pages(kv, kv, row[None], row, 1)), attn.only)
        chosen = next((name for name, why in offers if why is None), None)
        if chosen == "eager":
            return f"layer {attn.index}'s attention runs on the reference, which waits for the device"
    return None


def plain(request: Request) -> bool:
    """Whether a request's next token can be drawn inside the graph: nothing but temperature, top-k, top-p
    and min-p shapes it, and nobody looks at its scores."""
    p = request.params
    return not (
        request.group
        or request.logits_processors
        or request.keep_scores
        or request.keep_logits
        or p.repetition_penalty != 1.0
        or p.presence_penalty
        or p.frequency_penalty
        or p.no_repeat_ngram_size
        or p.typical_p != 1.0
        or p.epsilon_cutoff
        or p.eta_cutoff
        or p.min_tokens_to_keep != 1
        or request.logprobs is not None
        or request.constraint is not None
        or p.logit_bias
        or p.sequence_bias
        or p.bad_words
        or p.suppress_tokens
        or (p.begin_suppress_tokens and len(request.output) <= p.begin_index)
        or p.timestamps is not None
        or (p.eos_token_ids and len(request.output) < p.min_new_tokens)
    )


@dataclass
class Pending:
    """A step that is under way: its work, which of the graph's rows each is in, and where the tokens of all
    rows will be."""

    work: list[Work]
    places: list[int]
    graph: _Graph
    host: Tensor
    done: torch.cuda.Event

    def tokens(self) -> list[int]:
        """The tokens, waiting for them; -1 for a row whose logits were not finite."""
        self.done.synchronize()
        every = self.host.tolist()
        return [every[place] for place in self.places]


class DecodeGraph:
    """Decode steps of one runner's model, captured the first time a size is needed and then replayed."""

    def __init__(self, runner: Runner):
        self.runner = runner
        self._graphs: dict[tuple[object, ...], _Graph] = {}
        self._refused: dict[tuple[object, ...], str | None] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._workspace = Workspace.of(runner.device)

    def takes(self, work: list[Work]) -> list[Work]:
        """What of a step's work a graph can do: one token a row, each of them sampled plainly."""
        where = restrictions()
        if where not in self._refused:
            self._refused[where] = refuses(self.runner.model)
        if self._refused[where] is not None:
            return []
        fits = [w for w in work if w.count == 1 and w.ready and not w.drafts and plain(w.row.request)]
        return fits[: ROW_BUCKETS[-1]]

    def start(self, work: list[Work]) -> Pending:
        """Launch a step from what the host knows."""
        width = LEAST_PAGES
        while width < max(len(w.row.pages) for w in work) + 1:  # room to grow before the next capture
            width *= 2
        sources = max(len(w.row.source_pages) for w in work)  # 0 without
        sources = 1 << (sources - 1).bit_length() if sources else 0
        where = width, sources, restrictions()  # every host value that a capture bakes in, the rows aside
        fits = [size for size in ROW_BUCKETS if size >= len(work)]
        # One of up to twice the rows that is there already: idle rows cost next to nothing, a capture does.
        made = (size for size in fits if size <= 2 * fits[0] and (size, *where) in self._graphs)
        rows = next(made, fits[0])
        key = rows, *where
        graph = self._graphs.get(key)
        if graph is None:
            with using(self._workspace):
                graph = self._graphs[key] = _Graph(self.runner, rows, *where[:2], self._pool)
        graph.fill(work)
        return graph.launch(work, list(range(len(work))))

    def follow(self, pending: Pending, work: list[Work]) -> Pending | None:
        """Launch the step after one that may still run, for its rows or some of them; None if it needs
        another graph, or should have one of fewer rows."""
        graph = pending.graph
        if any(len(w.row.pages) > graph.width for w in work) or 2 * len(work) < graph.filled:
            return None
        at = {w.row: place for w, place in zip(pending.work, pending.places, strict=True)}
        places = [at[w.row] for w in work]
        if len(work) < len(pending.work):
            graph.keep(places)
        if any(w.start % self.runner.page_size == 0 for w in work):  # a row begins a new page
            graph.fill_pages(work, places)
        return graph.launch(work, places)


class _Graph:
    """One captured size: `rows` rows of at most `width` pages, and `sources` pages of what each row's
    cross-attention reads (0: there is none)."""

    def __init__(self, runner: Runner, rows: int, width: int, sources: int, pool):
        self.rows, self.width, self.sources, self.page_size = rows, width, sources, runner.page_size
        self.model = runner.model
        device = runner.device
        # All state in one buffer, the 64-bit fields first: filling it is one copy.
        sizes = [2 * rows] * 3 + [rows] * 7 + [rows * width, rows * (sources > 0), rows * sources]
        pinned = device.type == "cuda"
        self._host = torch.zeros(room(sizes), dtype=torch.int32, pin_memory=pinned)
        self._state = torch.zeros(room(sizes), dtype=torch.int32, device=device)
        self._sizes = sizes
        views = fields(self._state, sizes, 3)
        self.ids, seeds, steps, self.positions, self.lengths, self.active, top_k = views[:7]
        temperature, top_p, min_p = (view.view(torch.float32) for view in views[7:10])
        self.table = views[10].view(rows, width)
        self.source_lengths, self.source_table = views[11], views[12].view(rows, sources)
        self.how = Sampling(temperature, top_k, top_p, min_p, seeds, steps)
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._keys, self._values = runner.keys, runner.values
        # Two places for tokens: the host reads one while the next step fills the other.
        self._out = [torch.zeros(rows, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._turn = 0
        # Two events, so that pages can be written while a copy of `keep` waits for the step under way.
        self._copied, self._kept = torch.cuda.Event(), torch.cuda.Event()
        self.filled = 0  # rows that had work when it was last filled
        self.replay = _capture(self._step, device, pool)  # all rows are idle: it writes nothing

    def _step(self) -> None:
        """What the graph holds. An idle row has no keys and no slot: it computes on nothing and writes
        nothing."""
        page = (self.positions // self.page_size).long().unsqueeze(1)
        slots = self.table.gather(1, page).squeeze(1) * self.page_size + self.positions % self.page_size
        slots = torch.where(self.active > 0, slots, -1).long()
        kv = PagedKV(self._keys, self._values, self.table, self.lengths, slots, self.width * self.page_size)
        source = None
        if self.sources:
            table, lengths, longest = self.source_table, self.source_lengths, self.sources * self.page_size
            source = PagedKV(self._keys, self._values, table, lengths, None, longest)
        batch = Batch(self.ids, self.positions, self.starts, 1, kv=kv, totals=self.lengths, source=source)
        tokens, finite = sample(self.model.logits(self.model.decoder(batch)), self.how)
        self.tokens.copy_(torch.where(finite, tokens, -1))
        self.ids.copy_(tokens)
        for counter in (self.positions, self.lengths, self.how.steps):
            counter.add_(self.active)

    def fill(self, work: list[Work]) -> None:
        """State of the rows, from what the host knows, in one copy."""
        self._copied.synchronize()  # earlier copies may still read the pinned buffer
        self._kept.synchronize()
        self.filled = len(work)
        self._host.zero_()
        views = [view.numpy() for view in fields(self._host, self._sizes, 3)]
        ids, seeds, steps, positions, lengths, active, top_k = views[:7]
        temperature, top_p, min_p = (view.view(np.float32) for view in views[7:10])
        top_p[:] = 1.0
        for row, item in enumerate(work):
            request, start = item.row.request, item.start
            p = request.params
            ids[row], positions[row], lengths[row], active[row] = item.row.token(start), start, start + 1, 1
            steps[row] = len(item.row.output)
            seeds[row] = np.uint64(p.seed & 0xFFFFFFFFFFFFFFFF).astype(np.int64)
            if not p.greedy:
                temperature[row], top_k[row], top_p[row], min_p[row] = (
                    p.temperature,
                    p.top_k,
                    p.top_p,
                    p.min_p,
                )
            if self.sources:
                fill_source(views[11], views[12].reshape(self.rows, self.sources), row, item.row)
        self._write_pages(views[10], work, range(len(work)))
        self._state.copy_(self._host, non_blocking=True)
        self._copied.record()

    def fill_pages(self, work: list[Work], places: Sequence[int]) -> None:
        """The page table alone, after rows got pages."""
        self._copied.synchronize()
        table = fields(self._host, self._sizes, 3)[10]
        self._write_pages(table.numpy(), work, places)
        self.table.copy_(table.view(self.rows, self.width), non_blocking=True)
        self._copied.record()

    def _write_pages(self, flat: np.ndarray, work: list[Work], places: Sequence[int]) -> None:
        table = flat.reshape(self.rows, self.width)
        for row, item in zip(places, work, strict=True):
            pages = item.row.pages
            table[row, : len(pages)] = pages
            table[row, len(pages) :] = pages[0]

    def keep(self, places: Sequence[int]) -> None:
        """Leave all rows but these idle from the next step on."""
        self._copied.synchronize()
        self._kept.synchronize()
        active = fields(self._host, self._sizes, 3)[5]
        active.zero_()
        active[places] = 1
        self.active.copy_(active, non_blocking=True)
        self._kept.record()
        self.lengths.mul_(self.active)  # what they have cached is not read again

    def launch(self, work: list[Work], places: list[int]) -> Pending:
        self.replay()
        self._turn ^= 1
        host = self._out[self._turn]
        host.copy_(self.tokens, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return Pending(work, places, self, host, done)


def _capture(step: Callable[[], None], device: torch.device, pool) -> Callable[[], None]:
    """What runs `step` again, as one graph; it runs once before, which compiles its kernels."""
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream(device).wait_stream(side)
    with torch.cuda.graph(graph, pool=pool):
        step()
    return graph.replay
