"""FlashAttention over packed rows (Dao 2023), forward and backward, in Triton; keys also from cache pages.

Nothing here waits for the device: a program finds its row by a binary search over the row boundaries, in a
grid sized by the bound `tokens // BLOCK + rows` that the host knows. On Hopper the plain cases run on the
warp-specialized kernels of `flash_hopper`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from taut.errors import RequestError
from taut.kernels import flash_hopper, flash_hopper_backward
from taut.kernels.attention import Pages, Scoring
from taut.kernels.device import multiprocessors
from taut.kernels.flash_hopper_backward import SLOT

LOG2E = 1.4426950408889634
_LOG2E = tl.constexpr(LOG2E)
# Arguments whose value (of pointers: whether it is one of 16 bytes) makes no difference to the code.
_COUNTS = ("tokens", "rows", "group", "split", "window", "reach", "table_row")
_COUNTS += ("starts", "key_starts", "table", "lengths")


# Device side. Scores are kept in units of log2, so that a weight is one exp2.


@triton.jit
def _find_row(starts, slot, rows, BLOCK: tl.constexpr):
    """Row and tile within it of grid slot `slot`: row r owns the slots from `starts[r] // BLOCK + r` on,
    which are at least as many as it has tiles."""
    low = 0
    high = rows
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // BLOCK + middle <= slot:
            low = middle
        else:
            high = middle
    begin = tl.load(starts + low)
    return low, begin, tl.load(starts + low + 1) - begin, slot - (begin // BLOCK + low)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * _LOG2E)) + 1.0)


@triton.jit
def _add_bias(s, ahead, head, slopes, relative, reach, ALIBI: tl.constexpr, RELATIVE: tl.constexpr):
    """`ahead` is key position - query position, in the shape of `s`."""
    if ALIBI:
        s += tl.load(slopes + head) * _LOG2E * ahead
    if RELATIVE:
        at = tl.minimum(tl.maximum(ahead, -reach), reach) + reach
        s += tl.load(relative + head * (2 * reach + 1) + at).to(tl.float32) * _LOG2E
    return s


@triton.jit
def _seen(ahead, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """What a query sees, keys outside the row aside."""
    if CAUSAL:
        seen = ahead <= 0
        if WINDOW:
            seen = seen & (ahead > -window)
    else:
        seen = (ahead < window) & (ahead > -window) if WINDOW else ahead == ahead
    return seen


@triton.jit
def _key_range(first, last, keys, window, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Keys that queries at positions `first` .. `last` see: `[begin, end)`, and of these in whole blocks
    seen by every query `[whole_begin, whole_end)`. All but `end` are multiples of BLOCK."""
    begin = 0
    whole_begin = 0
    end = keys
    whole_end = keys
    if CAUSAL:
        end = tl.minimum(end, last + 1)
        whole_end = tl.minimum(whole_end, first + 1)
    elif WINDOW:
        end = tl.minimum(end, last + window)
        whole_end = tl.minimum(whole_end, first + window)
    if WINDOW:
        begin = tl.maximum(first - window + 1, 0) // BLOCK * BLOCK
        whole_begin = tl.maximum((last - window + BLOCK) // BLOCK * BLOCK, begin)
    end = tl.maximum(end, begin)
    whole_end = tl.maximum(whole_end, 0) // BLOCK * BLOCK
    whole_begin = tl.minimum(whole_begin, end + BLOCK - 1) // BLOCK * BLOCK
    whole_end = tl.maximum(whole_end, whole_begin)
    return begin, whole_begin, whole_end, end


@triton.jit
def _load_rows(base, at, stride, d, valid, DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """`[at, d]` of a `[*, stride]` array; zeros where not `valid` (looked at if MASKED) or past DIM."""
    where = base + at[:, None] * stride + d[None, :]
    if MASKED:
        if DIM == BLOCK_D:
            return tl.load(where, mask=valid[:, None], other=0.0)
        return tl.load(where, mask=valid[:, None] & (d < DIM)[None, :], other=0.0)
    if DIM == BLOCK_D:
        return tl.load(where)
    return tl.load(where, mask=(d < DIM)[None, :], other=0.0)


@triton.jit
def _forward_keys(
    acc, total, top, q, begin, end, position, keys, K, V, k_stride, v_stride, table, page_k, page_v, head,
    scale, softcap, window, slopes, relative, reach,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    RELATIVE: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys `[begin, end)`. `scale` is that of log2 scores."""
    PLAIN: tl.constexpr = not (SOFTCAP or ALIBI or RELATIVE)
    d = tl.arange(0, BLOCK_D)
    for n0 in tl.range(begin, end, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        valid = n < keys
        if PAGE:
            page = tl.load(table + n // PAGE, mask=valid, other=0).to(tl.int64)
            k_at = page * page_k + (n % PAGE) * k_stride
            v_at = page * page_v + (n % PAGE) * v_stride
            k = _load_rows(K, k_at, 1, d, valid, DIM, BLOCK_D, MASKED)
            v = _load_rows(V, v_at, 1, d, valid, DIM, BLOCK_D, MASKED)
        else:
            at = n.to(tl.int64)
            k = _load_rows(K, at, k_stride, d, valid, DIM, BLOCK_D, MASKED)
            v = _load_rows(V, at, v_stride, d, valid, DIM, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k))
        ahead = n[None, :] - position[:, None]
        if not PLAIN:
            s = softcap * _LOG2E * _tanh(s * (scale / (softcap * _LOG2E))) if SOFTCAP else s * scale
            s = _add_bias(s, ahead, head, slopes, relative, reach, ALIBI, RELATIVE)
        if MASKED:
            s = tl.where(valid[None, :] & _seen(ahead, window, CAUSAL, WINDOW), s, float("-inf"))
        highest = tl.max(s, 1)
        above = tl.maximum(top, highest * scale if PLAIN else highest)
        # A query that has seen no key yet has no maximum; any finite one gives it weights of zero.
        finite = tl.where(above == float("-inf"), 0.0, above) if MASKED else above
        p = tl.exp2(s * scale - finite[:, None]) if PLAIN else tl.exp2(s - finite[:, None])
        fade = tl.exp2(top - finite)
        total = total * fade + tl.sum(p, 1)
        acc = acc * fade[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc)
        top = above
    return acc, total, top


@triton.jit(do_not_specialize=_COUNTS)
def _forward(
    Q, K, V, OUT, LSE, starts, key_starts, table, lengths, slopes, relative, sinks,
    tokens, rows, group, window, reach, scale, softcap,
    q_token, q_head, k_token, k_head, v_token, v_head, o_token, o_head, page_k, page_v, table_row,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    RELATIVE: tl.constexpr, SINKS: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The last tiles of a row see the most keys under a causal mask: they go first.
    slot = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    wide = head.to(tl.int64)
    kv_head = wide // group
    row, begin, queries, tile = _find_row(starts, slot, rows, BLOCK_M)
    first = tile * BLOCK_M
    if first >= queries:
        return
    if PAGE:
        keys = tl.load(lengths + row)
        key_begin = 0
    else:
        key_begin = tl.load(key_starts + row).to(tl.int64)
        keys = (tl.load(key_starts + row + 1) - key_begin).to(tl.int32)
    offset = keys - queries  # position of the first query among the keys
    m = first + tl.arange(0, BLOCK_M)
    inside = m < queries
    position = m + offset
    d = tl.arange(0, BLOCK_D)
    at = (begin + m).to(tl.int64)
    q = _load_rows(Q + wide * q_head, at, q_token, d, inside, DIM, BLOCK_D, True)
    K += key_begin * k_token + kv_head * k_head
    V += key_begin * v_token + kv_head * v_head
    table += row.to(tl.int64) * table_row

    last = tl.minimum(first + BLOCK_M, queries) - 1 + offset
    k_begin, whole_begin, whole_end, k_end = _key_range(
        first + offset, last, keys, window, BLOCK_N, CAUSAL, WINDOW
    )
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if WINDOW:
        acc, total, top = _forward_keys(
            acc, total, top, q, k_begin, whole_begin, position, keys, K, V, k_token, v_token, table,
            page_k, page_v, head, scale, softcap, window, slopes, relative, reach,
            CAUSAL, WINDOW, SOFTCAP, ALIBI, RELATIVE, PAGE, DIM, BLOCK_D, BLOCK_N, True,
        )  # fmt: skip
    acc, total, top = _forward_keys(
        acc, total, top, q, whole_begin, whole_end, position, keys, K, V, k_token, v_token, table,
        page_k, page_v, head, scale, softcap, window, slopes, relative, reach,
        CAUSAL, WINDOW, SOFTCAP, ALIBI, RELATIVE, PAGE, DIM, BLOCK_D, BLOCK_N, False,
    )  # fmt: skip
    acc, total, top = _forward_keys(
        acc, total, top, q, whole_end, k_end, position, keys, K, V, k_token, v_token, table,
        page_k, page_v, head, scale, softcap, window, slopes, relative, reach,
        CAUSAL, WINDOW, SOFTCAP, ALIBI, RELATIVE, PAGE, DIM, BLOCK_D, BLOCK_N, True,
    )  # fmt: skip

    if SINKS:
        # One more key, without a value: from here on it is part of the sum, and of what backward passes read.
        sink = tl.load(sinks + head).to(tl.float32) * _LOG2E
        above = tl.maximum(top, sink)
        fade = tl.exp2(top - above)
        total = total * fade + tl.exp2(sink - above)
        acc = acc * fade[:, None]
        top = above
    some = total > 0
    acc = tl.where(some[:, None], acc / tl.where(some, total, 1.0)[:, None], 0.0)
    out = OUT + wide * o_head + at[:, None] * o_token + d[None, :]
    tl.store(out, acc.to(OUT.dtype.element_ty), mask=inside[:, None] & (d < DIM)[None, :])
    # +inf where nothing was seen: the backward pass then finds weights of zero.
    lse = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("inf"))
    tl.store(LSE + wide * tokens + at, lse, mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
def _add_sinks(
    OUT, LSE, WITH, sinks, tokens, o_token, o_head,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Attention as it is with sinks, in place, from what it is without. The sums go into another tensor: the
    warps of a program that share a row each read its sum, and not all before one of them has written."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = m < tokens
    lse = tl.load(LSE + head * tokens + m, mask=inside, other=0.0)
    sink = tl.load(sinks + head).to(tl.float32) * _LOG2E
    lse = tl.where(lse == float("inf"), float("-inf"), lse)  # a query that has seen nothing
    above = tl.maximum(lse, sink)
    whole = above + tl.log2(tl.exp2(lse - above) + tl.exp2(sink - above))
    tl.store(WITH + head * tokens + m, whole, mask=inside)
    at = OUT + head * o_head + m.to(tl.int64)[:, None] * o_token + d[None, :]
    there = inside[:, None] & (d < DIM)[None, :]
    out = tl.load(at, mask=there, other=0.0).to(tl.float32) * tl.exp2(lse - whole)[:, None]
    tl.store(at, out.to(OUT.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=_COUNTS)
def _delta(
    OUT, DO, DELTA, tokens, o_token, o_head, do_token, do_head,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Row sums of `out * dout`: `[heads, tokens]`."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    wide = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = m < tokens
    at = m.to(tl.int64)
    out = _load_rows(OUT + wide * o_head, at, o_token, d, inside, DIM, BLOCK_D, True)
    do = _load_rows(DO + wide * do_head, at, do_token, d, inside, DIM, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + wide * tokens + at, delta, mask=inside)


@triton.jit(do_not_specialize=_COUNTS)
def _statistics(
    OUT, DO, LSE, LSE_TILES, DELTA_TILES, starts, tokens, rows, o_token, o_head, do_token, do_head,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """LSE and row sums of `out * dout` laid out by grid slots, `[heads, slots * BLOCK_M]`: Hopper's copy
    engine reads from addresses in units of 16 bytes, and rows begin anywhere. +inf and 0 past a row's end."""
    slot = tl.program_id(0)
    wide = tl.program_id(1).to(tl.int64)
    _row, begin, queries, tile = _find_row(starts, slot, rows, BLOCK_M)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = m < queries
    d = tl.arange(0, BLOCK_D)
    at = (begin + m).to(tl.int64)
    out = _load_rows(OUT + wide * o_head, at, o_token, d, inside, DIM, BLOCK_D, True)
    do = _load_rows(DO + wide * do_head, at, do_token, d, inside, DIM, BLOCK_D, True)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    lse = tl.load(LSE + wide * tokens + at, mask=inside, other=float("inf"))
    to = (wide * tl.num_programs(0) + slot) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(LSE_TILES + to, lse)
    tl.store(DELTA_TILES + to, delta)


@triton.jit
def _backward_keys(
    dq, q, do, lse, delta, begin, end, position, keys, K, V, k_stride, v_stride, head,
    scale, softcap, window, slopes, relative, d_relative, reach, inside,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    RELATIVE: tl.constexpr, D_RELATIVE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds to `dq` (short of the scale) what the keys `[begin, end)` give."""
    d = tl.arange(0, BLOCK_D)
    for n0 in tl.range(begin, end, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        valid = n < keys
        at = n.to(tl.int64)
        k = _load_rows(K, at, k_stride, d, valid, DIM, BLOCK_D, MASKED)
        v = _load_rows(V, at, v_stride, d, valid, DIM, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k))
        dp = tl.dot(do, tl.trans(v))
        ahead = n[None, :] - position[:, None]
        slack = 1.0
        if SOFTCAP:
            t = _tanh(s * (scale / (softcap * _LOG2E)))
            s = softcap * _LOG2E * t
            slack = 1.0 - t * t
        else:
            s = s * scale
        s = _add_bias(s, ahead, head, slopes, relative, reach, ALIBI, RELATIVE)
        p = tl.exp2(s - lse[:, None])
        if MASKED:
            p = tl.where(valid[None, :] & _seen(ahead, window, CAUSAL, WINDOW), p, 0.0)
        ds = p * (dp - delta[:, None])
        if D_RELATIVE:
            bucket = tl.minimum(tl.maximum(ahead, -reach), reach) + reach
            tl.atomic_add(
                d_relative + head * (2 * reach + 1) + bucket, ds, mask=inside[:, None] & valid[None, :]
            )
        if SOFTCAP:
            ds *= slack
        dq = tl.dot(ds.to(k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=_COUNTS)
def _backward_dq(
    Q, K, V, DO, LSE, DELTA, DQ, starts, key_starts, slopes, relative, d_relative,
    tokens, rows, group, window, reach, scale, softcap, true_scale,
    q_token, q_head, k_token, k_head, v_token, v_head, do_token, do_head, dq_token, dq_head,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    RELATIVE: tl.constexpr, D_RELATIVE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    slot = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    wide = head.to(tl.int64)
    kv_head = wide // group
    row, begin, queries, tile = _find_row(starts, slot, rows, BLOCK_M)
    first = tile * BLOCK_M
    if first >= queries:
        return
    key_begin = tl.load(key_starts + row).to(tl.int64)
    keys = (tl.load(key_starts + row + 1) - key_begin).to(tl.int32)
    offset = keys - queries
    m = first + tl.arange(0, BLOCK_M)
    inside = m < queries
    position = m + offset
    d = tl.arange(0, BLOCK_D)
    at = (begin + m).to(tl.int64)
    q = _load_rows(Q + wide * q_head, at, q_token, d, inside, DIM, BLOCK_D, True)
    do = _load_rows(DO + wide * do_head, at, do_token, d, inside, DIM, BLOCK_D, True)
    stat = wide * tokens + at
    lse = tl.load(LSE + stat, mask=inside, other=float("inf"))
    delta = tl.load(DELTA + stat, mask=inside, other=0.0)
    K += key_begin * k_token + kv_head * k_head
    V += key_begin * v_token + kv_head * v_head
    last = tl.minimum(first + BLOCK_M, queries) - 1 + offset
    k_begin, whole_begin, whole_end, k_end = _key_range(
        first + offset, last, keys, window, BLOCK_N, CAUSAL, WINDOW
    )
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if WINDOW:
        dq = _backward_keys(
            dq, q, do, lse, delta, k_begin, whole_begin, position, keys, K, V, k_token, v_token, head,
            scale, softcap, window, slopes, relative, d_relative, reach, inside,
            CAUSAL, WINDOW, SOFTCAP, ALIBI, RELATIVE, D_RELATIVE, DIM, BLOCK_D, BLOCK_N, True,
        )  # fmt: skip
    dq = _backward_keys(
        dq, q, do, lse, delta, whole_begin, whole_end, position, keys, K, V, k_token, v_token, head,
        scale, softcap, window, slopes, relative, d_relative, reach, inside,
        CAUSAL, WINDOW, SOFTCAP, ALIBI, RELATIVE, D_RELATIVE, DIM, BLOCK_D, BLOCK_N, False,
    )  # fmt: skip
    dq = _backward_keys(
        dq, q, do, lse, delta, whole_end, k_end, position, keys, K, V, k_token, v_token, head,
        scale, softcap, window, slopes, relative, d_relative, reach, inside,
        CAUSAL, WINDOW, SOFTCAP, ALIBI, RELATIVE, D_RELATIVE, DIM, BLOCK_D, BLOCK_N, True,
    )  # fmt: skip
    out = DQ + wide * dq_head + at[:, None] * dq_token + d[None, :]
    dq *= true_scale
    tl.store(out, dq.to(DQ.dtype.element_ty), mask=inside[:, None] & (d < DIM)[None, :])


@triton.jit
def _backward_queries(
    dk, dv, k, v, begin, end, n, offset, queries, first_head, heads, Q, DO, LSE, DELTA, tokens,
    q_token, q_head, do_token, do_head, scale, softcap, window, slopes, relative, reach,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    RELATIVE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Adds to `dk` (short of the scale) and `dv` what the queries `[begin, end)` of `heads` heads give."""
    d = tl.arange(0, BLOCK_D)
    blocks = tl.cdiv(end - begin, BLOCK_M)
    for i in tl.range(0, heads * blocks):  # one flat loop: loads run ahead from one head into the next
        head = first_head + i // blocks
        m = begin + i % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = m < queries
        at = m.to(tl.int64)
        q = _load_rows(Q + head * q_head, at, q_token, d, inside, DIM, BLOCK_D, MASKED)
        if MASKED:
            lse = tl.load(LSE + head * tokens + m, mask=inside, other=float("inf"))
            delta = tl.load(DELTA + head * tokens + m, mask=inside, other=0.0)
        else:
            lse = tl.load(LSE + head * tokens + m)
            delta = tl.load(DELTA + head * tokens + m)
        s = tl.dot(k, tl.trans(q))
        do = _load_rows(DO + head * do_head, at, do_token, d, inside, DIM, BLOCK_D, MASKED)
        dp = tl.dot(v, tl.trans(do))
        ahead = n[:, None] - (m + offset)[None, :]
        slack = 1.0
        if SOFTCAP:
            t = _tanh(s * (scale / (softcap * _LOG2E)))
            s = softcap * _LOG2E * t
            slack = 1.0 - t * t
        else:
            s = s * scale
        s = _add_bias(s, ahead, head, slopes, relative, reach, ALIBI, RELATIVE)
        p = tl.exp2(s - lse[None, :])
        if MASKED:
            # Keys past the row's end spoil only their own rows of dk and dv, which are not stored.
            p = tl.where(_seen(ahead, window, CAUSAL, WINDOW), p, 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv)
        ds = p * (dp - delta[None, :])
        if SOFTCAP:
            ds *= slack
        dk = tl.dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=_COUNTS)
def _backward_dkdv(
    Q, K, V, DO, LSE, DELTA, DK, DV, starts, key_starts, slopes, relative,
    tokens, rows, group, split, window, reach, scale, softcap, true_scale,
    q_token, q_head, k_token, k_head, v_token, v_head, do_token, do_head, dk_split, dk_token, dk_head,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    RELATIVE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of keys; the query heads of part `program_id(2)` of its group, `split` heads a part. `dk`
    and `dv` are laid out alike."""
    kv_head = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    # The first keys of a row are seen by the most queries under a causal mask: they go first.
    row, key_begin, keys, tile = _find_row(key_starts, tl.program_id(0), rows, BLOCK_N)
    first = tile * BLOCK_N
    if first >= keys:
        return
    begin = tl.load(starts + row)
    queries = tl.load(starts + row + 1) - begin
    offset = keys - queries
    n = first + tl.arange(0, BLOCK_N)
    valid = n < keys
    d = tl.arange(0, BLOCK_D)
    at = (key_begin + n).to(tl.int64)
    k = _load_rows(K + kv_head * k_head, at, k_token, d, valid, DIM, BLOCK_D, True)
    v = _load_rows(V + kv_head * v_head, at, v_token, d, valid, DIM, BLOCK_D, True)

    # Queries that see some of these keys, [m_begin, m_end), and those in whole blocks that see all of them.
    last = tl.minimum(first + BLOCK_N, keys) - 1
    m_begin = 0
    m_end = queries
    whole_begin = 0
    whole_end = queries
    if CAUSAL:
        m_begin = tl.maximum(first - offset, 0)
        whole_begin = tl.maximum(last - offset, 0)
    if WINDOW:
        m_end = tl.minimum(queries, last - offset + window)
        whole_end = tl.minimum(queries, first - offset + window)
        if not CAUSAL:
            m_begin = tl.maximum(first - offset - window + 1, 0)
            whole_begin = tl.maximum(last - offset - window + 1, 0)
    m_begin = m_begin // BLOCK_M * BLOCK_M
    m_end = tl.maximum(m_end, m_begin)
    whole_begin = tl.minimum(tl.cdiv(whole_begin, BLOCK_M), tl.cdiv(m_end, BLOCK_M)) * BLOCK_M
    whole_end = tl.maximum(tl.maximum(whole_end, 0) // BLOCK_M * BLOCK_M, whole_begin)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first_head = kv_head * group + part * split
    heads = tl.minimum(split, group - part * split)
    Q += begin.to(tl.int64) * q_token
    DO += begin.to(tl.int64) * do_token
    LSE += begin
    DELTA += begin
    if CAUSAL or WINDOW:
        dk, dv = _backward_queries(
            dk, dv, k, v, m_begin, whole_begin, n, offset, queries, first_head, heads, Q, DO, LSE, DELTA,
            tokens, q_token, q_head, do_token, do_head, scale, softcap, window, slopes, relative, reach,
            CAUSAL, WINDOW, SOFTCAP, ALIBI, RELATIVE, DIM, BLOCK_D, BLOCK_M, True,
        )  # fmt: skip
    dk, dv = _backward_queries(
        dk, dv, k, v, whole_begin, whole_end, n, offset, queries, first_head, heads, Q, DO, LSE, DELTA,
        tokens, q_token, q_head, do_token, do_head, scale, softcap, window, slopes, relative, reach,
        CAUSAL, WINDOW, SOFTCAP, ALIBI, RELATIVE, DIM, BLOCK_D, BLOCK_M, False,
    )  # fmt: skip
    dk, dv = _backward_queries(
        dk, dv, k, v, whole_end, m_end, n, offset, queries, first_head, heads, Q, DO, LSE, DELTA,
        tokens, q_token, q_head, do_token, do_head, scale, softcap, window, slopes, relative, reach,
        CAUSAL, WINDOW, SOFTCAP, ALIBI, RELATIVE, DIM, BLOCK_D, BLOCK_M, True,
    )  # fmt: skip
    where = tl.cast(part, tl.int64) * dk_split + kv_head * dk_head + at[:, None] * dk_token + d[None, :]
    keep = valid[:, None] & (d < DIM)[None, :]
    tl.store(DK + where, (dk * true_scale).to(DK.dtype.element_ty), mask=keep)
    tl.store(DV + where, dv.to(DV.dtype.element_ty), mask=keep)


# Host side.

# Tiles by head dim (the next power of two): queries, keys, warps, stages. Those for Hopper were measured on
# an H100; the others fit about 100 KiB of shared memory, what the smallest devices (8.6, 8.9, 12.x) have.
_TILES = {
    "forward": {
        16: (128, 64, 4, 2),
        32: (128, 64, 4, 2),
        64: (128, 64, 8, 2),
        128: (128, 64, 8, 2),
        256: (64, 64, 8, 1),
    },
    "dq": {
        16: (64, 64, 4, 2),
        32: (64, 64, 4, 2),
        64: (128, 64, 8, 2),
        128: (64, 32, 4, 2),
        256: (32, 32, 4, 1),
    },
    "dkdv": {
        16: (64, 64, 4, 2),
        32: (64, 64, 4, 2),
        64: (64, 64, 4, 2),
        128: (32, 64, 4, 2),
        256: (32, 32, 4, 1),
    },
}
_TILES_HOPPER = {
    "forward": {
        16: (128, 64, 4, 3),
        32: (128, 64, 4, 3),
        64: (128, 64, 8, 3),
        128: (128, 64, 8, 3),
        256: (128, 64, 8, 2),
    },
    "dq": {
        16: (64, 64, 4, 3),
        32: (64, 64, 4, 3),
        64: (64, 64, 4, 3),
        128: (64, 64, 4, 2),
        256: (64, 32, 4, 1),
    },
    "dkdv": {
        16: (64, 64, 4, 3),
        32: (64, 64, 4, 3),
        64: (64, 64, 4, 3),
        128: (32, 64, 4, 3),
        256: (64, 64, 8, 1),
    },
}


def block_dim(dim: int) -> int:
    """The power of two that a head dim is padded to on the chip."""
    return max(16, triton.next_power_of_2(dim))


def _launch(
    kernel, grid: tuple[int, ...], tile: tuple[int, int, int, int], dim: int, arguments, **flags
) -> None:
    if 0 in grid:
        return
    block_m, block_n, warps, stages = tile
    kernel[grid](
        *arguments,
        **flags,
        DIM=dim,
        BLOCK_D=block_dim(dim),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=stages,
    )


def _tile(kernel: str, q: Tensor) -> tuple[int, int, int, int]:
    tiles = _TILES_HOPPER if flash_hopper.is_hopper(q.device) else _TILES
    return tiles[kernel][block_dim(q.shape[2])]


def _rows_apart(t: Tensor) -> Tensor:
    """`t` itself if its last dimension is dense, which the kernels need."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _flags(causal: bool, window: int, softcap: float, slopes: Tensor | None, relative: Tensor | None) -> dict:
    return {
        "CAUSAL": causal,
        "WINDOW": window >= 0,
        "SOFTCAP": softcap > 0,
        "ALIBI": slopes is not None,
        "RELATIVE": relative is not None,
    }


def _reach(relative: Tensor | None) -> int:
    return 0 if relative is None else relative.shape[1] // 2


def _forward_pass(
    q, k, v, starts, key_starts, table, lengths, slopes, relative, sinks, scale, causal, window, softcap,
    longest,
):  # fmt: skip
    """Attention, and the base-2 logarithms `[heads, tokens]` of the sums of weights. `window` -1: none."""
    q, k, v = _rows_apart(q), _rows_apart(k), _rows_apart(v)
    tokens, heads, dim = q.shape
    rows = starts.shape[0] - 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    paged = table is not None
    if not paged and flash_hopper.accepts(q, k, v, relative):
        flash_hopper.forward(
            q, k, v, out, lse, starts, key_starts, slopes, scale * LOG2E, causal, window, softcap, longest
        )  # fmt: skip
        if sinks is not None and tokens:
            without, lse = lse, torch.empty_like(lse)
            _add_sinks[(triton.cdiv(tokens, 64), heads)](
                out, without, lse, sinks, tokens, out.stride(0), out.stride(1), DIM=dim,
                BLOCK_D=block_dim(dim), BLOCK_M=64,
            )  # fmt: skip
        return out, lse
    tile = _tile("forward", q)
    _launch(
        _forward,
        (tokens // tile[0] + rows, heads) if tokens else (0,),
        tile,
        dim,
        (
            q, k, v, out, lse, starts, key_starts, table if paged else starts, lengths if paged else starts,
            slopes, relative, sinks, tokens, rows, heads // k.shape[-2], window, _reach(relative),
            scale * LOG2E, softcap, q.stride(0), q.stride(1), k.stride(-3), k.stride(-2), v.stride(-3),
            v.stride(-2), out.stride(0), out.stride(1), k.stride(0), v.stride(0),
            table.stride(0) if paged else 0,
        ),
        PAGE=k.shape[1] if paged else 0,
        SINKS=sinks is not None,
        **_flags(causal, window, softcap, slopes, relative),
    )  # fmt: skip
    return out, lse


def _backward_pass(
    do, q, k, v, out, lse, starts, key_starts, slopes, relative, sinks, scale, causal, window, softcap,
    longest, d_relative,
):  # fmt: skip
    """Gradients of q, k, v and, if `d_relative`, of the relative bias, and of the sinks (empty where there
    are none). That of the bias is summed with atomics; the others are the same bit for bit every time."""
    do, q, k, v = (_rows_apart(t) for t in (do, q, k, v))
    tokens, heads, dim = q.shape
    keys, kv_heads = k.shape[:2]
    rows, group = starts.shape[0] - 1, heads // kv_heads
    flags = _flags(causal, window, softcap, slopes, relative)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d_bias = torch.zeros(relative.shape if d_relative else (0,), dtype=torch.float32, device=q.device)
    d_sinks = torch.empty(0, dtype=torch.float32, device=q.device)
    if sinks is not None:
        # What a sink's weight takes from each query's output, which has no part of its own in it.
        weights = torch.exp2(sinks.float()[:, None] * LOG2E - lse)
        d_sinks = -(weights * _row_sums(out, do)).sum(1)
    hopper = (
        flash_hopper.accepts(q, k, v, relative)
        and flash_hopper.accepts(do, k, v, relative)
        and flash_hopper_backward.accepts(q, softcap)
    )
    if hopper:
        slots = tokens // flash_hopper_backward.SLOT + rows
        stats = torch.empty(
            2, heads, slots * flash_hopper_backward.SLOT, dtype=torch.float32, device=q.device
        )
        _statistics[(slots, heads)](
            out, do, lse, *stats, starts, tokens, rows, out.stride(0), out.stride(1), do.stride(0),
            do.stride(1), DIM=dim, BLOCK_D=block_dim(dim), BLOCK_M=SLOT,
        )  # fmt: skip
        flash_hopper_backward.dq(
            q, k, v, do, *stats, dq, starts, key_starts, slopes, scale * LOG2E, scale, causal, window
        )  # fmt: skip
    else:
        delta = _row_sums(out, do)
        tile = _tile("dq", q)
        _launch(
            _backward_dq,
            (tokens // tile[0] + rows, heads) if tokens else (0,),
            tile,
            dim,
            (
                q, k, v, do, lse, delta, dq, starts, key_starts, slopes, relative, d_bias, tokens, rows,
                group, window, _reach(relative), scale * LOG2E, softcap, scale, q.stride(0), q.stride(1),
                k.stride(0), k.stride(1), v.stride(0), v.stride(1), do.stride(0), do.stride(1), dq.stride(0),
                dq.stride(1),
            ),
            D_RELATIVE=d_relative,
            **flags,
        )  # fmt: skip

    # The query heads of a group are summed inside a program; where that would leave multiprocessors idle
    # (few key heads), a group is split into parts and those are summed afterwards.
    tile = _tile("dkdv", q)
    tiles = keys // (128 if hopper else tile[1]) + rows
    wanted = triton.cdiv(2 * multiprocessors(q.device), max(tiles * kv_heads, 1))
    split = triton.cdiv(group, min(group, wanted))
    parts = triton.cdiv(group, split)
    shape = (parts, keys, kv_heads, dim)
    dk, dv = (
        torch.empty(shape, dtype=torch.float32 if parts > 1 else k.dtype, device=k.device) for _ in range(2)
    )
    if hopper:
        flash_hopper_backward.dkdv(
            q, k, v, do, *stats, dk, dv, starts, key_starts, slopes, split, scale * LOG2E, scale, causal,
            window,
        )  # fmt: skip
    else:
        _launch(
            _backward_dkdv,
            (tiles, kv_heads, parts) if keys else (0,),
            tile,
            dim,
            (
                q, k, v, do, lse, delta, dk, dv, starts, key_starts, slopes, relative, tokens, rows, group,
                split, window, _reach(relative), scale * LOG2E, softcap, scale, q.stride(0), q.stride(1),
                k.stride(0), k.stride(1), v.stride(0), v.stride(1), do.stride(0), do.stride(1), dk.stride(0),
                dk.stride(1), dk.stride(2),
            ),
            **flags,
        )  # fmt: skip
    dk, dv = (t[0] if parts == 1 else t.sum(0).to(k.dtype) for t in (dk, dv))
    return dq, dk, dv, d_bias, d_sinks


def _row_sums(out: Tensor, do: Tensor) -> Tensor:
    """Sums of `out * do` over the head dim, float32 `[heads, tokens]`."""
    tokens, heads, dim = out.shape
    delta = torch.empty(heads, tokens, dtype=torch.float32, device=out.device)
    if tokens:
        _delta[(triton.cdiv(tokens, 64), heads)](
            out, do, delta, tokens, out.stride(0), out.stride(1), do.stride(0), do.stride(1),
            DIM=dim, BLOCK_D=block_dim(dim), BLOCK_M=64,
        )  # fmt: skip
    return delta


def _remember(ctx, inputs, output) -> None:
    q, k, v, starts, key_starts, table, _, slopes, relative, sinks, *ctx.scoring = inputs
    ctx.paged = table is not None
    ctx.save_for_backward(q, k, v, *output, starts, key_starts, slopes, relative, sinks)


def _differentiate(ctx, do: Tensor, backward_pass: Callable) -> tuple[Tensor | None, ...]:
    if ctx.paged:
        raise RequestError(
            "attention over cache pages has no backward pass; pass the keys and values themselves"
        )
    q, k, v, out, lse, starts, key_starts, slopes, relative, sinks = ctx.saved_tensors
    d_relative = ctx.needs_input_grad[8]
    dq, dk, dv, d_bias, d_sinks = backward_pass(
        do, q, k, v, out, lse, starts, key_starts, slopes, relative, sinks, *ctx.scoring, d_relative
    )
    d_bias = d_bias.to(relative.dtype) if d_relative else None
    d_sinks = d_sinks.to(sinks.dtype) if ctx.needs_input_grad[9] else None
    return dq, dk, dv, None, None, None, None, None, d_bias, d_sinks, None, None, None, None, None


class _Attention(torch.autograd.Function):
    """The op outside of `torch.compile`. It has no `setup_context`, whose way of passing arguments would
    take longer on the host than the launch."""

    @staticmethod
    def forward(ctx, *call) -> Tensor:
        output = _forward_pass(*call)
        _remember(ctx, call, output)
        return output[0]

    @staticmethod
    def backward(ctx, do: Tensor):
        return _differentiate(ctx, do, _backward_pass)


# The same inside `torch.compile`, which looks at operators from the outside only. Called directly they would
# cost as much time on the host as all the rest of a launch.
_forward_op = torch.library.custom_op(
    "taut::flash_forward",
    _forward_pass,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor key_starts, Tensor? table, Tensor? lengths, "
    "Tensor? slopes, Tensor? relative, Tensor? sinks, float scale, bool causal, int window, float softcap, "
    "SymInt longest) -> (Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    "taut::flash_backward",
    _backward_pass,
    mutates_args=(),
    schema="(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor starts, "
    "Tensor key_starts, Tensor? slopes, Tensor? relative, Tensor? sinks, float scale, bool causal, "
    "int window, float softcap, SymInt longest, bool d_relative) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_forward_op.register_autograd(
    lambda ctx, do, _: _differentiate(ctx, do, _backward_op), setup_context=_remember
)


@_forward_op.register_fake
def _(
    q, k, v, starts, key_starts, table, lengths, slopes, relative, sinks, scale, causal, window, softcap,
    longest,
):  # fmt: skip
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@_backward_op.register_fake
def _(
    do, q, k, v, out, lse, starts, key_starts, slopes, relative, sinks, scale, causal, window, softcap,
    longest, d_relative,
):  # fmt: skip
    d_bias = q.new_empty(relative.shape if d_relative else (0,), dtype=torch.float32)
    d_sinks = q.new_empty((0,) if sinks is None else sinks.shape, dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_bias, d_sinks


def why_not(q: Tensor, scoring: Scoring) -> str | None:
    """Why these kernels do not take queries `q` `[tokens, heads, head_dim]`; None if they do."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    if not 1 <= q.shape[2] <= 256:
        return f"takes head dims up to 256, not {q.shape[2]}"
    if scoring.scale <= 0:
        return f"wants a scale above 0, not {scoring.scale}"
    if not q.is_cuda:
        return f"runs on NVIDIA GPUs, and the queries are on {q.device.type}"
    if (capability := torch.cuda.get_device_capability(q.device)) < (8, 0):
        return f"needs compute capability 8.0, and this device has {capability[0]}.{capability[1]}"
    return None


def flash_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    starts: Tensor,
    longest: int,
    scoring: Scoring,
    pages: Pages | None = None,
    key_starts: Tensor | None = None,
) -> Tensor:
    """Attention of packed queries, exact and with memory linear in the tokens.

    `q` `[tokens, heads, head_dim]` in float16 or bfloat16; `k`, `v` `[keys, kv_heads, head_dim]`; `starts`
    `[rows + 1]` int32 the row boundaries of the queries, which cover all tokens; `longest`: a bound on the
    queries of a row; `key_starts`: the boundaries of the keys where they differ (cross attention). A row's
    queries are the last positions of its keys. With `pages` the keys are there, and there is no backward
    pass. Head `h` reads key head `h // (heads / kv_heads)`. Gives `[tokens, heads, head_dim]`; a query that
    sees no key gives zeros.
    """
    if pages is not None:
        k, v = pages.keys, pages.values
    heads, kv_heads = q.shape[1], k.shape[-2]
    if heads % kv_heads or k.shape != v.shape or k.shape[-1] != q.shape[2]:
        raise RequestError(
            f"queries {list(q.shape)} do not fit keys {list(k.shape)} and values {list(v.shape)}: the head "
            "dims must be equal and the heads a multiple of the key heads"
        )
    window = -1 if scoring.window is None else scoring.window
    if key_starts is None and window >= (longest if pages is None else pages.longest):
        window = -1  # no key is that far away
    call = (
        q,
        k,
        v,
        starts,
        starts if key_starts is None else key_starts,
        None if pages is None else pages.table,
        None if pages is None else pages.lengths,
        scoring.slopes,
        scoring.relative,
        scoring.sinks,
        float(scoring.scale),
        scoring.causal,
        window,
        scoring.softcap or 0.0,
        longest,
    )
    if torch.compiler.is_compiling():
        return _forward_op(*call)[0]
    learned = (q, k, v, scoring.relative, scoring.sinks)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in learned):
        return _Attention.apply(*call)
    return _forward_pass(*call)[0]
