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
from taut.kernels.device import launch_options


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
def _one_row(
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
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row of x against BLOCK_N rows of the weight (with ACT: of its gate and up halves). The next tile of
    the weight is in flight while one is multiplied."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    ups = rows + N.to(tl.int64) * K
    if EVEN:
        ahead = tl.load(rows, eviction_policy="evict_first")
        if ACT != "":
            ahead_up = tl.load(ups, eviction_policy="evict_first")
    else:
        ahead = tl.load(rows, mask=k[None, :] < K, other=0.0, eviction_policy="evict_first")
        if ACT != "":
            ahead_up = tl.load(ups, mask=k[None, :] < K, other=0.0, eviction_policy="evict_first")
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    # Eight neighbours of a row are one thread's: they are added before the sums are kept.
    total = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
    total_up = tl.zeros([BLOCK_N, BLOCK_K // 8], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        w = ahead
        if ACT != "":
            w_up = ahead_up
        more = start + BLOCK_K + k[None, :] < K
        ahead = tl.load(rows + start + BLOCK_K, mask=more, other=0.0, eviction_policy="evict_first")
        if ACT != "":
            ahead_up = tl.load(ups + start + BLOCK_K, mask=more, other=0.0, eviction_policy="evict_first")
        at = start + k
        if EVEN:
            v = tl.load(x + at).to(tl.float32)
        else:
            v = tl.load(x + at, mask=at < K, other=0.0).to(tl.float32)
        if NORM:
            squares += v * v
            if EVEN:
                g = tl.load(norm_weight + at).to(tl.float32)
            else:
                g = tl.load(norm_weight + at, mask=at < K, other=0.0).to(tl.float32)
            v = v * (g + offset)
        total += tl.sum(tl.reshape(w.to(tl.float32) * v[None, :], [BLOCK_N, BLOCK_K // 8, 8]), 2)
        if ACT != "":
            total_up += tl.sum(tl.reshape(w_up.to(tl.float32) * v[None, :], [BLOCK_N, BLOCK_K // 8, 8]), 2)
    y = tl.sum(total, 1)
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        y = y * scale
    inside = n < N
    if BIAS:
        y += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    if ACT != "":
        up = tl.sum(total_up, 1) * scale
        if BIAS:
            up += tl.load(bias + N + n, mask=inside, other=0.0).to(tl.float32)
        y = activate(y, ACT) * up
    if RESIDUAL:
        y += tl.load(residual + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n, y, mask=inside)


@triton.jit
def _few_rows(
    x,
    weight,
    bias,
    norm_weight,
    residual,
    out,
    M,
    N,
    K,
    eps,
    offset,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    ACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    X_FIRST: tl.constexpr,
    SHRINK: tl.constexpr,
    PDL: tl.constexpr,
):
    """All M <= BLOCK_M rows of x against BLOCK_N rows of the weight, on the tensor cores."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    first = weight + tl.minimum(n, N - 1).to(tl.int64) * K
    rows = first[:, None] + k[None, :]
    ups = rows + N.to(tl.int64) * K
    if PDL:
        if PREFETCH != "":
            _prefetch(first, PREFETCH)
            if ACT != "":
                _prefetch(first + N.to(tl.int64) * K, PREFETCH)
        gdc_launch_dependents()
        gdc_wait()
    real = (m < M)[:, None]
    source = x + m[:, None] * K + k[None, :]
    if X_FIRST:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        total_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        total_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN:
            w = tl.load(rows + start, eviction_policy="evict_first")
            v = tl.load(source + start, mask=real, other=0.0)
        else:
            inside = start + k[None, :] < K
            w = tl.load(rows + start, mask=inside, other=0.0, eviction_policy="evict_first")
            v = tl.load(source + start, mask=real & inside, other=0.0)
        if NORM:
            if EVEN:
                g = tl.load(norm_weight + start + k).to(tl.float32)
            else:
                g = tl.load(norm_weight + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            wide = v.to(tl.float32)
            squares += wide * wide
            v = (wide * ((g + offset) * SHRINK)[None, :]).to(v.dtype)
        if X_FIRST:
            total = tl.dot(v, w.T, total)
        else:
            total = tl.dot(w, v.T, total)
        if ACT != "":
            if EVEN:
                u = tl.load(ups + start, eviction_policy="evict_first")
            else:
                u = tl.load(ups + start, mask=inside, other=0.0, eviction_policy="evict_first")
            if X_FIRST:
                total_up = tl.dot(v, u.T, total_up)
            else:
                total_up = tl.dot(u, v.T, total_up)
    if not X_FIRST:
        total = total.T
        total_up = total_up.T
    if NORM:
        scale = (tl.rsqrt(tl.sum(squares, 1) / K + eps) / SHRINK)[:, None]
        total = total * scale
        total_up = total_up * scale
    columns = n < N
    if BIAS:
        total += tl.load(bias + n, mask=columns, other=0.0).to(tl.float32)[None, :]
    if ACT != "":
        if BIAS:
            total_up += tl.load(bias + N + n, mask=columns, other=0.0).to(tl.float32)[None, :]
        total = activate(total, ACT) * total_up
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    inside_out = real & columns[None, :]
    if RESIDUAL:
        total += tl.load(residual + place, mask=inside_out, other=0.0).to(tl.float32)
    tl.store(out + place, total, mask=inside_out)


@dataclass(frozen=True)
class Tiles:
    """How a product is cut up. `stages` and the rest are of the tensor-core kernel; 0 stages: the one-row
    kernel. `prefetch`: bytes of each weight row asked for before waiting."""

    block_n: int
    block_k: int
    warps: int
    stages: int = 0
    prefetch: int = 0
    x_first: bool = True


def tiles(rows: int, outputs: int, inputs: int, gated: bool) -> Tiles:
    """Measured choice for `rows` rows through a weight `[outputs (per half if gated), inputs]`."""
    if rows == 1:
        return Tiles(4, 1024, 4)
    return Tiles(32, 128, 4, 5, 2048)


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
    cut = cut or tiles(rows, outputs, inputs, act is not None)
    out = torch.empty(rows, outputs, dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    grid = (triton.cdiv(outputs, cut.block_n),)
    flags = {
        "NORM": norm_weight is not None,
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
        _one_row[grid](x, weight, bias, norm_weight, residual, out, outputs, inputs, eps, offset, **flags)
    else:
        _few_rows[grid](
            x,
            weight,
            bias,
            norm_weight,
            residual,
            out,
            rows,
            outputs,
            inputs,
            eps,
            offset,
            BLOCK_M=max(16, triton.next_power_of_2(rows)),
            STAGES=cut.stages,
            PREFETCH=str(min(cut.prefetch, 2 * inputs)) if cut.prefetch else "",
            X_FIRST=cut.x_first,
            # Rows times norm weight stay inside float16's range: the norm divides only afterwards.
            SHRINK=0.0625 if x.dtype == torch.float16 else 1.0,
            **flags,
        )
    return out
