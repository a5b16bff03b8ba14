"""Attention of packed rows on the CPU, all of them in one call.

A vector holds 16 queries of a head: their scores against a key, the weights these become and the sums of
values are made without an operation across lanes, and only the queries of a row's last vector are ever
incomplete, never its keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from taut.kernels.arithmetic_llvm import STORED, exp, read, write
from taut.kernels.dispatch import compiled_refuses
from taut.kernels.llvm import LANES, Builder, Type, Value, has
from taut.kernels.threads import Kernel

if TYPE_CHECKING:
    from taut.kernels.attention import Call, KeyRows, Scoring

MAX_KEYS = 8192  # of a row, for which each thread has room in float32
_WIDE = Type("f32", LANES)


@dataclass(frozen=True)
class _Shape:
    """What kernels are made for. `group`: query heads of a key head; `distances`: whether they add to the
    scores."""

    dtype: torch.dtype
    head_dim: int
    group: int
    causal: bool
    window: bool
    distances: bool


_POINTERS = ("q", "k", "v", "starts", "key_starts", "distances", "room", "out")
_COUNTS = ("rows", "kv_heads", "splits", "q_stride", "k_stride", "v_stride", "longest", "window", "size")
_FIELDS = dict.fromkeys(_POINTERS, "ptr") | dict.fromkeys(_COUNTS, "i64") | {"scale": "f32"}


def _side() -> int:
    """How many sums of 16 lanes are made side by side: as many as registers hold."""
    return LANES if has("avx512f") else 4


@cache
def _kernel(shape: _Shape) -> Kernel:
    return Kernel(_FIELDS, lambda b, a: _write(b, a, shape))


def _write(b: Builder, a: SimpleNamespace, s: _Shape) -> None:
    # A thread's own room: a head's keys and values in float32, and the scores of 16 queries against each key.
    keys = b.at(a.room, b.thread * a.longest * (2 * s.head_dim + LANES), "f32")
    values = b.at(keys, a.longest * s.head_dim, "f32")
    scores = b.at(values, a.longest * s.head_dim, "f32")
    queries = b.array("f32", s.head_dim * LANES)
    with b.loop(b.thread, a.rows * a.kv_heads * a.splits, b.threads) as task:
        split, piece = task % a.splits, task // a.splits
        kv_head, row = piece % a.kv_heads, piece // a.kv_heads
        begin, end = _bounds(b, a.starts, row)
        key_begin, key_end = _bounds(b, a.key_starts, row)
        count, tiles = key_end - key_begin, (end - begin + (LANES - 1)) // LANES
        with b.when(split < tiles):
            for place, target, stride in ((a.k, keys, a.k_stride), (a.v, values, a.v_stride)):
                _gather(b, s, place, key_begin, count, stride, kv_head, target)
            with b.loop(0, s.group) as g, b.loop(split, tiles, a.splits) as tile:
                head = kv_head * s.group + g
                first = tile * LANES
                left = end - begin - first
                _take(b, a, s, begin + first, left, head, queries)
                low, high = _seen(b, a, s, first, left, count)
                _score(b, a, s, queries, keys, low, high, first, head, scores)
                total = _weigh(b, a, s, scores, low, high, first)
                place = begin + first, b.select(left < LANES, left, LANES), head
                _sum(b, a, s, scores, values, low, high, total, place, queries)


def _bounds(b: Builder, starts: Value, row: Value) -> tuple[Value, Value]:
    """Where a row begins and ends."""
    begin, end = (b.convert(b.load(starts, row + n, "i32"), "i64", signed=True) for n in (0, 1))
    return begin, end


def _gather(
    b: Builder, s: _Shape, place: Value, first: Value, count: Value, stride: Value, head: Value, target: Value
) -> None:
    """A head's vectors of a row, one after the other; those of the head that this thread takes next are
    fetched meanwhile, since what is read in so wide steps no processor foresees."""
    with b.loop(0, count) as j:
        for n in range(0, s.head_dim, LANES):
            at = (first + j) * stride + head * s.head_dim + n
            b.prefetch(place, at + b.threads * s.head_dim, STORED[s.dtype])
            x = read(b, place, at, s.dtype)
            b.store(x, target, j * s.head_dim + n)


def _take(
    b: Builder, a: SimpleNamespace, s: _Shape, first: Value, left: Value, head: Value, target: Value
) -> None:
    """Sixteen queries, scaled, `[head_dim, 16]`; those that the row lacks are its last one again."""
    places = []
    for lane in range(LANES):
        own = b.select(left > lane, lane, left - 1)
        places.append((first + own) * a.q_stride + head * s.head_dim)
    for n in range(0, s.head_dim, LANES):
        for place in places:
            b.prefetch(a.q, place + n + b.threads * (s.group * s.head_dim), STORED[s.dtype])
        rows = [read(b, a.q, place + n, s.dtype) for place in places]
        for d, v in enumerate(_transposed(b, rows)):
            b.store(v * a.scale, target, (n + d) * LANES)


def _transposed(b: Builder, rows: list[Value]) -> list[Value]:
    """The columns of sixteen vectors, by exchanging halves of ever smaller blocks."""
    for size in (8, 4, 2, 1):
        near = [n if not n & size else n - size + LANES for n in range(LANES)]
        far = [n + size if not n & size else n + LANES for n in range(LANES)]
        made = list(rows)
        for n in range(LANES):
            if not n & size:
                x, y = rows[n], rows[n + size]
                made[n], made[n + size] = b.shuffle(x, near, y), b.shuffle(x, far, y)
        rows = made
    return rows


def _seen(
    b: Builder, a: SimpleNamespace, s: _Shape, first: Value, left: Value, count: Value
) -> tuple[Value, Value]:
    """The first and the one behind the last of the keys that some of the queries from `first` on see."""
    low, high = b.like(0, count), count
    last = first + b.select(left < LANES, left, LANES) - 1
    if s.causal:
        high = last + 1
    if s.window:
        low = b.select(first >= a.window, first - a.window + 1, 0)
        if not s.causal:
            high = b.select(last + a.window < count, last + a.window, count)
    return low, high


def _score(
    b: Builder,
    a: SimpleNamespace,
    s: _Shape,
    queries: Value,
    keys: Value,
    low: Value,
    high: Value,
    first: Value,
    head: Value,
    scores: Value,
) -> None:
    """Scores `[keys, 16]` of the keys from `low` to `high`. The last so many of them are taken together, some
    for the second time, rather than fewer."""
    count = high - low

    def tiles(size: int) -> None:
        with b.loop(0, count, size) as step:
            j = low + b.select(step + size > count, count - size, step)
            totals = [b.var(0.0, _WIDE) for _ in range(size)]
            with b.loop(0, s.head_dim, 4) as d:
                for n in range(4):
                    q = b.load(queries, (d + n) * LANES, _WIDE)
                    for key, total in enumerate(totals):
                        k = b.splat(b.load(keys, (j + key) * s.head_dim + d + n, "f32"))
                        total.value = b.fma(q, k, total.value)
            for key, total in enumerate(totals):
                b.store(_biased(b, a, s, total.value, first, j + key, head), scores, (j + key) * LANES)

    sizes = sorted({_side(), 4, 1})
    for size, larger in zip(sizes, (*sizes[1:], 2 * MAX_KEYS), strict=True):
        with b.when((count >= size) & (count < larger)):
            tiles(size)


def _biased(
    b: Builder, a: SimpleNamespace, s: _Shape, score: Value, first: Value, key: Value, head: Value
) -> Value:
    """The scores of a key, with what distances add, and without the queries that don't see it."""
    if s.distances:
        place = head * a.size + (first - key) + (a.longest - 1)
        score = score + b.load(a.distances, place, _WIDE)
    if not (s.causal or s.window):
        return score
    behind = b.splat(first - key) + b.vector(range(LANES), "i64")
    seen = behind >= 0 if s.causal else None
    if s.window:
        near = behind < a.window
        near = near if s.causal else near & (behind > -a.window)
        seen = near if seen is None else seen & near
    return b.select(seen, score, -math.inf)


