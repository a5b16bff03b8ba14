"""FlashAttention for Hopper in Gluon: one warp loads tiles with the bulk copy engine, warpgroups multiply.

The schedule is that of FlashAttention-3 (Shah et al. 2024): each warpgroup multiplies the next keys while it
takes the softmax of the last ones, and the warpgroups take turns at the matrix units.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_LOG2E = gl.constexpr(1.4426950408889634)
_COUNTS = ("tokens", "rows", "group", "window", "starts", "key_starts")


@gluon.jit
def _find_row(starts, slot, rows, BLOCK: gl.constexpr):
    """As in `flash`: row r owns the slots from `starts[r] // BLOCK + r` on."""
    low = 0
    high = rows
    while high - low > 1:
        middle = (low + high) // 2
        if gl.load(starts + middle) // BLOCK + middle <= slot:
            low = middle
        else:
            high = middle
    begin = gl.load(starts + low)
    return low, begin, gl.load(starts + low + 1) - begin, slot - (begin // BLOCK + low)


@gluon.jit
def _key_blocks(first, last, keys, window, BLOCK: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr):
    """Blocks of keys that queries at positions `first` .. `last` see, [begin, end), and those that every
    query sees whole, [whole_begin, whole_end)."""
    begin = 0
    whole_begin = 0
    end = keys
    whole_end = keys
    if CAUSAL:
        end = gl.minimum(end, last + 1)
        whole_end = gl.minimum(whole_end, first + 1)
    elif WINDOW:
        end = gl.minimum(end, last + window)
        whole_end = gl.minimum(whole_end, first + window)
    if WINDOW:
        begin = gl.maximum(first - window + 1, 0) // BLOCK
        whole_begin = gl.maximum(last - window + BLOCK, 0) // BLOCK
    end = gl.maximum((gl.maximum(end, 0) + BLOCK - 1) // BLOCK, begin)
    whole_begin = gl.minimum(gl.maximum(whole_begin, begin), end)
    whole_end = gl.maximum(gl.maximum(whole_end, 0) // BLOCK, whole_begin)
    return begin, whole_begin, whole_end, end


@gluon.jit
def _tanh(x):
    return 1.0 - 2.0 / (gl.exp2(x * (2.0 * _LOG2E)) + 1.0)


@gluon.jit
def _load(
    descs, smem, bars, q_at, k_at, columns, first_block, blocks,
    WGS: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: queries once, then keys and values from the last block to the first."""
    q_desc, k_desc, v_desc = descs
    q_smem, k_smem, v_smem = smem
    q_full, k_full, k_empty, v_full, v_empty, _ = bars
    q_column, k_column = columns
    mbarrier.expect(q_full, WGS * q_desc.block_type.nbytes, pred=blocks > 0)
    for wg in gl.static_range(WGS):
        at = [q_at + wg * ROWS, q_column]
        tma.async_copy_global_to_shared(q_desc, at, q_full, q_smem.index(wg), pred=blocks > 0)
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
def _weigh(
    s, top, total, block, position, keys, window, slope, scale, softcap,
    S: gl.constexpr, N: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
    ALIBI: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax: weights, and the factor that older sums fade by."""
    n = block * N + gl.arange(0, N, gl.SliceLayout(0, S))
    if SOFTCAP:
        s = softcap * _LOG2E * _tanh(s * (scale / (softcap * _LOG2E)))
    elif ALIBI:
        s = s * scale
    if ALIBI:
        s += slope * (n[None, :] - position[:, None]).to(gl.float32)
    if MASKED:
        seen = (n < keys)[None, :]
        if CAUSAL:
            seen = seen & (n[None, :] <= position[:, None])
        elif WINDOW:
            seen = seen & (n[None, :] < position[:, None] + window)
        if WINDOW:
            seen = seen & (n[None, :] > position[:, None] - window)
        s = gl.where(seen, s, float("-inf"))
    highest = gl.max(s, 1)
    above = gl.maximum(top, highest if SOFTCAP or ALIBI else highest * scale)
    finite = gl.where(above == float("-inf"), 0.0, above) if MASKED else above
    p = gl.exp2(s - finite[:, None]) if SOFTCAP or ALIBI else gl.exp2(s * scale - finite[:, None])
    fade = gl.exp2(top - finite)
    total = total * fade + gl.sum(p, 1)
    return p, fade, above, total


@gluon.jit
def _clear_rows(v, keep, N: gl.constexpr, D: gl.constexpr):
    """Zero the rows from `keep` on: they are another sequence's, and zero times infinity is not zero."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    for chunk in gl.static_range(N // 16):
        if (chunk + 1) * 16 > keep:
            part = v.slice(chunk * 16, 16)
            row = chunk * 16 + gl.arange(0, 16, gl.SliceLayout(1, layout))
            part.store(gl.where((row < keep)[:, None], part.load(layout), 0.0).to(v.dtype))
    fence_async_shared()


@gluon.jit
def _attend_blocks(
    q, smem, bars, p, o, top, total, begin, end, first_block, position, keys, window, slope,
    scale, softcap, turn, WG: gl.constexpr, WGS: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
    ALIBI: gl.constexpr, PINGPONG: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Steps `begin` .. `end`: multiply block i of the keys while block i - 1 is still due its values."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    _, k_smem, v_smem = smem
    _, k_full, k_empty, v_full, v_empty, turns = bars
    for i in range(begin, end):
        stage = i % STAGES
        mbarrier.wait(k_full.index(stage), i // STAGES & 1)
        if PINGPONG:
            mbarrier.wait(turns.index(WG), turn)
            turn ^= 1
        s = gl.zeros([ROWS, N], gl.float32, S)
        s = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)
        before = (i - 1) % STAGES
        mbarrier.wait(v_full.index(before), (i - 1) // STAGES & 1)
        o = warpgroup_mma(p, v_smem.index(before), o, is_async=True)
        if PINGPONG:
            mbarrier.arrive(turns.index((WG + 1) % WGS), count=1)
        s = warpgroup_mma_wait(1, deps=(s,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        weights, fade, top, total = _weigh(
            s, top, total, first_block - i, position, keys, window, slope, scale, softcap,
            S, N, CAUSAL, WINDOW, SOFTCAP, ALIBI, MASKED,
        )  # fmt: skip
        # `p` is among the operands: its registers are read until the product is done.
        o, p = warpgroup_mma_wait(0, deps=(o, p))
        mbarrier.arrive(v_empty.index(before), count=1)
        o = o * gl.convert_layout(fade, gl.SliceLayout(1, ACC))[:, None]
        p = gl.convert_layout(weights.to(p.dtype), P)
    return p, o, top, total, turn


@gluon.jit
def _multiply(
    smem, bars, out, lse, slopes, scalars, blocks, WG: gl.constexpr, WGS: gl.constexpr, ROWS: gl.constexpr,
    N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, PINGPONG: gl.constexpr, HOLD: gl.constexpr,
):  # fmt: skip
    """A multiplying warpgroup: `ROWS` queries against all key blocks."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    q_smem, k_smem, v_smem = smem
    q_full, k_full, k_empty, v_full, _, turns = bars
    tokens, head, token, first, queries, keys, window, scale, softcap, o_token, o_head = scalars
    first_block, count, until_whole, until_masked = blocks
    dtype: gl.constexpr = q_smem.dtype

    m = first + WG * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S))
    position = m + (keys - queries)
    slope = 0.0
    if ALIBI:
        slope = gl.load(slopes + head) * _LOG2E
    top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S))
    o = gl.zeros([ROWS, D], gl.float32, ACC)
    turn = 1 if WG == 0 else 0  # the first waits for nobody
    turn = gl.to_tensor(turn)
    if count > 0:
        mbarrier.wait(q_full, 0)
        q = q_smem.index(WG)
        if HOLD:
            q = q.load(gl.DotOperandLayout(0, S, 2))
        mbarrier.wait(k_full.index(0), 0)
        if PINGPONG:
            mbarrier.wait(turns.index(WG), turn)
            turn ^= 1
        s = gl.zeros([ROWS, N], gl.float32, S)
        s = warpgroup_mma(q, k_smem.index(0).permute((1, 0)), s, use_acc=False, is_async=True)
        if PINGPONG:
            mbarrier.arrive(turns.index((WG + 1) % WGS), count=1)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_empty.index(0), count=1)
        weights, _fade, top, total = _weigh(
            s, top, total, first_block, position, keys, window, slope, scale, softcap,
            S, N, CAUSAL, WINDOW, SOFTCAP, ALIBI, True,
        )  # fmt: skip
        p = gl.convert_layout(weights.to(dtype), P)
        if (first_block + 1) * N > keys:
            mbarrier.wait(v_full.index(0), 0)
            _clear_rows(v_smem.index(0), keys - first_block * N, N, D)
        p, o, top, total, turn = _attend_blocks(
            q, smem, bars, p, o, top, total, 1, until_whole, first_block, position, keys, window, slope,
            scale, softcap, turn, WG, WGS, ROWS, N, D, STAGES, CAUSAL, WINDOW, SOFTCAP, ALIBI, PINGPONG, True,
        )  # fmt: skip
        p, o, top, total, turn = _attend_blocks(
            q, smem, bars, p, o, top, total, until_whole, until_masked, first_block, position, keys, window,
            slope, scale, softcap, turn, WG, WGS, ROWS, N, D, STAGES, CAUSAL, WINDOW, SOFTCAP, ALIBI,
            PINGPONG, False,
        )  # fmt: skip
        if WINDOW:
            p, o, top, total, turn = _attend_blocks(
                q, smem, bars, p, o, top, total, until_masked, count, first_block, position, keys, window,
                slope, scale, softcap, turn, WG, WGS, ROWS, N, D, STAGES, CAUSAL, WINDOW, SOFTCAP, ALIBI,
                PINGPONG, True,
            )  # fmt: skip
        last = (count - 1) % STAGES
        mbarrier.wait(v_full.index(last), (count - 1) // STAGES & 1)
        o = warpgroup_mma(p, v_smem.index(last), o, is_async=True)
        o, p = warpgroup_mma_wait(0, deps=(o, p))

    some = total > 0
    lse_value = gl.where(some, top + gl.log2(gl.where(some, total, 1.0)), float("inf"))
    gl.store(lse + head.to(gl.int64) * tokens + token + m, lse_value, mask=m < queries)
    share = gl.where(some, 1.0 / gl.where(some, total, 1.0), 0.0)
    o = o * gl.convert_layout(share, gl.SliceLayout(1, ACC))[:, None]
    # Through shared memory, the queries' own, so that a row is written in whole sectors.
    rows = q_smem.index(WG)
    rows.store(o.to(dtype))
    W: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    row = first + WG * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, W))
    column = gl.arange(0, D, gl.SliceLayout(0, W))
    where = (token + row).to(gl.int64)[:, None] * o_token + head.to(gl.int64) * o_head + column[None, :]
    gl.store(out + where, rows.load(W), mask=(row < queries)[:, None])


@gluon.jit(do_not_specialize=_COUNTS)
def _forward(
    q_desc, k_desc, v_desc, out, lse, starts, key_starts, slopes, tokens, rows, group, window,
    scale, softcap, o_token, o_head,
    WGS: gl.constexpr, ROWS: gl.constexpr, N: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    PINGPONG: gl.constexpr, HOLD: gl.constexpr, LOAD_REGS: gl.constexpr, MULTIPLY_REGS: gl.constexpr,
):  # fmt: skip
    M: gl.constexpr = WGS * ROWS
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
        end = begin

    q_smem = gl.allocate_shared_memory(q_desc.dtype, [WGS, ROWS, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, N, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, N, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [WGS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=WGS)
        mbarrier.init(v_empty.index(i), count=WGS)
    for i in gl.static_range(WGS):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()

    count = end - begin
    # Steps until the blocks seen whole, and until those on the far side of the window.
    until_whole = gl.maximum(end - whole_end, 1)
    until_masked = gl.maximum(end - whole_begin, until_whole)
    smem = (q_smem, k_smem, v_smem)
    bars = (q_full, k_full, k_empty, v_full, v_empty, turns)
    scalars = (tokens, head, token, first, queries, keys, window, scale, softcap, o_token, o_head)
    blocks = (end - 1, count, until_whole, until_masked)
    descs = (q_desc, k_desc, v_desc)
    columns = (head * D, head // group * D)
    if WGS == 2:
        gl.warp_specialize(
            [
                (_multiply, (smem, bars, out, lse, slopes, scalars, blocks, 0, WGS, ROWS, N, D, STAGES,
                             CAUSAL, WINDOW, SOFTCAP, ALIBI, PINGPONG, HOLD)),
                (_multiply, (smem, bars, out, lse, slopes, scalars, blocks, 1, WGS, ROWS, N, D, STAGES,
                             CAUSAL, WINDOW, SOFTCAP, ALIBI, PINGPONG, HOLD)),
                (_load, (descs, smem, bars, token + first, key, columns, end - 1, count,
                         WGS, ROWS, N, STAGES)),
            ],
            [4, 1],
            [MULTIPLY_REGS, LOAD_REGS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_multiply, (smem, bars, out, lse, slopes, scalars, blocks, 0, WGS, ROWS, N, D, STAGES,
                             CAUSAL, WINDOW, SOFTCAP, ALIBI, PINGPONG, HOLD)),
                (_multiply, (smem, bars, out, lse, slopes, scalars, blocks, 1, WGS, ROWS, N, D, STAGES,
                             CAUSAL, WINDOW, SOFTCAP, ALIBI, PINGPONG, HOLD)),
                (_multiply, (smem, bars, out, lse, slopes, scalars, blocks, 2, WGS, ROWS, N, D, STAGES,
                             CAUSAL, WINDOW, SOFTCAP, ALIBI, PINGPONG, HOLD)),
                (_load, (descs, smem, bars, token + first, key, columns, end - 1, count,
                         WGS, ROWS, N, STAGES)),
            ],
            [4, 4, 1],
            [MULTIPLY_REGS, MULTIPLY_REGS, LOAD_REGS],
        )  # fmt: skip


# By head dim: warpgroups, queries each, keys a block, stages, whether the warpgroups take turns, whether they
# hold the queries in registers, and registers a thread at launch. Measured on an H100.
_TILES = {
    64: (3, 64, 128, 2, True, False, 128),
    128: (2, 64, 128, 2, False, False, 168),
    256: (2, 64, 64, 2, True, False, 168),
}
# For short rows: two programs a multiprocessor, one starting while another ends. A few long rows among many
# short ones have most of the arithmetic.
_TILES_SHORT = _TILES | {64: (2, 64, 64, 2, False, False, 80)}
# Of the registers at launch, those of a loading and of a multiplying thread.
_REGISTERS = {168: (24, 240), 128: (32, 160), 80: (24, 104)}


@cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@cache
def _layout(block: int, dim: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([block, dim], gl.bfloat16)  # of 16 bits, whichever


def _describe(t: Tensor, block: int) -> TensorDescriptor:
    """`t` `[tokens, heads, head_dim]` as tiles of `block` tokens of one head."""
    tokens, heads, dim = t.shape
    return TensorDescriptor(t, [tokens, heads * dim], [t.stride(0), 1], [block, dim], _layout(block, dim))


def _copyable(t: Tensor) -> bool:
    """Whether the copy engine can read tiles of `t`: heads side by side, addresses in units of 16 bytes."""
    return (
        t.stride(2) == 1
        and t.stride(1) == t.shape[2]
        and t.stride(0) % 8 == 0
        and t.data_ptr() % 16 == 0
        and t.shape[0] > 0
    )


def accepts(q: Tensor, k: Tensor, v: Tensor, relative: Tensor | None) -> bool:
    """Whether `forward` takes these: a Hopper GPU, head dims 64, 128 or 256, no relative bias."""
    return (
        is_hopper(q.device)
        and q.shape[2] in _TILES
        and relative is None
        and all(_copyable(t) for t in (q, k, v))
    )


def forward(
    q, k, v, out, lse, starts, key_starts, slopes, scale, causal, window, softcap, longest, tile=None
) -> None:
    """Fill `out` and `lse` as `flash` does; `scale` is that of scores in units of log2."""
    tokens, heads, dim = q.shape
    rows = starts.shape[0] - 1
    short = tokens <= 2048 * rows and longest <= 4096
    tile = tile or (_TILES_SHORT if short else _TILES)[dim]
    wgs, queries, keys, stages, turns, hold, launch = tile
    load, multiply = _REGISTERS[launch]
    _forward[(tokens // (wgs * queries) + rows, heads)](
        _describe(q, queries),
        _describe(k, keys),
        _describe(v, keys),
        out,
        lse,
        starts,
        key_starts,
        slopes,
        tokens,
        rows,
        heads // k.shape[1],
        window,
        scale,
        softcap,
        out.stride(0),
        out.stride(1),
        WGS=wgs,
        ROWS=queries,
        N=keys,
        D=dim,
        STAGES=stages,
        CAUSAL=causal,
        WINDOW=window >= 0,
        SOFTCAP=softcap > 0,
        ALIBI=slopes is not None,
        PINGPONG=turns,
        HOLD=hold,
        LOAD_REGS=load,
        MULTIPLY_REGS=multiply,
        num_warps=4,
        maxnreg=launch,
    )
