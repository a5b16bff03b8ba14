"""The backward pass of FlashAttention for Hopper in Gluon, the same bit for bit every time.

Two kernels, one over tiles of queries (dq) and one over tiles of keys (dk, dv), so that no sum is shared
between programs. In each, one warp loads tiles with the bulk copy engine and two warpgroups multiply.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from taut.kernels.flash_hopper import _LOG2E, _clear_rows, _describe, _find_row, _key_blocks

SLOT = 128  # Statistics of queries are laid out by grid slots of this many, each row from a slot of its own.
_COUNTS = ("width", "rows", "group", "split", "window", "starts", "key_starts")
_SLOT = gl.constexpr(SLOT)


@gluon.jit
def _visible(ahead, window, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """By key position - query position; keys outside the row aside."""
    if CAUSAL:
        seen = ahead <= 0
    elif WINDOW:
        seen = ahead < window
    else:
        seen = ahead == ahead
    if WINDOW:
        seen = seen & (ahead > -window)
    return seen


@gluon.jit
def _store_rows(out, values, smem, at, stride, valid_rows, ROWS: gl.constexpr, D: gl.constexpr):
    """Write `values` through `smem` to rows of `out` from `at` on, as many as are valid, in whole sectors."""
    W: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    smem.store(values.to(smem.dtype))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, W))
    column = gl.arange(0, D, gl.SliceLayout(0, W))
    where = (at + row).to(gl.int64)[:, None] * stride + column[None, :]
    gl.store(out + where, smem.load(W), mask=(row < valid_rows)[:, None])


# Queries: dq.


@gluon.jit
def _load_for_dq(
    descs, smem, bars, q_at, k_at, columns, first_block, blocks,
    ROWS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_desc, do_desc, k_desc, v_desc = descs
    q_smem, do_smem, k_smem, v_smem = smem
    q_full, k_full, k_empty, v_full, v_empty = bars
    q_column, k_column = columns
    mbarrier.expect(q_full, 4 * q_desc.block_type.nbytes, pred=blocks > 0)
    for wg in gl.static_range(2):
        at = [q_at + wg * ROWS, q_column]
        tma.async_copy_global_to_shared(q_desc, at, q_full, q_smem.index(wg), pred=blocks > 0)
        tma.async_copy_global_to_shared(do_desc, at, q_full, do_smem.index(wg), pred=blocks > 0)
    for i in range(blocks):
        stage = i % STAGES
        phase = i // STAGES & 1
        row = k_at + (first_block - i) * N
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [row, k_column], k_full.index(stage), k_smem.index(stage))
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, [row, k_column], v_full.index(stage), v_smem.index(stage))


@gluon.jit
def _dq_steps(
    dq, ds, smem, bars, lse, delta, begin, end, first_block, position, keys, window, slope, scale,
    WG: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, ALIBI: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Steps `begin` .. `end`; on entry and exit the product of the step before is under way."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    q_smem, do_smem, k_smem, v_smem = smem
    _, k_full, k_empty, v_full, v_empty = bars
    for i in range(begin, end):
        stage = i % STAGES
        phase = i // STAGES & 1
        zero = gl.zeros([ROWS, N], gl.float32, S)
        mbarrier.wait(k_full.index(stage), phase)
        if MASKED:
            keep = keys - (first_block - i) * N
            if keep < N:
                _clear_rows(k_smem.index(stage), keep, N, D)
        k = k_smem.index(stage).permute((1, 0))
        s = warpgroup_mma(q_smem.index(WG), k, zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(stage), phase)
        v = v_smem.index(stage).permute((1, 0))
        dp = warpgroup_mma(do_smem.index(WG), v, zero, use_acc=False, is_async=True)
        s, dq, ds = warpgroup_mma_wait(1, deps=(s, dq, ds))
        mbarrier.arrive(k_empty.index((i + STAGES - 1) % STAGES), count=1, pred=i > 0)
        n = (first_block - i) * N + gl.arange(0, N, gl.SliceLayout(0, S))
        ahead = n[None, :] - position[:, None]
        if ALIBI:
            p = gl.exp2(s * scale + (slope * ahead.to(gl.float32) - lse[:, None]))
        else:
            p = gl.exp2(s * scale - lse[:, None])
        dp = warpgroup_mma_wait(0, deps=(dp,))
        mbarrier.arrive(v_empty.index(stage), count=1)
        d_score = p * (dp - delta[:, None])
        if MASKED:
            seen = (n < keys)[None, :] & _visible(ahead, window, CAUSAL, WINDOW)
            d_score = gl.where(seen, d_score, 0.0)
        ds = gl.convert_layout(d_score.to(k_smem.dtype), P)
        dq = warpgroup_mma(ds, k_smem.index(stage), dq, is_async=True)
    return dq, ds


@gluon.jit
def _multiply_for_dq(
    smem, bars, out, lse, delta, slopes, scalars, blocks, WG: gl.constexpr, ROWS: gl.constexpr,
    N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    ALIBI: gl.constexpr,
):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    q_smem, _do, _k, _v = smem
    q_full, _k_full, _k_empty, _v_full, _v_empty = bars
    stat, head, token, first, queries, keys, window, scale, true_scale, out_token, out_head = scalars
    first_block, count, until_whole, until_masked = blocks

    m = first + WG * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S))
    position = m + (keys - queries)
    lse_rows = gl.load(lse + stat + m, mask=m < queries, other=float("inf"))
    delta_rows = gl.load(delta + stat + m, mask=m < queries, other=0.0)
    slope = 0.0
    if ALIBI:
        slope = gl.load(slopes + head) * _LOG2E
    dq = warpgroup_mma_init(gl.zeros([ROWS, D], gl.float32, ACC))
    ds = gl.zeros([ROWS, N], q_smem.dtype, P)
    if count > 0:
        mbarrier.wait(q_full, 0)
    dq, ds = _dq_steps(
        dq, ds, smem, bars, lse_rows, delta_rows, 0, until_whole, first_block, position, keys, window,
        slope, scale, WG, ROWS, N, D, STAGES, CAUSAL, WINDOW, ALIBI, True,
    )  # fmt: skip
    dq, ds = _dq_steps(
        dq, ds, smem, bars, lse_rows, delta_rows, until_whole, until_masked, first_block, position, keys,
        window, slope, scale, WG, ROWS, N, D, STAGES, CAUSAL, WINDOW, ALIBI, False,
    )  # fmt: skip
    if WINDOW:
        dq, ds = _dq_steps(
            dq, ds, smem, bars, lse_rows, delta_rows, until_masked, count, first_block, position, keys,
            window, slope, scale, WG, ROWS, N, D, STAGES, CAUSAL, WINDOW, ALIBI, True,
        )  # fmt: skip
    dq, ds = warpgroup_mma_wait(0, deps=(dq, ds))
    rows = first + WG * ROWS
    out += head.to(gl.int64) * out_head
    _store_rows(out, dq * true_scale, q_smem.index(WG), token + rows, out_token, queries - rows, ROWS, D)


@gluon.jit(do_not_specialize=_COUNTS)
def _dq(
    q_desc, do_desc, k_desc, v_desc, out, lse, delta, starts, key_starts, slopes, width, rows, group, window,
    scale, true_scale, out_token, out_head,
    ROWS: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, ALIBI: gl.constexpr,
):  # fmt: skip
    M: gl.constexpr = 2 * ROWS
    slot = gl.num_programs(0) - 1 - gl.program_id(0)
    head = gl.program_id(1)
    row, token, queries, tile = _find_row(starts, slot, rows, M)
    first = tile * M
    key = gl.load(key_starts + row)
    keys = gl.load(key_starts + row + 1) - key
    offset = keys - queries
    last = gl.minimum(first + M, queries) - 1 + offset
    begin, whole_begin, whole_end, end = _key_blocks(first + offset, last, keys, window, N, CAUSAL, WINDOW)
    if first >= queries:
        begin = 0
        whole_begin = 0
        whole_end = 0
        end = 0

    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2, ROWS, D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(q_desc.dtype, [2, ROWS, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, N, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, N, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()

    descs = (q_desc, do_desc, k_desc, v_desc)
    smem = (q_smem, do_smem, k_smem, v_smem)
    bars = (q_full, k_full, k_empty, v_full, v_empty)
    stat = head * width + (token // _SLOT + row) * _SLOT
    scalars = (stat, head, token, first, queries, keys, window, scale, true_scale, out_token, out_head)
    blocks = (end - 1, end - begin, end - whole_end, end - whole_begin)
    columns = (head * D, head // group * D)
    gl.warp_specialize(
        [
            (_multiply_for_dq, (smem, bars, out, lse, delta, slopes, scalars, blocks, 0, ROWS, N, D, STAGES,
                                CAUSAL, WINDOW, ALIBI)),
            (_multiply_for_dq, (smem, bars, out, lse, delta, slopes, scalars, blocks, 1, ROWS, N, D, STAGES,
                                CAUSAL, WINDOW, ALIBI)),
            (_load_for_dq, (descs, smem, bars, token + first, key, columns, end - 1, end - begin, ROWS, N,
                            STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


# Keys: dk and dv.


@gluon.jit
def _load_queries(
    descs, smem, bars, done, begin, end, first_head, heads, token, stat, width,
    M: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DK: gl.constexpr,
):  # fmt: skip
    """Blocks `begin` .. `end` of queries for each head; `done` steps came before."""
    q_desc, do_desc, lse_desc, delta_desc = descs
    q_smem, do_smem, lse_smem, delta_smem = smem
    q_full, do_full, empty = bars
    blocks = end - begin
    for j in range(heads * blocks):
        i = done + j
        stage = i % STAGES
        head = first_head + j // blocks
        m = (begin + j % blocks) * M
        at = token + m
        mbarrier.wait(empty.index(stage), i // STAGES & 1 ^ 1)
        mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes + lse_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [at, head * D], q_full.index(stage), q_smem.index(stage))
        stat_at = head * width + stat + m
        tma.async_copy_global_to_shared(lse_desc, [stat_at], q_full.index(stage), lse_smem.index(stage))
        if DK:
            mbarrier.expect(do_full.index(stage), do_desc.block_type.nbytes + delta_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                delta_desc, [stat_at], do_full.index(stage), delta_smem.index(stage)
            )
        else:
            mbarrier.expect(do_full.index(stage), do_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(do_desc, [at, head * D], do_full.index(stage), do_smem.index(stage))
    return done + heads * blocks


@gluon.jit
def _load_for_dkdv(
    descs, key_descs, smem, key_smem, bars, key_bar, blocks, first_head, heads, token, stat, width, k_at,
    k_column, ROWS: gl.constexpr, M: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, DK: gl.constexpr,
):  # fmt: skip
    k_desc, v_desc = key_descs
    k_smem, v_smem = key_smem
    begin, whole_begin, whole_end, end = blocks
    mbarrier.expect(key_bar, (4 if DK else 2) * k_desc.block_type.nbytes)
    for wg in gl.static_range(2):
        at = [k_at + wg * ROWS, k_column]
        tma.async_copy_global_to_shared(k_desc, at, key_bar, k_smem.index(wg))
        if DK:
            tma.async_copy_global_to_shared(v_desc, at, key_bar, v_smem.index(wg))
    done = _load_queries(
        descs, smem, bars, 0, begin, whole_begin, first_head, heads, token, stat, width, M, D, STAGES, DK
    )
    done = _load_queries(
        descs,
        smem,
        bars,
        done,
        whole_begin,
        whole_end,
        first_head,
        heads,
        token,
        stat,
        width,
        M,
        D,
        STAGES,
        DK,
    )
    _load_queries(
        descs, smem, bars, done, whole_end, end, first_head, heads, token, stat, width, M, D, STAGES, DK
    )


@gluon.jit
def _dkdv_steps(
    dk, dv, p, ds, smem, k, v, bars, done, begin, end, first_head, heads, n, offset, queries, window, slopes,
    scale, M: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, ALIBI: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Blocks `begin` .. `end` of queries for each head; on entry and exit the products of the step before
    are under way. Scores are held with keys down and queries across."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    ACROSS: gl.constexpr = gl.SliceLayout(0, S)
    q_smem, do_smem, lse_smem, delta_smem = smem
    q_full, do_full, empty = bars
    blocks = end - begin
    for j in range(heads * blocks):
        i = done + j
        stage = i % STAGES
        phase = i // STAGES & 1
        first = (begin + j % blocks) * M
        q = q_smem.index(stage)
        do = do_smem.index(stage)
        zero = gl.zeros([N, M], gl.float32, S)
        mbarrier.wait(q_full.index(stage), phase)
        if MASKED:
            mbarrier.wait(do_full.index(stage), phase)
            if first + M > queries:
                _clear_rows(q, queries - first, M, D)
                _clear_rows(do, queries - first, M, D)
        s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(do_full.index(stage), phase)
        if DK:
            dp = warpgroup_mma(v, do.permute((1, 0)), zero, use_acc=False, is_async=True)
            if DV:
                s, dk, dv, p, ds = warpgroup_mma_wait(1, deps=(s, dk, dv, p, ds))
            else:
                s, dk, ds = warpgroup_mma_wait(1, deps=(s, dk, ds))
        else:
            s, dv, p = warpgroup_mma_wait(0, deps=(s, dv, p))
        mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), count=1, pred=i > 0)
        m = first + gl.arange(0, M, ACROSS)
        ahead = n[:, None] - (m + offset)[None, :]
        lse = lse_smem.index(stage).load(ACROSS)
        if ALIBI:
            slope = gl.load(slopes + first_head + j // blocks) * _LOG2E
            weight = gl.exp2(s * scale + (slope * ahead.to(gl.float32) - lse[None, :]))
        else:
            weight = gl.exp2(s * scale - lse[None, :])
        if MASKED:
            seen = (m < queries)[None, :] & _visible(ahead, window, CAUSAL, WINDOW)
            weight = gl.where(seen, weight, 0.0)
        if DV:
            p = gl.convert_layout(weight.to(q_smem.dtype), P)
            dv = warpgroup_mma(p, do, dv, is_async=True)
        if DK:
            delta = delta_smem.index(stage).load(ACROSS)
            dp = warpgroup_mma_wait(1 if DV else 0, deps=(dp,))
            d_score = weight * (dp - delta[None, :])
            if MASKED:
                d_score = gl.where(seen, d_score, 0.0)
            ds = gl.convert_layout(d_score.to(q_smem.dtype), P)
            dk = warpgroup_mma(ds, q, dk, is_async=True)
    return dk, dv, p, ds, done + heads * blocks


@gluon.jit
def _multiply_for_dkdv(
    smem, key_smem, bars, key_bar, dk_out, dv_out, slopes, scalars, blocks, WG: gl.constexpr,
    ROWS: gl.constexpr, M: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, ALIBI: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    k_smem, v_smem = key_smem
    first_head, heads, keys_here, queries, window, scale, true_scale, out_token = scalars
    key, first, keys, offset = keys_here
    begin, whole_begin, whole_end, end = blocks
    k = k_smem.index(WG)
    v = v_smem.index(WG) if DK else k
    n = first + WG * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S))
    # Where only one of the two is asked for, the other stays a handful of registers.
    dk = warpgroup_mma_init(gl.zeros([ROWS, D], gl.float32, ACC)) if DK else 0
    dv = warpgroup_mma_init(gl.zeros([ROWS, D], gl.float32, ACC)) if DV else 0
    p = gl.zeros([ROWS, M], k_smem.dtype, P) if DV else 0
    ds = gl.zeros([ROWS, M], k_smem.dtype, P) if DK else 0
    mbarrier.wait(key_bar, 0)
    done = 0
    if CAUSAL or WINDOW:
        dk, dv, p, ds, done = _dkdv_steps(
            dk, dv, p, ds, smem, k, v, bars, done, begin, whole_begin, first_head, heads, n, offset, queries,
            window, slopes, scale, M, ROWS, D, STAGES, CAUSAL, WINDOW, ALIBI, DK, DV, True,
        )  # fmt: skip
    dk, dv, p, ds, done = _dkdv_steps(
        dk, dv, p, ds, smem, k, v, bars, done, whole_begin, whole_end, first_head, heads, n, offset, queries,
        window, slopes, scale, M, ROWS, D, STAGES, CAUSAL, WINDOW, ALIBI, DK, DV, False,
    )  # fmt: skip
    dk, dv, p, ds, done = _dkdv_steps(
        dk, dv, p, ds, smem, k, v, bars, done, whole_end, end, first_head, heads, n, offset, queries,
        window, slopes, scale, M, ROWS, D, STAGES, CAUSAL, WINDOW, ALIBI, DK, DV, True,
    )  # fmt: skip
    at = key + first + WG * ROWS
    left = keys - first - WG * ROWS
    if DK:
        dk, ds = warpgroup_mma_wait(0, deps=(dk, ds))
        dk = dk * true_scale
    if DV:
        dv, p = warpgroup_mma_wait(0, deps=(dv, p))
    if dk_out.dtype.element_ty == gl.float32:
        row = gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
        column = gl.arange(0, D, gl.SliceLayout(0, ACC))
        where = (at + row).to(gl.int64)[:, None] * out_token + column[None, :]
        if DK:
            gl.store(dk_out + where, dk, mask=(row < left)[:, None])
        if DV:
            gl.store(dv_out + where, dv, mask=(row < left)[:, None])
    else:
        if DK:
            _store_rows(dk_out, dk, k, at, out_token, left, ROWS, D)
        if DV:
            _store_rows(dv_out, dv, v, at, out_token, left, ROWS, D)


@gluon.jit(do_not_specialize=_COUNTS)
def _dkdv(
    q_desc, do_desc, lse_desc, delta_desc, k_desc, v_desc, dk_out, dv_out, starts, key_starts, slopes,
    width, rows, group, split, window, scale, true_scale, out_split, out_token, out_head,
    ROWS: gl.constexpr, M: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOW: gl.constexpr, ALIBI: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    N: gl.constexpr = 2 * ROWS
    kv_head = gl.program_id(1)
    part = gl.program_id(2)
    row, key, keys, tile = _find_row(key_starts, gl.program_id(0), rows, N)
    first = tile * N
    token = gl.load(starts + row)
    queries = gl.load(starts + row + 1) - token
    offset = keys - queries
    last = gl.minimum(first + N, keys) - 1

    # Blocks of queries that see some of these keys, [begin, end), and those whole and seeing all of them.
    begin = 0
    end = queries
    whole_begin = 0
    whole_end = queries
    if CAUSAL:
        begin = gl.maximum(first - offset, 0)
        whole_begin = gl.maximum(last - offset, 0)
    if WINDOW:
        end = gl.minimum(queries, last - offset + window)
        whole_end = gl.minimum(queries, first - offset + window)
        if not CAUSAL:
            begin = gl.maximum(first - offset - window + 1, 0)
            whole_begin = gl.maximum(last - offset - window + 1, 0)
    begin = begin // M
    end = gl.maximum((gl.maximum(end, 0) + M - 1) // M, begin)
    whole_begin = gl.minimum((whole_begin + M - 1) // M, end)
    whole_end = gl.maximum(gl.maximum(whole_end, 0) // M, whole_begin)
    heads = gl.minimum(split, group - part * split)
    if first >= keys:
        heads = 0

    q_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, M, D], q_desc.layout)
    do_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, M, D], q_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, M], lse_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, M], lse_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [2, ROWS, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(k_desc.dtype, [2, ROWS, D], k_desc.layout) if DK else k_smem
    key_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(key_bar, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()

    first_head = kv_head * group + part * split
    out_at = part.to(gl.int64) * out_split + kv_head.to(gl.int64) * out_head
    dk_out += out_at
    dv_out += out_at
    descs = (q_desc, do_desc, lse_desc, delta_desc)
    smem = (q_smem, do_smem, lse_smem, delta_smem)
    key_smem = (k_smem, v_smem)
    bars = (q_full, do_full, empty)
    blocks = (begin, whole_begin, whole_end, end)
    keys_here = (key, first, keys, offset)
    stat = (token // _SLOT + row) * _SLOT
    scalars = (first_head, heads, keys_here, queries, window, scale, true_scale, out_token)
    gl.warp_specialize(
        [
            (_multiply_for_dkdv, (smem, key_smem, bars, key_bar, dk_out, dv_out, slopes, scalars, blocks, 0,
                                  ROWS, M, D, STAGES, CAUSAL, WINDOW, ALIBI, DK, DV)),
            (_multiply_for_dkdv, (smem, key_smem, bars, key_bar, dk_out, dv_out, slopes, scalars, blocks, 1,
                                  ROWS, M, D, STAGES, CAUSAL, WINDOW, ALIBI, DK, DV)),
            (_load_for_dkdv, (descs, (k_desc, v_desc), smem, key_smem, bars, key_bar, blocks, first_head,
                              heads, token, stat, width, key + first, kv_head * D, ROWS, M, D, STAGES, DK)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


# By head dim: keys a block and stages of the kernel of dq; queries a block, stages and which of (dk, dv) of
# the launches of the other, which has no registers for both at head dim 256. Measured on an H100.
_DQ_TILES = {64: (128, 3), 128: (128, 2), 256: (32, 2)}
_DKDV_TILES = {
    64: ((128, 2, True, True),),
    128: ((64, 3, True, True),),
    256: ((32, 2, True, False), (64, 2, False, True)),
}


def accepts(q: Tensor, softcap: float) -> bool:
    """Whether `dq` and `dkdv` take what `flash_hopper.accepts` does."""
    return softcap == 0 and q.shape[0] * q.shape[1] < 2**30  # statistics are indexed by int32


def dq(
    q, k, v, do, lse, delta, out, starts, key_starts, slopes, scale, true_scale, causal, window, tile=None
) -> None:
    """Fill `out` with the gradient of q. `scale` is that of scores in units of log2; `lse` and `delta`
    `[heads, slots * SLOT]` hold each row's from slot `starts[row] // SLOT + row` on."""
    tokens, heads, dim = q.shape
    keys, stages = tile or _DQ_TILES[dim]
    rows = starts.shape[0] - 1
    _dq[(tokens // 128 + rows, heads)](
        _describe(q, 64),
        _describe(do, 64),
        _describe(k, keys),
        _describe(v, keys),
        out,
        lse,
        delta,
        starts,
        key_starts,
        slopes,
        lse.shape[1],
        rows,
        heads // k.shape[1],
        window,
        scale,
        true_scale,
        out.stride(0),
        out.stride(1),
        ROWS=64,
        N=keys,
        D=dim,
        STAGES=stages,
        CAUSAL=causal,
        WINDOW=window >= 0,
        ALIBI=slopes is not None,
        num_warps=4,
        maxnreg=168,
    )


def dkdv(
    q, k, v, do, lse, delta, dk, dv, starts, key_starts, slopes, split, scale, true_scale, causal, window,
    tiles=None,
) -> None:  # fmt: skip
    """Fill `dk`, `dv` `[parts, keys, kv_heads, head_dim]`, part p from `split` query heads of each group."""
    heads, dim = q.shape[1:]
    kv_heads = k.shape[1]
    rows = starts.shape[0] - 1
    for queries, stages, want_dk, want_dv in tiles or _DKDV_TILES[dim]:
        layout = gl.NVMMASharedLayout(0, 32, rank=1)
        stats = [TensorDescriptor(t, [t.numel()], [1], [queries], layout) for t in (lse, delta)]
        _dkdv[(k.shape[0] // 128 + rows, kv_heads, dk.shape[0])](
            _describe(q, queries),
            _describe(do, queries),
            *stats,
            _describe(k, 64),
            _describe(v, 64),
            dk,
            dv,
            starts,
            key_starts,
            slopes,
            lse.shape[1],
            rows,
            heads // kv_heads,
            split,
            window,
            scale,
            true_scale,
            *dk.stride()[:3],
            ROWS=64,
            M=queries,
            D=dim,
            STAGES=stages,
            CAUSAL=causal,
            WINDOW=window >= 0,
            ALIBI=slopes is not None,
            DK=want_dk,
            DV=want_dv,
            num_warps=4,
            maxnreg=168,
        )