def _weigh(
    b: Builder, a: SimpleNamespace, s: _Shape, scores: Value, low: Value, high: Value, first: Value
) -> Value:
    """Turn scores into weights, and give their sums."""
    most = b.var(-math.inf, _WIDE)
    with b.loop(low, high) as j:
        score = b.load(scores, j * LANES, _WIDE)
        most.value = b.select(score < most.value, most.value, score)  # what is not a number stays
    top, total = most.value, b.var(0.0, _WIDE)
    with b.loop(low, high) as j:
        weight = exp(b, b.load(scores, j * LANES, _WIDE) - top)
        total.value = total.value + weight
        b.store(weight, scores, j * LANES)
    return total.value


def _sum(
    b: Builder,
    a: SimpleNamespace,
    s: _Shape,
    weights: Value,
    values: Value,
    low: Value,
    high: Value,
    total: Value,
    place: tuple[Value, Value, Value],
    room: Value,
) -> None:
    """The weighted sums of values, out to the `place`: the first query, how many, and their head."""
    first, left, head = place
    factor = 1.0 / b.select(total.equals(0.0), 1.0, total)  # of a row without keys: zeros
    heads = a.kv_heads * s.group
    for n in range(0, s.head_dim, LANES):
        sums = [b.var(0.0, _WIDE) for _ in range(LANES)]
        for side in range(0, LANES, _side()):
            with b.loop(low, high) as j:
                weight = b.load(weights, j * LANES, _WIDE)
                for d, own in enumerate(sums[side : side + _side()], side):
                    v = b.splat(b.load(values, j * s.head_dim + n + d, "f32"))
                    own.value = b.fma(weight, v, own.value)
        for lane, v in enumerate(_transposed(b, [own.value * factor for own in sums])):
            b.store(v, room, lane * LANES)
        with b.loop(0, left) as lane:
            x = b.load(room, lane * LANES, _WIDE)
            write(b, x, a.out, ((first + lane) * heads + head) * s.head_dim + n, s.dtype)


