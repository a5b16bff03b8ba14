"""Triton kernels of products of rows, sorted by expert, with the 4- and 8-bit matrices of their experts.

Codes become numbers inside the kernel: a product reads no more than those of the experts in use. The scale of
a 4-bit block multiplies the block's part of the sums, not its values.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from taut.kernels.device import launch_options, multiprocessors, shared_memory
from taut.kernels.moe_products import Tiles, find_tile, finish, input_gradient
from taut.kernels.moe_routing import Plan
from taut.kernels.packed import Codes
from taut.kernels.packed_triton import scale_of


@cache
def decoder(values: tuple[float, ...], dtype: torch.dtype) -> str:
    """PTX that turns `$4`, four bytes of two codes each, into their `values` in `dtype`: `$0, $1` those of
    the high halves, `$2, $3` those of the low ones.

    A byte permutation looks up four codes at once among eight bytes; two of them and a third that picks by
    the code's highest bit make a table of 16, and two such planes the two bytes of each value.
    """
    raw = torch.tensor(values).to(dtype).view(torch.int16).tolist()
    planes = [struct.unpack("4i", bytes(half >> shift & 255 for half in raw)) for shift in (0, 8)]
    lines = [".reg .b32 w, s, t, p, q, l, h;"]
    for at in range(2):  # two bytes, four codes
        lines += [f"shr.b32 w, $4, {16 * at};", "and.b32 s, w, 0x7777;"]
        lines += ["shr.b32 t, w, 1;", "and.b32 t, t, 0x4444;", "or.b32 t, t, 0x3210;"]
        for plane, (a, b, c, d) in zip("lh", planes, strict=True):
            lines += [f"mov.b32 p, {a};", f"mov.b32 q, {b};", f"prmt.b32 {plane}, p, q, s;"]
            lines += [f"mov.b32 p, {c};", f"mov.b32 q, {d};", "prmt.b32 p, p, q, s;"]
            lines += [f"prmt.b32 {plane}, {plane}, p, t;"]
        lines += [f"prmt.b32 ${at}, l, h, 0x7351;", f"prmt.b32 ${2 + at}, l, h, 0x6240;"]
    return "{ " + " ".join(lines) + " }"


@cache
def _table(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@triton.jit
def _decode(codes, values, DECODER: tl.constexpr):
    """The values of the high and the low halves of bytes: by table where DECODER is empty."""
    if DECODER == "":
        code = codes.to(tl.int32)
        high, low = tl.load(values + (code >> 4)), tl.load(values + (code & 15))
    else:
        high, low = tl.inline_asm_elementwise(
            DECODER, "=&r,=&r,=&r,=&r,r", [codes],
            dtype=(values.dtype.element_ty, values.dtype.element_ty), is_pure=True, pack=4,
        )  # fmt: skip
    return high, low


@triton.jit
def _multiply4(
    total, even, odd, codes, values, scales, table, nested, offset, row, start, inputs,
    BLOCK: tl.constexpr, DOUBLE: tl.constexpr, DECODER: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Adds the part of BK inputs, which lie in one block; `even` and `odd` are x's columns."""
    byte = start // 2 + tl.arange(0, BK // 2)
    high, low = _decode(tl.load(codes + row[:, None] * (inputs // 2) + byte[None, :]), values, DECODER)
    part = tl.dot(even, tl.trans(high))
    part = tl.dot(odd, tl.trans(low), part)
    at = row * (inputs // BLOCK) + start // BLOCK
    return total + part * scale_of(scales, table, nested, offset, at, row >= 0, DOUBLE)[None, :]


@triton.jit
def _multiply8(total, rows, codes, row, k, real, inputs, EVEN: tl.constexpr):
    at = codes + row[:, None] * inputs + k[None, :]
    w = tl.load(at) if EVEN else tl.load(at, mask=real[None, :], other=0)
    return tl.dot(rows, tl.trans(w.to(rows.dtype)), total)  # 8-bit integers are exact in 16-bit floats


@triton.jit
def _product(
    x, codes, values, scales, table, nested, offset, bias, out, order, offsets, tile_expert, tile_row,
    outputs, inputs, x_row,
    BITS: tl.constexpr, BLOCK: tl.constexpr, DOUBLE: tl.constexpr, DECODER: tl.constexpr,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr,
    LIMIT: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One tile of rows against BN rows of its expert's matrix (with ACT: of its gate and its up half)."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert, inside, read, write = find_tile(tile_expert, tile_row, offsets, order, GATHER, SCATTER, BM)
    if expert < 0:
        return
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    held = tl.minimum(n, outputs - 1).to(tl.int64)
    row = expert.to(tl.int64) * (outputs if ACT == "" else 2 * outputs) + held  # among those of all experts
    x_at = x + read[:, None] * x_row + tl.arange(0, BK)[None, :]
    total = tl.zeros([BM, BN], tl.float32)
    up = total
    for start in range(0, inputs, BK):
        k = start + tl.arange(0, BK)
        real = k < inputs
        mask = inside[:, None] if EVEN else inside[:, None] & real[None, :]
        rows = tl.load(x_at, mask=mask, other=0.0)
        if BITS == 4:
            even, odd = tl.split(tl.reshape(rows, [BM, BK // 2, 2]))
            total = _multiply4(
                total, even, odd, codes, values, scales, table, nested, offset, row, start, inputs,
                BLOCK, DOUBLE, DECODER, BK,
            )  # fmt: skip
            if ACT != "":
                up = _multiply4(
                    up, even, odd, codes, values, scales, table, nested, offset, row + outputs, start, inputs,
                    BLOCK, DOUBLE, DECODER, BK,
                )  # fmt: skip
        else:
            total = _multiply8(total, rows, codes, row, k, real, inputs, EVEN)
            if ACT != "":
                up = _multiply8(up, rows, codes, row + outputs, k, real, inputs, EVEN)
        x_at += BK
    if BITS == 8:
        total *= (tl.load(scales + row) * (1 / 127))[None, :]
        if ACT != "":
            up *= (tl.load(scales + row + outputs) * (1 / 127))[None, :]
    finish(total, up, bias, out, expert, inside, write, n, outputs, BIAS, ACT, LIMIT)


def refuses(codes: Codes, inputs: int, dtype: torch.dtype) -> str | None:
    """Why the kernel can't multiply rows `[rows, inputs]` of `dtype` by matrices of these codes, or None."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if codes.values is not None and inputs % codes.block:
        return f"wants rows of whole blocks; inputs are {inputs} in blocks of {codes.block}"
    return None


def tiles(plan: Plan, outputs: int, halves: int, codes: Codes, device: torch.device) -> Tiles:
    """Choice for matrices of `halves` times `outputs` rows."""
    block_k = min(codes.block, 128) if codes.values is not None else 128
    block_n = 64
    if plan.block <= 32:
        used = min(plan.rows, plan.experts)
        while block_n > 32 and used * triton.cdiv(outputs, block_n) < 2 * multiprocessors(device):
            block_n //= 2
    else:
        block_n //= halves  # sums of both halves, and of the step, are in registers
    stage = block_k * (2 * plan.block + halves * block_n)
    stages = max(2, min(4, shared_memory(device) // stage))
    return Tiles(block_n, block_k, 8 if plan.block == 128 else 4, stages)


def product(
    x: Tensor,
    codes: Codes,
    bias: Tensor | None,
    plan: Plan,
    shape: tuple[int, int, int],
    *,
    gather: int = 0,
    scatter: bool = False,
    act: str | None = None,
    limit: float | None = None,
    cut: Tiles | None = None,
) -> Tensor:
    """As `moe_products.product`, by a weight of `shape` `[experts, outputs, inputs]` in codes, for what
    `refuses` accepts. Activations stay in 16 bit; the 16 values of 4-bit codes are rounded to their dtype."""
    halves = 2 if act else 1
    outputs, inputs = shape[1] // halves, shape[2]
    out = torch.empty(plan.rows, outputs, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    cut = cut or tiles(plan, outputs, halves, codes, x.device)
    values, found, scales = None, "", codes.scales
    if codes.values is not None:
        values = _table(codes.values, x.dtype, x.device)
        found = decoder(codes.values, x.dtype) if x.is_cuda else ""  # the interpreter knows no PTX
    _product[(plan.tile_expert.shape[0], triton.cdiv(outputs, cut.block_n))](
        x, codes.codes, values, scales.absmax, scales.table, scales.nested, scales.offset, bias, out,
        plan.order, plan.offsets, plan.tile_expert, plan.tile_row, outputs, inputs, x.stride(0),
        BITS=8 if codes.values is None else 4, BLOCK=codes.block, DOUBLE=scales.table is not None,
        DECODER=found, GATHER=gather, SCATTER=scatter, BIAS=bias is not None, ACT=act or "",
        LIMIT=limit or 0.0, EVEN=inputs % cut.block_k == 0, BM=plan.block, BN=cut.block_n, BK=cut.block_k,
        num_warps=cut.warps, num_stages=cut.stages, **launch_options(x.device),
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class PackedMatrices:
    """The matrices of all experts in codes, and their biases (see `moe_triton.Matrices`). `unpack` gives the
    matrices dense in a dtype: for gradients, which need them the other way round."""

    codes: Codes
    bias: Tensor | None
    shape: tuple[int, int, int]
    unpack: Callable[[torch.dtype], Tensor]

    @property
    def learned(self) -> tuple[Tensor | None, ...]:
        return (self.bias,)

    def product(self, x: Tensor, plan: Plan, gather: int, scatter: bool, **act: str | float | None) -> Tensor:
        return product(x, self.codes, self.bias, plan, self.shape, gather=gather, scatter=scatter, **act)

    def differentiable(self, x: Tensor, plan: Plan, gather: int, scatter: bool) -> Tensor:
        return _Product.apply(x, self.bias, self, plan, gather, scatter)


class _Product(torch.autograd.Function):
    """A product whose backward unpacks the matrices again, so that nothing dense outlives the forward."""

    @staticmethod
    def forward(ctx, x, bias: Tensor | None, held: PackedMatrices, plan: Plan, gather: int, scatter: bool):
        ctx.held, ctx.plan, ctx.gather, ctx.scatter = held, plan, gather, scatter
        return held.product(x, plan, gather, scatter)

    @staticmethod
    def backward(ctx, grad: Tensor):
        plan, dx, d_bias = ctx.plan, None, None
        grad = grad if grad.stride(1) == 1 else grad.contiguous()
        if ctx.needs_input_grad[0]:
            dx = input_gradient(grad, ctx.held.unpack(grad.dtype), plan, ctx.gather, ctx.scatter)
        if ctx.needs_input_grad[1]:
            own = (grad[plan.order.long()] if ctx.scatter else grad).float()
            d_bias = torch.segment_reduce(own, "sum", offsets=plan.offsets.long(), initial=0.0).to(grad.dtype)
        return dx, d_bias, None, None, None, None
