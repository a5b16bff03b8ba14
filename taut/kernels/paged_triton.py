"""Attention of a few queries a row over cache pages, split along the keys (Flash-Decoding, Dao et al. 2023).

The heads that share a key head, times the queries of the row, are the rows of one tile, so that keys are
read once. The keys of a row are cut into splits that separate programs take; the last of them to finish
merges the parts. Lengths are read on the device and the grid depends on host bounds alone, so that a launch
can be replayed from a CUDA graph while rows grow: splits without keys end at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from taut.errors import RequestError
from taut.kernels.attention import Pages, Scoring
from taut.kernels.device import launch_options, multiprocessors, shared_memory, workspace

MAX_QUERIES = 16  # a row; more are a prefill
_LOG2E = 1.4426950408889634


@triton.jit
def _prefetch(pointers, BYTES: tl.constexpr):
    """Ask for BYTES from each of `pointers` on into the L2 cache."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], " + BYTES + "; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.uint64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _with_sink(acc, total, top, sink, live):
    """Sums that a learned score without a value takes part in."""
    s = tl.load(sink, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
    peak = tl.maximum(top, s)
    fade = tl.exp2(top - peak)
    return acc * fade[:, None], total * fade + tl.exp2(s - peak)


@triton.jit
def _merge(
    parts,
    sums,
    out,
    sinks,
    begin,
    offset,
    limit,
    kv_head,
    heads,
    used,
    splits,
    GROUP: tl.constexpr,
    SINKS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MERGE_R: tl.constexpr,
    MERGE_S: tl.constexpr,
):
    """The attention of MERGE_R (query, head) pairs from the parts of their `used` splits."""
    r = offset + tl.arange(0, MERGE_R)
    live = r < limit
    d = tl.arange(0, BLOCK_D)
    pair = (begin + r // GROUP).to(tl.int64) * heads + kv_head * GROUP + r % GROUP
    top = tl.full([MERGE_R], float("-inf"), tl.float32)
    total = tl.zeros([MERGE_R], tl.float32)
    acc = tl.zeros([MERGE_R, BLOCK_D], tl.float32)
    for s0 in range(0, used, MERGE_S):
        s = s0 + tl.arange(0, MERGE_S)
        place = pair[None, :] * splits + s[:, None]  # [MERGE_S, MERGE_R]
        kept = (s < used)[:, None] & live[None, :]
        mass = tl.load(sums + place, mask=kept, other=float("-inf"), cache_modifier=".cg")
        part = tl.load(
            parts + place[:, :, None] * DIM + d[None, None, :],
            mask=kept[:, :, None] & (d < DIM)[None, None, :],
            other=0.0,
            cache_modifier=".cg",
        )
        peak = tl.maximum(top, tl.max(mass, 0))
        base = tl.where(peak == float("-inf"), 0.0, peak)
        fade = tl.exp2(top - base)
        weights = tl.exp2(mass - base[None, :])
        total = total * fade + tl.sum(weights, 0)
        acc = acc * fade[:, None] + tl.sum(part * weights[:, :, None], 0)
        top = peak
    if SINKS:
        acc, total = _with_sink(acc, total, top, sinks + kv_head * GROUP + r % GROUP, live)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out + pair[:, None] * DIM + d[None, :], acc, mask=live[:, None] & (d < DIM)[None, :])


@triton.jit(do_not_specialize=["table", "lengths", "starts", "reach", "window", "least", "table_row"])
def _decode(
    q,
    keys,
    values,
    table,
    lengths,
    starts,
    slopes,
    relative,
    sinks,
    out,
    parts,
    sums,
    counters,
    reach,
    scale,
    softcap,
    window,
    least,
    q_token,
    q_head,
    k_page,
    k_slot,
    k_head,
    v_page,
    v_slot,
    v_head,
    table_row,
    heads,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    RELATIVE: tl.constexpr,
    SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MERGE_R: tl.constexpr,
    MERGE_S: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    WARPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid: (blocks * KV_HEADS, splits, rows). Scores are in units of log2, so that a weight is one exp2.

    A tile holds queries of one row, BLOCK_R of its `queries * GROUP` (query, head) pairs, query-major.
    """
    kv_head = tl.program_id(0) % KV_HEADS
    block = tl.program_id(0) // KV_HEADS
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    row = tl.program_id(2)
    # Lengths and page tables come from the step's beginning, not from the kernel just ahead.
    begin = tl.load(starts + row)
    count = tl.load(starts + row + 1) - begin
    length = tl.load(lengths + row)

    low = 0
    if WINDOW:
        # The first key that the row's first query sees, at position length - count.
        low = tl.maximum(length - count - window + 1, 0) // BLOCK_N * BLOCK_N
    span = length - low
    chunk = tl.maximum(tl.cdiv(tl.cdiv(span, splits), BLOCK_N) * BLOCK_N, least)
    used = tl.maximum(tl.cdiv(span, chunk), 1)
    first = low + split * chunk
    last = tl.minimum(first + chunk, length)
    pages = table + row.to(tl.int64) * table_row
    if PDL:
        if PREFETCH != "":
            # All but the newest keys are there already: they are on their way while the kernel ahead ends.
            EACH: tl.constexpr = 32 * WARPS // BLOCK_N
            n = first + tl.arange(0, BLOCK_N)
            page = tl.load(pages + n // PAGE, mask=n < last, other=0).to(tl.int64)
            piece = (tl.arange(0, EACH) * (DIM // EACH))[None, :]
            k_at = page * k_page + (n % PAGE) * k_slot + kv_head * k_head
            v_at = page * v_page + (n % PAGE) * v_slot + kv_head * v_head
            _prefetch(keys + k_at[:, None] + piece, PREFETCH)
            _prefetch(values + v_at[:, None] + piece, PREFETCH)
        gdc_wait()
        gdc_launch_dependents()
    if (block * BLOCK_R >= count * GROUP) | (split >= used):
        return

    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    live = r < count * GROUP
    token = (begin + r // GROUP).to(tl.int64)
    head = kv_head * GROUP + r % GROUP
    position = length - count + r // GROUP
    d = tl.arange(0, BLOCK_D)
    real = d < DIM
    queries = tl.load(
        q + token[:, None] * q_token + head[:, None] * q_head + d[None, :],
        mask=live[:, None] & real[None, :],
        other=0.0,
    )
    if ALIBI:
        slope = tl.load(slopes + head, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for n0 in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        n = n0 + tl.arange(0, BLOCK_N)
        held = n < last
        if PAGE % BLOCK_N == 0:
            page = tl.load(pages + n0 // PAGE).to(tl.int64)
        else:
            page = tl.load(pages + n // PAGE, mask=held, other=0).to(tl.int64)
        k_at = page * k_page + (n % PAGE) * k_slot + kv_head * k_head
        v_at = page * v_page + (n % PAGE) * v_slot + kv_head * v_head
        mask = held[:, None]
        if BLOCK_D != DIM:
            mask = mask & real[None, :]
        k = tl.load(keys + k_at[:, None] + d[None, :], mask=mask, other=0.0)
        s = tl.dot(queries, k.T, input_precision=PRECISION) * scale
        if SOFTCAP:
            # softcap * tanh(s / softcap) with `softcap` in units of log2 as well
            s = softcap * (1.0 - 2.0 / (tl.exp2(s / softcap * 2.8853900817779268) + 1.0))
        ahead = n[None, :] - position[:, None]
        if ALIBI:
            s += slope[:, None] * ahead.to(tl.float32)
        if RELATIVE:
            near = tl.minimum(tl.maximum(ahead, -reach), reach) + reach + head[:, None] * (2 * reach + 1)
            bias = tl.load(relative + near, mask=live[:, None] & held[None, :], other=0.0)
            s += bias.to(tl.float32) * 1.4426950408889634
        seen = held[None, :] & live[:, None]
        if CAUSAL:
            seen = seen & (ahead <= 0)
        if WINDOW:
            seen = seen & (ahead > -window)
            if not CAUSAL:
                seen = seen & (ahead < window)
        s = tl.where(seen, s, float("-inf"))
        peak = tl.maximum(top, tl.max(s, 1))
        base = tl.where(peak == float("-inf"), 0.0, peak)
        weights = tl.exp2(s - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(values + v_at[:, None] + d[None, :], mask=mask, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = peak
    whole = used == 1
    if SINKS and whole:  # otherwise once, where the splits are merged
        acc, total = _with_sink(acc, total, top, sinks + head, live)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]

    pair = token * heads + head
    if not SPLIT or whole:
        tl.store(out + pair[:, None] * DIM + d[None, :], acc, mask=live[:, None] & real[None, :])
    if SPLIT and not whole:
        place = pair * splits + split
        tl.store(parts + place[:, None] * DIM + d[None, :], acc, mask=live[:, None] & real[None, :])
        tl.store(sums + place, tl.where(total == 0.0, float("-inf"), top + tl.log2(total)), mask=live)
        # All threads' stores come before the count, and the count before the merge's loads.
        tl.debug_barrier()
        counter = counters + row * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") == used - 1:
            tl.store(counter, 0)
            _merge(
                parts,
                sums,
                out,
                sinks,
                begin,
                block * BLOCK_R,
                count * GROUP,
                kv_head,
                heads,
                used,
                splits,
                GROUP,
                SINKS,
                DIM,
                BLOCK_D,
                MERGE_R,
                MERGE_S,
            )


@dataclass(frozen=True)
class Tiles:
    """How decode attention is cut up: keys a step, warps, pipeline stages, and programs wanted for each
    multiprocessor."""

    block_n: int
    warps: int
    stages: int
    programs: int
    prefetch: bool = False


def tiles(dim: int, block_r: int, itemsize: int, device: torch.device) -> Tiles:
    """Measured choice for a padded head dim, rows of a tile and bytes of a number."""
    if itemsize == 4:
        return Tiles(16, 8, 1, 2) if dim > 128 and block_r > 16 else Tiles(16, 4, 2, 2)
    if block_r > 16:
        # Two tiles of 128 keys and values in flight where a program may take that much shared memory.
        roomy = 1024 * dim + 32768 <= shared_memory(device)
        if roomy:
            return Tiles(128, 4, 5, 1)
        # At head dim 256 that takes 104 KiB, and the smallest devices (8.6, 8.9, 12.x) have 99.
        return Tiles(64, 4, 3, 2) if 416 * dim <= shared_memory(device) else Tiles(32, 8, 3, 2)
    return Tiles(32, 2, 5, 4) if dim <= 128 else Tiles(32, 4, 5, 2)


def split_count(programs: int, context: int, least: int, room: int) -> int:
    """Splits for `programs` tiles over at most `context` keys: as many programs as run at once on the device,
    no split shorter than `least` keys."""
    return max(1, min(room // programs, triton.cdiv(context, least)))


def _prefetch_bytes(dim: int, cut: Tiles, itemsize: int) -> str:
    """Bytes of a key that each thread asks for ahead, as text; "" where they are not whole 16-byte pieces."""
    each = 32 * cut.warps // cut.block_n
    size = dim * itemsize // each if each else 0
    return str(size) if cut.prefetch and size and size % 16 == 0 and dim % each == 0 else ""


@dataclass(frozen=True)
class Plan:
    """Host decisions of a launch; they depend on shapes and on the bound of the context alone."""

    cut: Tiles
    block_r: int
    blocks: int
    splits: int
    floats: int
    counters: int


def plan(
    tokens: int,
    rows: int,
    queries: int,
    heads: int,
    kv_heads: int,
    dim: int,
    context: int,
    itemsize: int,
    device: torch.device,
    cut: Tiles | None = None,
) -> Plan:
    """The launch for `tokens` queries in `rows` rows of at most `queries`, over at most `context` keys."""
    pairs = max(queries, 1) * (heads // kv_heads)
    block_r = min(max(triton.next_power_of_2(pairs), 16), 64)
    cut = cut or tiles(max(triton.next_power_of_2(dim), 16), block_r, itemsize, device)
    blocks = triton.cdiv(pairs, block_r)
    programs = max(rows * kv_heads * blocks, 1)
    splits = split_count(programs, max(context, 1), cut.block_n, cut.programs * multiprocessors(device))
    floats = tokens * heads * splits * (dim + 1) if splits > 1 else 0
    return Plan(cut, block_r, blocks, splits, floats, rows * kv_heads * blocks if splits > 1 else 0)


def refuses(q: Tensor, queries: int, scoring: Scoring, pages: Pages | None) -> str | None:
    """Why the kernel can't take this attention, or None. `queries`: most queries of a row."""
    if pages is None:
        return "reads keys from cache pages only"
    if queries > MAX_QUERIES:
        return f"takes at most {MAX_QUERIES} queries a row; a row has {queries}"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32) or pages.keys.dtype != q.dtype:
        return f"takes float16, bfloat16 or float32 throughout; q is {q.dtype}, the cache {pages.keys.dtype}"
    if q.shape[2] > 256 or q.shape[2] % 8:
        return f"takes head dims up to 256, divisible by 8; asked: {q.shape[2]}"
    if torch.is_grad_enabled() and q.requires_grad:
        return "has no backward"
    return None


def paged_attention(
    q: Tensor,
    starts: Tensor,
    queries: int,
    scoring: Scoring,
    pages: Pages,
    *,
    context: int | None = None,
    cut: Tiles | None = None,
) -> Tensor:
    """Attention of packed queries `q` `[tokens, heads, head_dim]` over cache pages, in one launch.

    `starts` `[rows + 1]`: row boundaries; `queries`: most queries of a row. `context`: bound on the keys of
    a row that the grid is made for, `pages.longest` by default; longer rows are still read in full, by as
    many splits. A row without keys gives zeros. Gives `[tokens, heads, head_dim]`.
    """
    if (why := refuses(q, queries, scoring, pages)) is not None:
        raise RequestError(f"paged attention kernel {why}")
    tokens, heads, dim = q.shape
    rows, (_, page_size, kv_heads, _) = starts.shape[0] - 1, pages.keys.shape
    out = torch.empty(tokens, heads, dim, dtype=q.dtype, device=q.device)
    if not out.numel():
        return out
    keys, values = pages.keys, pages.values
    if q.stride(2) != 1 or keys.stride(3) != 1 or values.stride(3) != 1 or pages.table.stride(1) != 1:
        raise RequestError("paged attention wants q, keys, values and table contiguous in their last dim")
    context = pages.longest if context is None else context
    p = plan(tokens, rows, queries, heads, kv_heads, dim, context, q.element_size(), q.device, cut)
    memory = workspace(q.device, p.floats, p.counters) if p.splits > 1 else None
    slopes, relative = scoring.slopes, scoring.relative
    block_d = max(triton.next_power_of_2(dim), 16)
    merge_r = min(triton.next_power_of_2(queries * (heads // kv_heads)), p.block_r)
    _decode[(p.blocks * kv_heads, p.splits, rows)](
        q,
        keys,
        values,
        pages.table,
        pages.lengths,
        starts,
        slopes.contiguous() if slopes is not None else None,
        relative.contiguous() if relative is not None else None,
        scoring.sinks,
        out,
        memory.parts if memory else None,
        memory.parts[tokens * heads * p.splits * dim :] if memory else None,
        memory.counters if memory else None,
        relative.shape[1] // 2 if relative is not None else 0,
        scoring.scale * _LOG2E,
        (scoring.softcap or 1.0) * _LOG2E,
        scoring.window or 0,
        p.cut.block_n,
        q.stride(0),
        q.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        pages.table.stride(0),
        heads,
        GROUP=heads // kv_heads,
        DIM=dim,
        PAGE=page_size,
        CAUSAL=scoring.causal,
        WINDOW=scoring.window is not None,
        SOFTCAP=scoring.softcap is not None,
        ALIBI=slopes is not None,
        RELATIVE=relative is not None,
        SINKS=scoring.sinks is not None,
        SPLIT=p.splits > 1,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        KV_HEADS=kv_heads,
        BLOCK_R=p.block_r,
        BLOCK_N=p.cut.block_n,
        BLOCK_D=block_d,
        MERGE_R=merge_r,
        MERGE_S=max(1, 8192 // (merge_r * block_d)),
        STAGES=p.cut.stages,
        PREFETCH=_prefetch_bytes(dim, p.cut, q.element_size()),
        WARPS=p.cut.warps,
        num_warps=p.cut.warps,
        **launch_options(q.device),
    )
    return out