def refuses(call: Call) -> str | None:
    """Why the kernel can't take this attention, or None."""
    q, scoring, keys_of = call.q, call.scoring, call.key_rows
    if (why := compiled_refuses(q)) is not None:
        return why
    if call.pages is not None:
        return "takes no keys from cache pages"
    if q.shape[2] % LANES or q.shape[2] > 256:
        return f"takes head dims up to 256, divisible by {LANES}; asked: {q.shape[2]}"
    extra = {"soft-cap": scoring.softcap, "sinks": scoring.sinks, "bias": scoring.bias, "gate": scoring.gate}
    if (odd := next((name for name, value in extra.items() if value is not None), None)) is not None:
        return f"adds what distances add alone, and this has a {odd}"
    placed = {"causal": scoring.causal, "window": scoring.window, "slopes": scoring.slopes}
    placed |= {"relative": scoring.relative}
    if keys_of is not None and any(value is not None and value is not False for value in placed.values()):
        return "takes keys in rows of their own where all are seen alike"
    if (keys := call.longest if keys_of is None else keys_of.longest) > MAX_KEYS:
        return f"takes at most {MAX_KEYS} keys a row; a row has {keys}"
    if torch.is_grad_enabled():
        return "has no backward"
    return None


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scoring: Scoring, key_rows: KeyRows | None
) -> Tensor:
    """Attention of packed queries `q` `[tokens, heads, head_dim]` to keys and values `k`, `v` `[tokens,
    kv_heads, head_dim]`, as `attention` takes them; sums are float32. Gives `[tokens, heads, head_dim]`."""
    q, k, v = (_in_rows(t) for t in (q, k, v))
    tokens, heads, head_dim = q.shape
    rows, kv_heads, threads = starts.shape[0] - 1, k.shape[1], torch.get_num_threads()
    keys = longest if key_rows is None else key_rows.longest
    group, distances = heads // kv_heads, _distances(longest, scoring)
    window, biased = scoring.window is not None, distances is not None
    shape = _Shape(q.dtype, head_dim, group, scoring.causal, window, biased)
    pieces = rows * kv_heads
    splits = 1 if pieces >= 4 * threads else min(-(-4 * threads // max(pieces, 1)), -(-longest // LANES))
    room = q.new_empty(threads * keys * (2 * head_dim + LANES), dtype=torch.float32)
    out = q.new_empty(tokens, heads, head_dim)
    _kernel(shape)(
        q,
        k,
        v,
        starts,
        starts if key_rows is None else key_rows.starts,
        distances,
        room,
        out,
        rows,
        kv_heads,
        max(splits, 1),
        q.stride(0),
        k.stride(0),
        v.stride(0),
        keys,
        scoring.window or 0,
        0 if distances is None else distances.shape[1],
        scoring.scale,
    )
    return out


def _in_rows(x: Tensor) -> Tensor:
    """With the heads of a token one after the other."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _distances(longest: int, scoring: Scoring) -> Tensor | None:
    """What a query `n` tokens behind a key adds, `[heads, 2 * longest - 1 + 15]` float32: entry
    `longest - 1 + n`, and for the lanes of queries that a row lacks some more."""
    if scoring.slopes is None and scoring.relative is None:
        return None
    behind = torch.arange(1 - longest, longest + LANES - 1, device="cpu")
    added = 0.0
    if scoring.slopes is not None:
        added = scoring.slopes.float()[:, None] * -behind
    if scoring.relative is not None:
        reach = scoring.relative.shape[1] // 2
        added = added + scoring.relative.float()[:, (-behind).clamp(-reach, reach) + reach]
    return added.contiguous()
