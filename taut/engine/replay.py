"""`Replays`: packed forwards as CUDA graphs, where launching kernels would take longer than they do.

A graph is for so many tokens, rows and cache pages; a batch of fewer is filled up with a row of its own, that
no other row sees. What a batch holds lies in tensors that the graph reads: it serves any batch of its size.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import fields, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from taut.batch import Batch, PagedKV
from taut.kernels.attention import Call, Pages, explain, restrictions
from taut.kernels.device import Workspace, using
from taut.kernels.dispatch import device_refuses, triton_refuses
from taut.layers.attention import Attention
from taut.layers.experts import ExpertLinear
from taut.layers.linear import Linear

# A block takes the host about a millisecond to launch, and a GPU of today multiplies at some 600 TFLOP/s.
HOST_SECONDS = 1e-3
RATE = 6e14
MOST_GRAPHS = 32


def graphs_refuse(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no graph can hold what a model computes there, whatever its attention runs on; or None."""
    if (why := device_refuses(device)) is not None:
        return why
    return triton_refuses(torch.empty(0, dtype=dtype, device=device))


def refuses(module: nn.Module, device: torch.device, dtype: torch.dtype, cached: bool) -> str | None:
    """Why forwards of `module`, with or without a cache, can't be graphs, or None."""
    if (why := graphs_refuse(device, dtype)) is not None:
        return why
    for attn in (m for m in module.modules() if isinstance(m, Attention)):
        c, pages = attn.config, None
        q = torch.empty(1, c.heads, c.head_dim, dtype=dtype, device=device)
        if cached:
            kv, row = (
                q.new_empty(1, 1, c.kv_heads, c.head_dim),
                torch.zeros(1, dtype=torch.int32, device=device),
            )
            pages = Pages(kv, kv, row[None], row, 512)
        offers = explain(Call(q, 1, 512, attn.scoring, pages), attn.only)
        chosen = next((name for name, why in offers if why is None), "nothing")
        if chosen not in ("flash", "paged"):
            return f"layer {attn.index}'s attention runs on {chosen}, which waits for the device"
    return None


class Replays:
    """The graphs of one packed module `module(batch) -> [tokens, dim]` of `model`.

    A size is captured when it comes for the second time: the first run has compiled its kernels. Graphs are
    dropped when a parameter has moved, and not used while something watches the modules (hooks) or gradients
    are wanted. Calls may come from any thread; they run one after the other.
    """

    def __init__(self, model: nn.Module, module: nn.Module):
        self.model, self.module = model, module
        self._graphs: OrderedDict[tuple[object, ...], _Graph] = OrderedDict()
        self._seen: set[tuple[object, ...]] = set()
        self._state: tuple[object, ...] | None = None
        self._refused: dict[object, str | None] = {}
        self._lock = threading.Lock()
        # The modules inside the module as they last were, and the dictionaries of all.
        self._inside: list[nn.Module] | None = None
        self._owns: list[dict[str, object]] = []
        self._attentions: list[Attention] = []

    def __call__(self, batch: Batch) -> Tensor:
        """`module(batch)`, `[tokens, dim]`; by a graph where that is faster."""
        if not batch.positions.is_cuda or torch.is_grad_enabled() or not 0 < batch.tokens <= self._most:
            return self.module(batch)
        with self._lock:
            with torch.inference_mode():
                graph = self._graph(batch)
                if graph is not None:
                    graph.run(batch)
            if graph is not None:
                # Copied outside of inference mode, unless the caller is in it: what comes of it is as usual.
                return graph.out[: batch.tokens].clone()
        return self.module(batch)

    def __reduce__(self) -> tuple[type[Replays], tuple[nn.Module, nn.Module]]:
        return Replays, (self.model, self.module)  # a copy of the model captures its own

    @cached_property
    def _most(self) -> int:
        """Tokens for which launching takes as long as computing."""
        products = 0  # multiplications of a token
        for module in self.module.modules():
            if isinstance(module, Linear):
                products += module.shape.numel()
            elif isinstance(module, ExpertLinear):
                products += module.chosen * module.shape[1:].numel()
        blocks = sum(isinstance(m, Attention) for m in self.module.modules())
        return int(HOST_SECONDS * blocks * RATE / (2 * max(products, 1)))

    def _graph(self, batch: Batch) -> _Graph | None:
        state = self._watch()
        if state is None:
            return None
        if state != self._state:
            self._graphs.clear()
            self._seen.clear()
            self._state = state
            self._refused.clear()
            self._pool = torch.cuda.graph_pool_handle()
            self._workspace = Workspace.of(batch.positions.device)
        key = _size_of(batch, self.model.config.context)
        where = batch.kv is not None, restrictions()
        if where not in self._refused:
            self._refused[where] = refuses(self.module, self.model.device, self.model.dtype, where[0])
        if key is None or self._refused[where] is not None:
            return None
        key = (*key, where)
        graph = self._graphs.get(key)
        if graph is None:
            if key not in self._seen:
                self._seen.add(key)
                return None
            if len(self._graphs) >= MOST_GRAPHS:
                self._graphs.popitem(last=False)
            with using(self._workspace):
                graph = _Graph(self.module, batch, key, self.model.config.context, self._pool)
            self._graphs[key] = graph
        self._graphs.move_to_end(key)
        return graph

    def _watch(self) -> tuple[object, ...] | None:
        """What graphs depend on besides the batch; None while a hook wants to see modules run."""
        # The device waits for this before each replay, so it reads the modules' dictionaries themselves.
        inside = [child for own in self._owns for child in own["_modules"].values() if child is not None]
        if inside != self._inside:
            modules = [self.module]
            for module in modules:  # which grows
                modules += [child for child in module._modules.values() if child is not None]
            self._inside, self._owns = modules[1:], [module.__dict__ for module in modules]
            self._attentions = [module for module in modules if isinstance(module, Attention)]
        found: list[object] = [attn.only for attn in self._attentions]
        for own in self._owns:
            if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["training"]:
                return None
            found += [p.data_ptr() for p in own["_parameters"].values() if p is not None]
            if own["_buffers"]:
                found += [b.data_ptr() for b in own["_buffers"].values() if b is not None]
        return tuple(found)


