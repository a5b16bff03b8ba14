"""Triton kernels of `kernels.gemv`: products of a few rows that run at the speed of reading the weight.

A decode step is a chain of such products, each as long as reading its weight takes. Two things keep the
memory busy across their boundaries: a program asks for its weights before it waits for its predecessor
(programmatic dependent launch), and norm, activation and residual ride along instead of being launches.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from taut.kernels.act_triton import activate
from taut.kernels.device import launch_options, multiprocessors, shared_memory, workspace
from taut.kernels.norm_triton import rms_norm


@triton.jit
def _load(pointers, at, K, EVEN: tl.constexpr):
    """A tile of the weight, or of x, whose columns are `at`."""
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=at < K, other=0.0)


@triton.jit
def _load_weight(pointers, at, K, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers, eviction_policy="evict_first")
    return tl.load(pointers, mask=at < K, other=0.0, eviction_policy="evict_first")


@triton.jit
def _by_hand(
    x,
    weight,
    bias,
    norm_weight,
    residual,
    out,
    N,
    K,
    eps,
    offset,
    M: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """M rows of x against BLOCK_N rows of the weight (with ACT: of its gate and up halves), without tensor
    cores. The next tile of the weight is in flight, in registers, while one is multiplied."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    ups = rows + tl.cast(N, tl.int64) * K  # N is a constant where it is 1
    ahead = _load_weight(rows, k[None, :], K, EVEN)
    if ACT != "":
        ahead_up = _load_weight(ups, k[None, :], K, EVEN)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    # Eight neighbours of a weight row are one thread's: they are added before the sums are kept.
    totals = ()
    totals_up = ()
    squares = ()
    for _ in tl.static_range(M):
        totals += (tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32),)
        totals_up += (tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32),)
        squares += (tl.zeros([BLOCK_K], tl.float32),)
    for start in range(0, K, BLOCK_K):
        w = ahead.to(tl.float32)
        if ACT != "":
            w_up = ahead_up.to(tl.float32)
        at = start + k
        beyond = start + BLOCK_K + k[None, :]
        ahead = _load_weight(rows + start + BLOCK_K, beyond, K, False)
        if ACT != "":
            ahead_up = _load_weight(ups + start + BLOCK_K, beyond, K, False)
        if NORM:
            g = _load(norm_weight + at, at, K, EVEN).to(tl.float32) + offset
        new = ()
        new_up = ()
        new_squares = ()
        for m in tl.static_range(M):
            v = _load(x + m * K + at, at, K, EVEN).to(tl.float32)
            if NORM:
                new_squares += (squares[m] + v * v,)
                v = v * g
            new += (totals[m] + tl.sum(tl.reshape(w * v[None, :], [BLOCK_N, BLOCK_K // 8, 8]), 2),)
            if ACT != "":
                up = tl.sum(tl.reshape(w_up * v[None, :], [BLOCK_N, BLOCK_K // 8, 8]), 2)
                new_up += (totals_up[m] + up,)
        totals = new
        if NORM:
            squares = new_squares
        if ACT != "":
            totals_up = new_up
    inside = n < N
    for m in tl.static_range(M):
        y = tl.sum(totals[m], 1)
        if NORM:
            scale = tl.rsqrt(tl.sum(squares[m], 0) / K + eps)
            y = y * scale
        if BIAS:
            y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
        if ACT != "":
            up = tl.sum(totals_up[m], 1)
            if NORM:
                up = up * scale
            if BIAS:
                up += tl.load(bias + N + n, mask=inside, other=0.0).to(tl.float32)
            y = activate(y, ACT) * up
        if RESIDUAL:
            y += tl.load(residual + m * N + n, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + m * N + n, y, mask=inside)


@triton.jit
def _finish(
    total, total_up, bias, residual, out, real, m, n, N, BIAS: tl.constexpr, ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Bias, activation, residual and store of sums `[BLOCK_M, BLOCK_N]`."""
    columns = n < N
    if BIAS:
        total += tl.load(bias + n, mask=columns, other=0.0).to(tl.float32)[None, :]
    if ACT != "":
        if BIAS:
            total_up += tl.load(bias + N + n, mask=columns, other=0.0).to(tl.float32)[None, :]
        total = activate(total, ACT) * total_up
    place = m[:, None] * N + n[None, :]
    inside = real[:, None] & columns[None, :]
    if RESIDUAL:
        total += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, total, mask=inside)


@triton.jit(do_not_specialize=["M"])
def _by_tensor_cores(
    x,
    weight,
    bias,
    residual,
    out,
    parts,
    counters,
    M,
    N,
    K,
    span,
    BIAS: tl.constexpr,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    X_FIRST: tl.constexpr,
    PDL: tl.constexpr,
):
    """All M <= BLOCK_M rows of x against BLOCK_N rows of the weight, over `span` of its K columns. The last
    of the SPLITS programs of a tile adds their parts up, always in the same order."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    begin = split * span
    end = tl.minimum(begin + span, K)
    rows = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    ups = rows + tl.cast(N, tl.int64) * K
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    real = m < M
    source = x + m[:, None] * K + k[None, :]
    if X_FIRST:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        total_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        total_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        at = start + k[None, :]
        w = _load_weight(rows + start, at, K, EVEN)
        mask = real[:, None]
        if not EVEN:
            mask = mask & (at < K)
        v = tl.load(source + start, mask=mask, other=0.0)
        total = tl.dot(v, w.T, total) if X_FIRST else tl.dot(w, v.T, total)
        if ACT != "":
            u = _load_weight(ups + start, at, K, EVEN)
            total_up = tl.dot(v, u.T, total_up) if X_FIRST else tl.dot(u, v.T, total_up)
    if not X_FIRST:
        total = total.T
        total_up = total_up.T
    if SPLITS == 1:
        _finish(total, total_up, bias, residual, out, real, m, n, N, BIAS, ACT, RESIDUAL)
    else:
        HALVES: tl.constexpr = 1 if ACT == "" else 2
        inside = real[:, None] & (n < N)[None, :]
        place = m[:, None] * N + n[None, :]
        tl.store(parts + split * HALVES * M * N + place, total, mask=inside)
        if ACT != "":
            tl.store(parts + (split * HALVES + 1) * M * N + place, total_up, mask=inside)
        tl.debug_barrier()
        if tl.atomic_add(counters + tl.program_id(0), 1, sem="acq_rel") == SPLITS - 1:
            tl.store(counters + tl.program_id(0), 0)
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            total_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for s in tl.static_range(SPLITS):
                first = parts + s * HALVES * M * N + place
                total += tl.load(first, mask=inside, other=0.0, cache_modifier=".cg")
                if ACT != "":
                    second = parts + (s * HALVES + 1) * M * N + place
                    total_up += tl.load(second, mask=inside, other=0.0, cache_modifier=".cg")
            _finish(total, total_up, bias, residual, out, real, m, n, N, BIAS, ACT, RESIDUAL)


@dataclass(frozen=True)
class Tiles:
    """How a product is cut up. `stages`, `splits` (of the columns) and `x_first` (operand order) are the
    tensor-core kernel's; 0 stages: the other."""

    block_n: int
    block_k: int
    warps: int
    stages: int = 0
    splits: int = 1
    x_first: bool = True


def tiles(rows: int, outputs: int, inputs: int, gated: bool, device: torch.device) -> Tiles:
    """Choice for `rows` rows through a weight of `outputs` (of each half, if gated) by `inputs`, from
    `benchmarks/results/decode_ops.json`."""
    if rows <= 2:
        block_k = min(1024, triton.next_power_of_2(inputs))
        return Tiles(4, block_k, max(block_k // 256, 1))
    programs, halves = multiprocessors(device), 2 if gated else 1
    block_k = 128 if inputs % 128 == 0 or inputs % 64 else 64
    blocks = triton.cdiv(outputs, 64)
    if programs < blocks <= 2 * programs and rows <= 16 and not gated:
        return Tiles(32, block_k, 2, 6)  # half of 64 would leave half of the second round idle
    splits = 1
    while splits < 8 and 2 * splits * blocks <= programs and inputs >= 8 * splits * block_k:
        splits *= 2
    # Tiles in flight have to fit: consumer GPUs have less than half of a Hopper's shared memory.
    stage = 2 * block_k * (64 * halves + max(16, triton.next_power_of_2(rows)))
    stages = max(2, min(4, shared_memory(device) // stage))
    return Tiles(64, block_k, 4, stages, splits, x_first=False)


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    offset: float,
    act: str | None,
    residual: Tensor | None,
    out_dtype: torch.dtype,
    cut: Tiles | None = None,
) -> Tensor:
    """The product as `kernels.gemv.gemv` describes it; arguments are checked there."""
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2 if act else weight.shape[0]
    cut = cut or tiles(rows, outputs, inputs, act is not None, x.device)
    out = torch.empty(rows, outputs, dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    blocks = triton.cdiv(outputs, cut.block_n)
    flags = {
        "BIAS": bias is not None,
        "ACT": act or "",
        "RESIDUAL": residual is not None,
        "EVEN": inputs % cut.block_k == 0,
        "BLOCK_N": cut.block_n,
        "BLOCK_K": cut.block_k,
        "num_warps": cut.warps,
        **launch_options(x.device),
    }
    if cut.stages == 0:
        _by_hand[(blocks,)](
            x,
            weight,
            bias,
            norm_weight,
            residual,
            out,
            outputs,
            inputs,
            eps,
            offset,
            M=rows,
            NORM=norm_weight is not None,
            **flags,
        )
        return out
    if norm_weight is not None:
        # On the way to the tensor cores, scaling x in each program costs more than a launch does.
        x = rms_norm(x, norm_weight, eps, offset)
    memory = None
    if cut.splits > 1:
        memory = workspace(x.device, cut.splits * rows * weight.shape[0], blocks)
    _by_tensor_cores[(blocks, cut.splits)](
        x,
        weight,
        bias,
        residual,
        out,
        memory.parts if memory else None,
        memory.counters if memory else None,
        rows,
        outputs,
        inputs,
        triton.cdiv(triton.cdiv(inputs, cut.block_k), cut.splits) * cut.block_k,
        SPLITS=cut.splits,
        BLOCK_M=max(16, triton.next_power_of_2(rows)),
        STAGES=cut.stages,
        X_FIRST=cut.x_first,
        **flags,
    )
    return out
