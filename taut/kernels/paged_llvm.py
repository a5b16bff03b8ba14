"""Decode attention on the CPU: a few queries a row over the pages of its cache, split over the keys.

Each thread takes pieces of the work: a query, a key head, and a share of the keys, whose scores it turns into
a partial sum of values with its own largest score; a second kernel puts the shares together. Keys are taken
16 at a time, one tile of a page, so that their scores are one vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from taut.kernels.arithmetic_llvm import exp, read, read_pairs, tanh, unpaired, write
from taut.kernels.attention import Pages, Scoring
from taut.kernels.dispatch import compiled_refuses
from taut.kernels.llvm import LANES, Builder, Type, Value
from taut.kernels.threads import Kernel

MAX_QUERIES = 16
_TILE = LANES
_WIDE = Type("f32", LANES)


@dataclass(frozen=True)
class _Shape:
    """What kernels are made for. `group`: query heads of a key head; `relative`: dtype of the table."""

    dtype: torch.dtype
    head_dim: int
    group: int
    causal: bool
    window: bool
    softcap: bool
    slopes: bool
    relative: torch.dtype | None
    sinks: torch.dtype | None

    @property
    def paired(self) -> bool:
        """Whether vectors of a head hold every second value of 32: bfloat16 is widened fastest so."""
        return self.dtype is torch.bfloat16 and self.head_dim % (2 * LANES) == 0

    @property
    def part(self) -> int:
        """Floats of a partial result: the sum of values, the largest score and the sum of weights."""
        return self.head_dim + LANES


_POINTERS = ("q", "keys", "values", "table", "lengths", "starts", "slopes", "relative", "parts")
_COUNTS = ("tokens", "rows", "kv_heads", "size", "width", "splits", "window", "reach")
_FIELDS = (
    dict.fromkeys(_POINTERS, "ptr")
    | dict.fromkeys(_COUNTS, "i64")
    | dict.fromkeys(("scale", "softcap"), "f32")
)


@cache
def _partial(shape: _Shape) -> Kernel:
    return Kernel(_FIELDS, lambda b, a: _write_partial(b, a, shape))


def _head(b: Builder, place: Value, index: Value, s: _Shape) -> list[Value]:
    """A head's values, float32, LANES a vector; paired as the shape has it."""
    if not s.paired:
        return [read(b, place, index + n, s.dtype) for n in range(0, s.head_dim, LANES)]
    return [v for n in range(0, s.head_dim, 2 * LANES) for v in read_pairs(b, place, index + n)]