def _up(count: int, least: int, sizes: int) -> int:
    """`count` rounded up to one of `sizes`, a power of two, an octave."""
    step = max(least, 1 << max(count.bit_length() - sizes.bit_length(), 0))
    return -(-count // step) * step


def _size_of(batch: Batch, context: int) -> tuple[object, ...] | None:
    """What a graph for this batch is made for; None if it holds what a graph doesn't know, or a row, or what
    would fill it up, is longer than the context. (So a room of as many tokens as its rows may have holds rows
    of one length alone, and kernels for such rows may run in its graph.)"""
    given = []
    for field in fields(Batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            if "each" not in field.metadata:
                return None
            given.append((field.name, value.dtype))
    # Without a cache, batches are large, and what fills them up is computed: more sizes than of prompts.
    cached = batch.kv is not None
    tokens = _up(batch.tokens, 16, 16 if cached else 32)
    if max(batch.longest, tokens - batch.tokens) > context:
        return None
    rows = batch.rows + (tokens > batch.tokens)
    rows = 1 << (rows - 1).bit_length() if cached or rows <= 8 else _up(rows, 8, 8)
    pages = source = None
    if cached:
        pages = id(batch.kv.keys), _pages(batch.kv, 16), batch.kv.fresh
    if batch.source is not None:
        if not isinstance(batch.source, PagedKV):
            return None
        source = _pages(batch.source, 1)
    return tokens, rows, pages, source, tuple(given)


def _pages(kv: PagedKV, least: int) -> int:
    """Pages a row of a graph for such a table, at least so many."""
    return 1 << max(kv.pages.shape[1] - 1, least - 1).bit_length()


class _Graph:
    """One captured size."""

    def __init__(self, module: nn.Module, batch: Batch, key: tuple[object, ...], context: int, pool):
        self.batch = _room(batch, key, context)
        _fill(self.batch, batch)
        self._graph = torch.cuda.CUDAGraph()
        device = batch.positions.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            module(self.batch)
        torch.cuda.current_stream(device).wait_stream(side)
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.out = module(self.batch)

    def run(self, batch: Batch) -> None:
        """Fill `out`, whose first entries are the batch's."""
        _fill(self.batch, batch)
        self._graph.replay()


def _room(batch: Batch, key: tuple[object, ...], context: int) -> Batch:
    """A batch of the size `key` with room for any that has it."""
    tokens, rows = key[:2]
    lengths = {"token": tokens, "row": rows, "boundary": rows + 1}
    fixed: dict[str, object] = {"longest": min(tokens, context)}
    for field in fields(Batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            fixed[field.name] = value.new_zeros(lengths[field.metadata["each"]], *value.shape[1:])
    if batch.kv is not None:
        fixed["kv"] = _room_for_pages(batch.kv, tokens, rows, key[2][1])
    if batch.source is not None:
        fixed["source"] = _room_for_pages(batch.source, tokens, rows, key[3])
    return replace(batch, **fixed)


def _room_for_pages(kv: PagedKV, tokens: int, rows: int, width: int) -> PagedKV:
    new = kv.pages.new_zeros
    return replace(
        kv,
        pages=new(rows, width),
        lengths=new(rows),
        slots=None if kv.slots is None else kv.slots.new_full((tokens,), -1),
        longest=width * kv.page_size,
        first=None,
    )


def _fill(room: Batch, batch: Batch) -> None:
    """The batch, and after it one row that takes up the tokens that are left; the others stay empty."""
    left = room.tokens - batch.tokens
    places, values = [], []
    for field in fields(Batch):
        value, place = getattr(batch, field.name), getattr(room, field.name)
        if not isinstance(value, Tensor):
            continue
        places.append(place[: value.shape[0]])
        values.append(value)
        if field.metadata["each"] == "boundary":
            place[value.shape[0] :].fill_(room.tokens)
        elif field.metadata["each"] == "row":
            place[value.shape[0] :].fill_(left)
    torch._foreach_copy_(places, values)  # one call of the host's, which the device waits for
    for kv, place in ((batch.kv, room.kv), (batch.source, room.source)):
        if kv is not None:
            place.pages[: batch.rows, : kv.pages.shape[1]].copy_(kv.pages)
            place.lengths[: batch.rows].copy_(kv.lengths)
            place.lengths[batch.rows :].fill_(0)
    if batch.kv is not None:
        kv, place = batch.kv, room.kv
        place.slots[: batch.tokens].copy_(kv.slots)
        place.slots[batch.tokens :].fill_(-1)
        place.lengths[batch.rows : batch.rows + 1].fill_(left)
