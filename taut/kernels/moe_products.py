"""Triton kernels of products of rows, sorted by expert, with the matrices of their experts; and the gradients
of those."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from taut.kernels.act_triton import gated
from taut.kernels.device import launch_options, multiprocessors, shared_memory
from taut.kernels.moe_routing import Plan, combine


@triton.jit
def find_tile(
    tile_expert, tile_row, offsets, order, GATHER: tl.constexpr, SCATTER: tl.constexpr, BM: tl.constexpr
):
    """A tile's expert (-1 for none), which of its rows there are, and the rows that these read and write:
    sorted ones, or with GATHER a row's place before sorting, over GATHER, with SCATTER that place."""
    tile = tl.program_id(0)
    expert = tl.load(tile_expert + tile)
    m = tl.load(tile_row + tile) + tl.arange(0, BM)
    inside = m < tl.load(offsets + tl.maximum(expert, 0) + 1)
    read = m
    write = m
    if GATHER > 0 or SCATTER:
        row = tl.load(order + m, mask=inside, other=0)
        if GATHER > 0:
            read = row // GATHER
        if SCATTER:
            write = row
    return expert, inside, read.to(tl.int64), write.to(tl.int64)


@triton.jit
def finish(
    total, up, bias, out, expert, inside, write, n, outputs,
    BIAS: tl.constexpr, ACT: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Bias, activation and store of sums `[BM, BN]`."""
    columns = n < outputs
    if BIAS:
        own = bias + expert.to(tl.int64) * (outputs if ACT == "" else 2 * outputs) + n
        total += tl.load(own, mask=columns, other=0.0).to(tl.float32)[None, :]
        if ACT != "":
            up += tl.load(own + outputs, mask=columns, other=0.0).to(tl.float32)[None, :]
    if ACT != "":
        total = gated(total, up, ACT, LIMIT)
    tl.store(
        out + write[:, None] * outputs + n.to(tl.int64)[None, :], total.to(out.dtype.element_ty),
        mask=inside[:, None] & columns[None, :],
    )  # fmt: skip


@triton.jit
def _product(
    x, weight, bias, out, order, offsets, tile_expert, tile_row, outputs, inputs,
    x_row, w_expert, w_out, w_in,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
    LIMIT: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of rows against BN rows of its expert's weight (with ACT: of its gate and its up half)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert, inside, read, write = find_tile(tile_expert, tile_row, offsets, order, GATHER, SCATTER, BM)
    if expert < 0:
        return
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    x_at = x + read[:, None] * x_row + k[None, :]
    # Places within an expert's matrix fit into 32 bits, which take half of the registers.
    at = tl.minimum(n, outputs - 1)[None, :] * w_out + k[:, None] * w_in
    base = weight + expert.to(tl.int64) * w_expert
    up_base = base + tl.cast(outputs, tl.int64) * w_out
    total = tl.zeros([BM, BN], tl.float32)
    up = total
    for start in range(0, inputs, BK):
        if EVEN:
            rows = tl.load(x_at, mask=inside[:, None], other=0.0)
            w = tl.load(base + at)
        else:
            real = start + k < inputs
            rows = tl.load(x_at, mask=inside[:, None] & real[None, :], other=0.0)
            w = tl.load(base + at, mask=real[:, None], other=0.0)
        total = tl.dot(rows, w, total, input_precision=PRECISION)
        if ACT != "":
            w = tl.load(up_base + at) if EVEN else tl.load(up_base + at, mask=real[:, None], other=0.0)
            up = tl.dot(rows, w, up, input_precision=PRECISION)
            up_base += BK * w_in
        x_at += BK
        base += BK * w_in
    finish(total, up, bias, out, expert, inside, write, n, outputs, BIAS, ACT, LIMIT)


@triton.jit
def _weight_gradient(
    x, grad, d_weight, d_bias, order, offsets, outputs, inputs, x_row, g_row,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One tile of one expert's gradient: the sum over its rows, zeros where it has none."""
    expert = tl.program_id(2)
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    columns = n < outputs
    real = k < inputs
    total = tl.zeros([BN, BK], tl.float32)
    sums = tl.zeros([BN], tl.float32)
    for start in range(begin, end, BR):
        r = start + tl.arange(0, BR)
        inside = r < end
        row = r
        if GATHER > 0 or SCATTER:
            row = tl.load(order + r, mask=inside, other=0)
        read = row // GATHER if GATHER > 0 else r
        written = row if SCATTER else r
        g_at = grad + written.to(tl.int64)[:, None] * g_row + n[None, :]
        g = tl.load(g_at, mask=inside[:, None] & columns[None, :], other=0.0)
        x_at = x + read.to(tl.int64)[:, None] * x_row + k[None, :]
        rows = tl.load(x_at, mask=inside[:, None] & real[None, :], other=0.0)
        total = tl.dot(tl.trans(g), rows, total, input_precision=PRECISION)
        if BIAS:
            sums += tl.sum(g.to(tl.float32), 0)
    wide = tl.cast(expert, tl.int64) * outputs + n
    at = d_weight + wide[:, None] * inputs + k[None, :]
    tl.store(at, total.to(d_weight.dtype.element_ty), mask=columns[:, None] & real[None, :])
    if BIAS:
        tl.store(d_bias + wide, sums.to(d_bias.dtype.element_ty), mask=columns & (tl.program_id(1) == 0))


@dataclass(frozen=True)
class Tiles:
    """How a product is cut up, but for the rows, which the plan cuts."""

    block_n: int
    block_k: int
    warps: int
    stages: int


def block_of(rows: int, experts: int, dtype: torch.dtype) -> int:
    """Rows of a tile: about as many as an expert has."""
    most = 64 if dtype is torch.float32 else 128
    return min(max(triton.next_power_of_2(triton.cdiv(rows, experts)), 16), most)


def tiles(
    plan: Plan, outputs: int, inputs: int, halves: int, dtype: torch.dtype, device: torch.device
) -> Tiles:
    """Choice for a weight of `halves` times `outputs` by `inputs` an expert."""
    if dtype is torch.float32:
        return Tiles(64 // halves, 32, 4, 2)
    block_k = 128 if plan.block <= 32 and inputs % 128 == 0 else 64
    if plan.block <= 32:
        # Reading weights is what takes the time: enough programs that all of the memory is busy.
        block_n, used = 64, min(plan.rows, plan.experts)
        while block_n > 32 and used * triton.cdiv(outputs, block_n) < 2 * multiprocessors(device):
            block_n //= 2
    else:
        block_n = 128 // halves
    stage = 2 * block_k * (plan.block + halves * block_n)
    stages = max(2, min(4, shared_memory(device) // stage))
    return Tiles(block_n, block_k, 8 if plan.block == 128 else 4, stages)


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: Plan,
    *,
    gather: int = 0,
    scatter: bool = False,
    act: str | None = None,
    limit: float | None = None,
    cut: Tiles | None = None,
) -> Tensor:
    """`glu(x W_e^T + b_e)` of every row by its expert's matrix, `[rows, outputs]`, without gradients.

    `weight` `[experts, outputs, inputs]` with any strides; `bias` `[experts, outputs]`. With `act` they hold
    the gate half, then the up half. Rows of `x` are sorted ones, or, with `gather`, those of before sorting
    divided by it (1: rows themselves, `chosen`: tokens). The result is sorted too, unless it is to `scatter`.
    """
    halves = 2 if act else 1
    outputs, inputs = weight.shape[1] // halves, weight.shape[2]
    out = torch.empty(plan.rows, outputs, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    cut = cut or tiles(plan, outputs, inputs, halves, x.dtype, x.device)
    _product[(plan.tile_expert.shape[0], triton.cdiv(outputs, cut.block_n))](
        x, weight, bias, out, plan.order, plan.offsets, plan.tile_expert, plan.tile_row, outputs, inputs,
        x.stride(0), *weight.stride(), GATHER=gather, SCATTER=scatter, BIAS=bias is not None, ACT=act or "",
        LIMIT=limit or 0.0, EVEN=inputs % cut.block_k == 0, PRECISION=_precision(x.dtype), BM=plan.block,
        BN=cut.block_n, BK=cut.block_k, num_warps=cut.warps, num_stages=cut.stages,
        **launch_options(x.device),
    )  # fmt: skip
    return out


def weight_gradient(
    x: Tensor, grad: Tensor, plan: Plan, like: Tensor, bias: Tensor | None, gather: int, scatter: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of a weight of the shape of `like` and of `bias`, for `grad` of what `product` gives."""
    experts, outputs, inputs = like.shape
    d_weight = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    d_bias = None if bias is None else torch.empty_like(bias)
    if like.dtype is torch.float32:
        block, rows, warps = 64, 32, 4
    else:
        block, rows, warps = 128, 64, 8
    _weight_gradient[(triton.cdiv(outputs, block), triton.cdiv(inputs, block), experts)](
        x, grad, d_weight, d_bias, plan.order, plan.offsets, outputs, inputs, x.stride(0), grad.stride(0),
        GATHER=gather, SCATTER=scatter, BIAS=bias is not None, PRECISION=_precision(x.dtype), BN=block,
        BK=block, BR=rows, num_warps=warps, num_stages=2,
    )  # fmt: skip
    return d_weight, d_bias


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype is torch.float32 else "tf32"


@dataclass(frozen=True)
class DenseMatrices:
    """The matrices of all experts, `weight` `[experts, outputs, inputs]`, and their biases `[experts,
    outputs]` (see `moe_triton.Matrices`)."""

    weight: Tensor
    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.weight.shape)

    @property
    def learned(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias

    def product(self, x: Tensor, plan: Plan, gather: int, scatter: bool, **act: str | float | None) -> Tensor:
        return product(x, self.weight, self.bias, plan, gather=gather, scatter=scatter, **act)

    def differentiable(self, x: Tensor, plan: Plan, gather: int, scatter: bool) -> Tensor:
        return _Product.apply(x, self.weight, self.bias, plan, gather, scatter)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan, gather: int, scatter: bool):
        ctx.save_for_backward(x, weight, bias)
        ctx.plan, ctx.gather, ctx.scatter = plan, gather, scatter
        return product(x, weight, bias, plan, gather=gather, scatter=scatter)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, bias = ctx.saved_tensors
        plan, gather, scatter = ctx.plan, ctx.gather, ctx.scatter
        grad = grad if grad.stride(1) == 1 else grad.contiguous()
        dx = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(grad, weight, plan, gather, scatter)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            d_weight, d_bias = weight_gradient(x, grad, plan, weight, bias, gather, scatter)
        return dx, d_weight, d_bias, None, None, None


def input_gradient(grad: Tensor, weight: Tensor, plan: Plan, gather: int, scatter: bool) -> Tensor:
    """Gradient of the x of a `product` by `weight`; tokens get the sum over their choices, in that order."""
    dx = product(grad, weight.mT, None, plan, gather=int(scatter), scatter=gather > 0)
    return combine(dx.view(-1, gather, dx.shape[1]), None, None) if gather > 1 else dx