def _write_partial(b: Builder, a: SimpleNamespace, s: _Shape) -> None:
    queries = b.array("f32", s.group * s.head_dim)
    weights = b.array("f32", _TILE)
    chunks = s.head_dim // LANES
    heads = a.kv_heads * s.group
    with b.loop(b.thread, a.tokens * a.kv_heads * a.splits, b.threads) as task:
        split, piece = task % a.splits, task // a.splits
        kv_head, token = piece % a.kv_heads, piece // a.kv_heads
        row = _row_of(b, a, token)
        length = b.convert(b.load(a.lengths, row, "i32"), "i64", signed=True)
        end = b.convert(b.load(a.starts, row + 1, "i32"), "i64", signed=True)
        own = length - (end - token)  # the queries of a row are its last positions
        first, stop = b.like(0, own), own + 1 if s.causal else length
        if s.window:
            first = b.select(own >= a.window, own - a.window + 1, 0)
            stop = stop if s.causal else b.select(own + a.window < length, own + a.window, length)
        # Shares are whole tiles, so that no two read the same one.
        tiles = (stop + (_TILE - 1)) // _TILE
        begin, count = first // _TILE, tiles - first // _TILE
        share = (count + a.splits - 1) // a.splits
        low = begin + split * share
        high = b.select(low + share < tiles, low + share, tiles)

        with b.loop(0, s.group) as g:
            for n, v in enumerate(_head(b, a.q, (token * heads + kv_head * s.group + g) * s.head_dim, s)):
                b.store(v * b.splat(a.scale), queries, g * s.head_dim + n * LANES)
            part = _part(b, a, s, token * heads + kv_head * s.group + g, split)
            zero = b.const(0.0, _WIDE)
            for n in range(chunks):
                b.store(zero, part, n * LANES)
            b.store(b.const(-math.inf, Type("f32")), part, s.head_dim)
            b.store(b.const(0.0, Type("f32")), part, s.head_dim + 1)
        with b.loop(low, high) as tile:
            position = tile * _TILE
            page = b.convert(b.load(a.table, row * a.width + position // a.size, "i32"), "i64")
            slot = page * a.size + position % a.size
            place, stride = (slot * a.kv_heads + kv_head) * s.head_dim, a.kv_heads * s.head_dim
            at = b.splat(position) + b.vector(range(_TILE), "i64")
            seen = (at < stop) & (at >= first)
            inside = (
                b.select(first > position, first - position, 0),
                b.select(stop < position + _TILE, stop - position, _TILE),
            )
            with b.loop(0, s.group) as g:
                head = kv_head * s.group + g
                part = _part(b, a, s, token * heads + head, split)
                scores = _scores(b, a, s, queries, g, place, stride)
                if s.softcap:
                    scores = tanh(b, scores / a.softcap) * a.softcap
                behind = position - own
                if s.slopes:
                    distance = b.convert(b.splat(behind) + b.vector(range(_TILE), "i64"), "f32", signed=True)
                    scores = b.fma(distance, b.load(a.slopes, head, "f32"), scores)
                if s.relative is not None:
                    scores = scores + _relative(b, a, s, head, behind, weights)
                scores = b.select(seen, scores, -math.inf)
                _accumulate(b, a, s, part, scores, weights, inside, place, stride)


def _row_of(b: Builder, a: SimpleNamespace, token: Value) -> Value:
    """The row that a token is in: the rows before it end at or before the token."""
    row = b.var(b.like(0, token))
    with b.loop(1, a.rows) as i:
        begin = b.convert(b.load(a.starts, i, "i32"), "i64", signed=True)
        row.value = b.select(begin <= token, i, row.value)
    return row.value


def _part(b: Builder, a: SimpleNamespace, s: _Shape, query: Value, split: Value) -> Value:
    return b.at(a.parts, (query * a.splits + split) * s.part, "f32")


def _scores(
    b: Builder, a: SimpleNamespace, s: _Shape, queries: Value, g: Value, place: Value, stride: Value
) -> Value:
    """A query against the keys of a tile: sums of products whose lanes are then added, all tiles at once."""
    base = g * s.head_dim
    q = [b.load(queries, base + n, _WIDE) for n in range(0, s.head_dim, LANES)]
    sums = []
    for key in range(_TILE):
        total = None
        for x, k in zip(q, _head(b, a.keys, place + key * stride, s), strict=True):
            total = x * k if total is None else b.fma(x, k, total)
        sums.append(total)
    # Pairs of vectors become one whose lanes are the sums of neighbours, until a lane is left for each key.
    while len(sums) > 1:
        pairs = zip(sums[::2], sums[1::2], strict=True)
        sums = [
            b.shuffle(x, range(0, 2 * LANES, 2), y) + b.shuffle(x, range(1, 2 * LANES, 2), y)
            for x, y in pairs
        ]
    return sums[0]


def _relative(b: Builder, a: SimpleNamespace, s: _Shape, head: Value, behind: Value, room: Value) -> Value:
    """What the distances of a tile's keys add to their scores."""
    with b.loop(0, _TILE) as n:
        distance = behind + n
        distance = b.select(distance < -a.reach, -a.reach, distance)
        distance = b.select(distance > a.reach, a.reach, distance)
        index = head * (a.reach * 2 + 1) + a.reach + distance
        b.store(read(b, a.relative, index, s.relative, 0), room, n)
    return b.load(room, 0, _WIDE)


def _accumulate(
    b: Builder,
    a: SimpleNamespace,
    s: _Shape,
    part: Value,
    scores: Value,
    weights: Value,
    inside: tuple[Value, Value],
    place: Value,
    stride: Value,
) -> None:
    """Take a tile's scores, and the values of the keys `inside`, into the partial result."""
    before = b.load(part, s.head_dim, "f32")
    most = b.largest(scores)
    most = b.select(before > most, before, most)
    p = exp(b, scores - most)
    fade = exp(b, before - most)
    b.store(p, weights, 0)
    b.store(most, part, s.head_dim)
    b.store(b.fma(b.load(part, s.head_dim + 1, "f32"), fade, b.total(p)), part, s.head_dim + 1)
    sums = [b.var(b.load(part, n, _WIDE) * b.splat(fade)) for n in range(0, s.head_dim, LANES)]
    with b.loop(*inside) as key:
        weight = b.splat(b.load(weights, key, "f32"))
        for total, v in zip(sums, _head(b, a.values, place + key * stride, s), strict=True):
            total.value = b.fma(weight, v, total.value)
    for n, total in enumerate(sums):
        b.store(total.value, part, n * LANES)


_JOIN = dict.fromkeys(("parts", "sinks", "out"), "ptr") | dict.fromkeys(("tokens", "heads", "splits"), "i64")


@cache
def _joining(shape: _Shape) -> Kernel:
    return Kernel(_JOIN, lambda b, a: _write_join(b, a, shape))


def _write_join(b: Builder, a: SimpleNamespace, s: _Shape) -> None:
    first, last = b.share(a.tokens * a.heads)
    with b.loop(first, last) as query:
        start = -math.inf if s.sinks is None else read(b, a.sinks, query % a.heads, s.sinks, 0)
        most = b.var(start)
        with b.loop(0, a.splits) as split:
            score = b.load(_part(b, a, s, query, split), s.head_dim, "f32")
            most.value = b.select(score > most.value, score, most.value)
        top = most.value
        whole = b.var(0.0 if s.sinks is None else exp(b, start - top))
        sums = [b.var(0.0, _WIDE) for _ in range(0, s.head_dim, LANES)]
        with b.loop(0, a.splits) as split:
            part = _part(b, a, s, query, split)
            weight = b.load(part, s.head_dim + 1, "f32")
            with b.when(~weight.equals(0.0)):  # also where it is not a number
                factor = exp(b, b.load(part, s.head_dim, "f32") - top)
                whole.value = b.fma(weight, factor, whole.value)
                for n, total in enumerate(sums):
                    total.value = b.fma(b.splat(factor), b.load(part, n * LANES, _WIDE), total.value)
        size = b.select(whole.value.equals(0.0), 1.0, whole.value)
        values = [total.value / size for total in sums]
        if s.paired:
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [v for pair in pairs for v in unpaired(b, *pair)]
        for n, v in enumerate(values):
            write(b, v, a.out, query * s.head_dim + n * LANES, s.dtype)


def refuses(q: Tensor, queries: int, scoring: Scoring, pages: Pages | None) -> str | None:
    """Why the kernel can't take this attention, or None. `queries`: most queries of a row."""
    if (why := compiled_refuses(q)) is not None:
        return why
    if pages is None:
        return "reads keys from cache pages only"
    if queries > MAX_QUERIES:
        return f"takes at most {MAX_QUERIES} queries a row; a row has {queries}"
    if pages.keys.dtype is not q.dtype:
        return f"takes one dtype throughout; q is {q.dtype}, the cache {pages.keys.dtype}"
    if q.shape[2] % LANES or q.shape[2] > 256:
        return f"takes head dims up to 256, divisible by {LANES}; asked: {q.shape[2]}"
    if pages.keys.shape[1] % _TILE:
        return f"takes pages of {_TILE} keys or a multiple; they have {pages.keys.shape[1]}"
    if torch.is_grad_enabled():
        return "has no backward"
    return None


def paged_attention(q: Tensor, starts: Tensor, scoring: Scoring, pages: Pages) -> Tensor:
    """Attention of packed queries `q` `[tokens, heads, head_dim]` over cache pages; `starts` `[rows + 1]`
    int32. A row without keys gives zeros. Gives `[tokens, heads, head_dim]`."""
    tokens, heads, head_dim = q.shape
    size, kv_heads = pages.keys.shape[1:3]
    relative, sinks = scoring.relative, scoring.sinks
    shape = _Shape(
        q.dtype,
        head_dim,
        heads // kv_heads,
        scoring.causal,
        scoring.window is not None,
        scoring.softcap is not None,
        scoring.slopes is not None,
        None if relative is None else relative.dtype,
        None if sinks is None else sinks.dtype,
    )
    threads, pieces = torch.get_num_threads(), tokens * kv_heads
    splits = threads // math.gcd(pieces, threads) if pieces < 4 * threads else 1
    parts = q.new_empty(tokens * heads * splits * shape.part, dtype=torch.float32)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _partial(shape)(
        q.contiguous(),
        pages.keys,
        pages.values,
        pages.table,
        pages.lengths,
        starts,
        None if scoring.slopes is None else scoring.slopes.float(),
        None if relative is None else relative.contiguous(),
        parts,
        tokens,
        starts.shape[0] - 1,
        kv_heads,
        size,
        pages.table.stride(0),
        splits,
        scoring.window or 0,
        0 if relative is None else relative.shape[1] // 2,
        scoring.scale,
        scoring.softcap or 0.0,
    )
    _joining(shape)(parts, sinks, out, tokens, heads, splits)
    return out
