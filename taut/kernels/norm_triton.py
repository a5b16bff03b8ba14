"""Triton kernels of RMSNorm and LayerNorm, alone and after the residual add, forward and backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from taut.errors import RequestError
from taut.kernels.device import launch_options, multiprocessors

MAX_DIM = 65536  # one program holds a whole row


@triton.jit(do_not_specialize=["rows", "inner", "means", "rstds"])
def _forward(
    x,
    residual,
    weight,
    bias,
    y,
    total,
    means,
    rstds,
    rows,
    inner,
    x_outer,
    x_inner,
    dim,
    eps,
    offset,
    LAYER: tl.constexpr,
    ADD: tl.constexpr,
    BIAS: tl.constexpr,
    SHIFT: tl.constexpr,
    SAVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """`x` and `residual` `[rows, dim]`, row r of x at `(r // inner) * x_outer + (r % inner) * x_inner`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    wide = at < dim
    inside = (row < rows)[:, None] & wide[None, :]
    w = tl.load(weight + at, mask=wide, other=0.0)[None, :]
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    place = (row // inner) * x_outer + (row % inner) * x_inner
    v = tl.load(x + place[:, None] + at[None, :], mask=inside, other=0.0)
    packed = row[:, None] * dim + at[None, :]
    if ADD:
        r = tl.load(residual + packed, mask=inside, other=0.0)
        v = (v.to(tl.float32) + r.to(tl.float32)).to(v.dtype)
        if SAVE:
            tl.store(total + packed, v, mask=inside)
    narrow = v.dtype
    v = v.to(tl.float32)
    if LAYER:
        mean = tl.sum(v, 1) / dim
        v = tl.where(inside, v - mean[:, None], 0.0)
        if SAVE:
            tl.store(means + row, mean, mask=row < rows)
    rstd = tl.rsqrt(tl.sum(v * v, 1) / dim + eps)
    if SAVE:
        tl.store(rstds + row, rstd, mask=row < rows)
    v = v * rstd[:, None]
    if LAYER:
        v = v * w.to(tl.float32)
        if BIAS:
            v += tl.load(bias + at, mask=wide, other=0.0)[None, :].to(tl.float32)
    elif SHIFT:
        v = v * (w.to(tl.float32) + offset)
    else:
        # Rounded before the weight, as the models were trained.
        v = v.to(narrow).to(tl.float32) * w.to(tl.float32)
    tl.store(y + packed, v, mask=inside)


@triton.jit(do_not_specialize=["rows", "inner", "means", "rstds"])
def _backward(
    x,
    weight,
    means,
    rstds,
    dy,
    dx,
    dw_parts,
    db_parts,
    rows,
    inner,
    x_outer,
    x_inner,
    dim,
    offset,
    LAYER: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each program walks over every so-manieth block of rows and keeps its own sums for weight and bias."""
    at = tl.arange(0, BLOCK)
    wide = at < dim
    w = tl.load(weight + at, mask=wide, other=0.0).to(tl.float32)[None, :] + offset
    dw = tl.zeros([BLOCK], tl.float32)
    db = tl.zeros([BLOCK], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & wide[None, :]
        place = (row // inner) * x_outer + (row % inner) * x_inner
        v = tl.load(x + place[:, None] + at[None, :], mask=inside, other=0.0).to(tl.float32)
        packed = row[:, None] * dim + at[None, :]
        g = tl.load(dy + packed, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstds + row, mask=row < rows, other=0.0)[:, None]
        if LAYER:
            v = tl.where(inside, v - tl.load(means + row, mask=row < rows, other=0.0)[:, None], 0.0)
        v = v * rstd
        if WEIGHT:
            dw += tl.sum(g * v, 0)
        if BIAS:
            db += tl.sum(g, 0)
        g = g * w
        d = g - v * (tl.sum(g * v, 1) / dim)[:, None]
        if LAYER:
            d -= (tl.sum(g, 1) / dim)[:, None]
        tl.store(dx + packed, d * rstd, mask=inside)
    part = tl.program_id(0).to(tl.int64) * dim + at
    if WEIGHT:
        tl.store(dw_parts + part, dw, mask=wide)
    if BIAS:
        tl.store(db_parts + part, db, mask=wide)


def tile(dim: int) -> tuple[int, int, int]:
    """Rows a program, padded row length and warps."""
    block = triton.next_power_of_2(dim)
    rows = max(1, 1024 // block)
    return rows, block, min(max(rows * block // 512, 1), 16)


def _rows_of(x: Tensor) -> tuple[Tensor, int, int, int]:
    """`x` such that its rows are `inner` to an outer step: (x, inner, outer stride, inner stride)."""
    if x.ndim == 3 and x.stride(2) == 1:
        return x, max(x.shape[1], 1), x.stride(0), x.stride(1)
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    return flat, 1, flat.stride(0), 0


def _run_forward(x, residual, weight, bias, eps, offset, layer, save):
    """`y`, and if they are to be saved the sum that was normalised (None without a residual) and its means
    and factors; `y` and the sum are contiguous and of x's shape."""
    dim = x.shape[-1]
    x, inner, x_outer, x_inner = _rows_of(x)
    rows = x.numel() // dim if dim else 0
    y = x.new_empty(x.shape)
    total = x.new_empty(x.shape) if save and residual is not None else None
    stats = torch.empty(2, rows, dtype=torch.float32, device=x.device) if save else (None, None)
    if rows:
        block_rows, block, warps = tile(dim)
        _forward[(triton.cdiv(rows, block_rows),)](
            x,
            residual,
            weight,
            bias,
            y,
            total,
            stats[0],
            stats[1],
            rows,
            inner,
            x_outer,
            x_inner,
            dim,
            eps,
            offset,
            LAYER=layer,
            ADD=residual is not None,
            BIAS=bias is not None,
            SHIFT=offset != 0.0,
            SAVE=save,
            ROWS=block_rows,
            BLOCK=block,
            num_warps=warps,
            **launch_options(x.device),
        )
    return y, total, stats


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, offset, layer):
        y, total, stats = _run_forward(x, residual, weight, bias, eps, offset, layer, True)
        ctx.save_for_backward(x if total is None else total, weight, stats)
        ctx.offset, ctx.layer = offset, layer
        ctx.bias_dtype = bias.dtype if bias is not None else None
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        x, weight, stats = ctx.saved_tensors
        _, wants_residual, wants_weight, wants_bias = ctx.needs_input_grad[:4]
        shape, dim = x.shape, x.shape[-1]
        x, inner, x_outer, x_inner = _rows_of(x)
        dy = dy.contiguous()
        dx = torch.empty(shape, dtype=x.dtype, device=x.device)
        rows = stats.shape[1]
        block_rows, block, warps = tile(dim)
        programs = max(1, min(2 * multiprocessors(x.device), triton.cdiv(rows, block_rows)))
        parts = torch.empty(2, programs, dim, dtype=torch.float32, device=x.device)
        _backward[(programs,)](
            x,
            weight,
            stats[0],
            stats[1],
            dy,
            dx,
            parts[0],
            parts[1],
            rows,
            inner,
            x_outer,
            x_inner,
            dim,
            ctx.offset,
            LAYER=ctx.layer,
            WEIGHT=wants_weight,
            BIAS=wants_bias,
            ROWS=block_rows,
            BLOCK=block,
            num_warps=min(2 * warps, 16),
        )
        dw = parts[0].sum(0).to(weight.dtype) if wants_weight else None
        db = parts[1].sum(0).to(ctx.bias_dtype) if wants_bias else None
        return dx, dx if wants_residual else None, dw, db, None, None, None


def _norm(x, residual, weight, bias, eps, offset, layer):
    dim = x.shape[-1]
    if weight.shape != (dim,):
        raise RequestError(f"norm of rows of {dim} got a weight of shape {list(weight.shape)}")
    if dim > MAX_DIM:
        raise RequestError(f"norm kernel takes rows of at most {MAX_DIM}; got {dim}: use the reference")
    if residual is not None:
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise RequestError(
                f"residual is {residual.dtype} {list(residual.shape)}; expected {x.dtype} {list(x.shape)}"
            )
        residual = residual.contiguous()
    inputs = (x, residual, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Norm.apply(x, residual, weight, bias, eps, offset, layer)
    return _run_forward(x, residual, weight, bias, eps, offset, layer, False)[0].view(x.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """As `kernels.norm.rms_norm`, in one pass each way. `x` `[..., dim]`; a 3-d x may have any strides in
    front of a contiguous last dimension (the heads of a fused projection)."""
    return _norm(x, None, weight, None, eps, offset, False)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """As `kernels.norm.layer_norm`, in one pass each way."""
    return _norm(x, None, weight, bias, eps, 0.0, True)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """As `kernels.norm.add_rms_norm`, in one pass each way; only for a backward pass is the sum written."""
    return _norm(x, residual, weight, None, eps, offset, False)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """As `kernels.norm.add_layer_norm`, in one pass each way; only for a backward pass is the sum written."""
    return _norm(x, residual, weight, bias, eps, 0.0, True)
