"""Triton kernels around the products of a mixture of experts: the choice, rows sorted by expert, the sum.

Rows (a token and one of its choices) are sorted by expert and cut into tiles that never span two experts. The
map from tiles to experts is made on the device, for a grid that the host bounds by `rows // block + experts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from taut.kernels import moe
from taut.kernels.device import launch_options

# Up to so many rows one program sorts them; more are PyTorch's to sort.
ONE_PROGRAM = 1024


@dataclass(frozen=True)
class Plan:
    """Which rows are whose. Row i is choice `i % chosen` of token `i // chosen`.

    `order` int32 `[rows]`: the rows sorted by expert; `offsets` int32 `[experts + 1]`: where each expert's
    begin among them; `tile_expert` and `tile_row` int32 `[tiles]`: the expert of each tile of at most `block`
    sorted rows, -1 for none, and its first row.
    """

    rows: int
    chosen: int
    experts: int
    block: int
    order: Tensor
    offsets: Tensor
    tile_expert: Tensor
    tile_row: Tensor


@triton.jit
def _route(
    scores, weights, chosen, experts, row,
    CHOSEN: tl.constexpr, NORMALISED: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Shares of the best experts of one token, best first, and which they are."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    s = tl.load(scores + token * row + e, mask=e < experts, other=float("-inf")).to(tl.float32)
    shares = tl.exp(s - tl.max(s, 0))
    # Scores that aren't finite must not choose an expert that there is not; but all shares become NaN.
    left = tl.where(e < experts, tl.where(s == s, tl.maximum(s, -3.4e38), -3.4e38), float("-inf"))
    c = tl.arange(0, WIDTH)
    best = tl.zeros([WIDTH], tl.float32)
    for i in tl.static_range(CHOSEN):
        at = tl.min(tl.where(left == tl.max(left, 0), e, BLOCK), 0)
        tl.store(chosen + token * CHOSEN + i, at)
        best = tl.where(c == i, tl.sum(tl.where(e == at, shares, 0.0), 0), best)
        left = tl.where(e == at, float("-inf"), left)
    total = tl.sum(best, 0) + tl.sum(shares * 0.0, 0) if NORMALISED else tl.sum(shares, 0)
    tl.store(weights + token * CHOSEN + c, best / total, mask=c < CHOSEN)


@triton.jit
def _write_tiles(tile_expert, tile_row, before, count, t, tiles, e, experts, ROWS: tl.constexpr):
    """Entries `t` of the map, from how many rows come before each expert's and how many it has."""
    needed = (count + ROWS - 1) // ROWS
    end = tl.cumsum(needed, 0)
    expert = tl.sum(((end[None, :] <= t[:, None]) & (e < experts)[None, :]).to(tl.int32), 1)
    own = e[None, :] == expert[:, None]
    first = before[None, :] + (t[:, None] - (end - needed)[None, :]) * ROWS
    tl.store(tile_expert + t, tl.where(expert < experts, expert, -1), mask=t < tiles)
    tl.store(tile_row + t, tl.sum(tl.where(own, first, 0), 1), mask=t < tiles)


@triton.jit(do_not_specialize=["rows", "tiles"])
def _arrange(
    chosen, order, offsets, tile_expert, tile_row, rows, experts, tiles, BLOCK: tl.constexpr,
    EXPERTS: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All of a `Plan` in one program: a row's place is how many come before it."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    i = tl.arange(0, BLOCK)
    e = tl.arange(0, EXPERTS)
    mine = tl.load(chosen + i, mask=i < rows, other=0).to(tl.int32)
    place = tl.zeros([BLOCK], tl.int32)
    before = tl.zeros([EXPERTS], tl.int32)
    count = tl.zeros([EXPERTS], tl.int32)
    for start in range(0, rows, STEP):
        j = start + tl.arange(0, STEP)
        other = tl.load(chosen + j, mask=j < rows, other=EXPERTS).to(tl.int32)  # past all experts
        earlier = (other[None, :] == mine[:, None]) & (j[None, :] < i[:, None])
        place += tl.sum(((other[None, :] < mine[:, None]) | earlier).to(tl.int32), 1)
        before += tl.sum((other[None, :] < e[:, None]).to(tl.int32), 1)
        count += tl.sum((other[None, :] == e[:, None]).to(tl.int32), 1)
    tl.store(order + place, i, mask=i < rows)
    tl.store(offsets + e, before, mask=e < experts)
    tl.store(offsets + experts, rows)
    for start in range(0, tiles, STEP):
        t = start + tl.arange(0, STEP)
        _write_tiles(tile_expert, tile_row, before, count, t, tiles, e, experts, ROWS)


@triton.jit(do_not_specialize=["tiles"])
def _map(
    offsets, tile_expert, tile_row, experts, tiles, EXPERTS: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    e = tl.arange(0, EXPERTS)
    before = tl.load(offsets + e, mask=e < experts, other=0)
    count = tl.load(offsets + e + 1, mask=e < experts, other=0) - before
    t = tl.program_id(0) * STEP + tl.arange(0, STEP)
    _write_tiles(tile_expert, tile_row, before, count, t, tiles, e, experts, ROWS)


def arrange(chosen: Tensor, experts: int, block: int) -> Plan:
    """The plan for `chosen` `[tokens, chosen]` with tiles of at most `block` rows."""
    rows, device = chosen.numel(), chosen.device
    tiles = rows // block + min(experts, rows)
    new = partial(torch.empty, dtype=torch.int32, device=device)
    tile_expert, tile_row = new(tiles), new(tiles)
    wide = triton.next_power_of_2(experts)
    if rows <= ONE_PROGRAM:
        order, offsets = new(rows), new(experts + 1)
        size = max(triton.next_power_of_2(rows), 16)
        _arrange[(1,)](
            chosen.contiguous(), order, offsets, tile_expert, tile_row, rows, experts, tiles, BLOCK=size,
            EXPERTS=wide, STEP=16, ROWS=block, num_warps=8 if size > 256 else 4, **launch_options(device),
        )  # fmt: skip
    else:
        own, order = chosen.flatten().sort(stable=True)
        order = order.int()
        each = torch.arange(experts + 1, dtype=own.dtype, device=device)
        offsets = torch.searchsorted(own, each, out_int32=True)
        _map[(triton.cdiv(tiles, 16),)](
            offsets, tile_expert, tile_row, experts, tiles, EXPERTS=wide, STEP=16, ROWS=block, num_warps=4,
            **launch_options(device),
        )  # fmt: skip
    return Plan(rows, chosen.shape[1], experts, block, order, offsets, tile_expert, tile_row)


def route(scores: Tensor, chosen: int, normalised: bool) -> tuple[Tensor, Tensor]:
    """As `kernels.moe.route`, in one launch where no gradient is wanted; equal scores choose the first."""
    if torch.is_grad_enabled() and scores.requires_grad:
        return moe.route(scores, chosen, normalised)
    tokens, experts = scores.shape
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    weights = torch.empty(tokens, chosen, dtype=torch.float32, device=scores.device)
    numbers = torch.empty(tokens, chosen, dtype=torch.int32, device=scores.device)
    if tokens:
        _route[(tokens,)](
            scores, weights, numbers, experts, scores.stride(0), CHOSEN=chosen, NORMALISED=normalised,
            BLOCK=triton.next_power_of_2(experts), WIDTH=triton.next_power_of_2(chosen), num_warps=1,
            **launch_options(scores.device),
        )  # fmt: skip
    return weights, numbers


# -------------------------------------------------------------------------------------------------- the sum


@triton.jit
def _combine(
    each, weights, residual, out, dim, CHOSEN: tl.constexpr, WEIGHTED: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < dim
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(CHOSEN):
        y = tl.load(each + (token * CHOSEN + i) * dim + at, mask=inside, other=0.0).to(tl.float32)
        total += y * tl.load(weights + token * CHOSEN + i) if WEIGHTED else y
    if RESIDUAL:
        total += tl.load(residual + token * dim + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * dim + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _combine_backward(
    each, weights, grad, d_each, d_weights, dim,
    CHOSEN: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    products = tl.zeros([WIDTH], tl.float32)
    for start in range(0, dim, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < dim
        d = tl.load(grad + token * dim + at, mask=inside, other=0.0).to(tl.float32)
        for i in tl.static_range(CHOSEN):
            row = (token * CHOSEN + i) * dim + at
            y = tl.load(each + row, mask=inside, other=0.0).to(tl.float32)
            products = tl.where(c == i, products + tl.sum(y * d, 0), products)
            share = tl.load(weights + token * CHOSEN + i)
            tl.store(d_each + row, (d * share).to(d_each.dtype.element_ty), mask=inside)
    tl.store(d_weights + token * CHOSEN + c, products, mask=c < CHOSEN)


def combine(each: Tensor, weights: Tensor | None, residual: Tensor | None) -> Tensor:
    """`residual + sum over c of weights[:, c] * each[:, c]` in float32, rounded once, always added up in that
    order: `each` `[tokens, chosen, dim]` contiguous, `weights` float32 `[tokens, chosen]`. No gradients."""
    tokens, chosen, dim = each.shape
    out = torch.empty(tokens, dim, dtype=each.dtype, device=each.device)
    if out.numel():
        block = min(triton.next_power_of_2(dim), 1024)
        _combine[tokens, triton.cdiv(dim, block)](
            each, weights, None if residual is None else residual.contiguous(), out, dim, CHOSEN=chosen,
            WEIGHTED=weights is not None, RESIDUAL=residual is not None, BLOCK=block, num_warps=4,
            **launch_options(each.device),
        )  # fmt: skip
    return out


class Combine(torch.autograd.Function):
    """`combine` with gradients."""

    @staticmethod
    def forward(ctx, each: Tensor, weights: Tensor, residual: Tensor | None) -> Tensor:
        ctx.save_for_backward(each, weights)
        return combine(each, weights, residual)

    @staticmethod
    def backward(ctx, grad: Tensor):
        each, weights = ctx.saved_tensors
        tokens, chosen, dim = each.shape
        grad = grad.contiguous()
        d_each, d_weights = torch.empty_like(each), torch.empty_like(weights)
        if tokens:
            _combine_backward[(tokens,)](
                each, weights, grad, d_each, d_weights, dim,
                CHOSEN=chosen, WIDTH=triton.next_power_of_2(chosen),
                BLOCK=min(triton.next_power_of_2(dim), 1024), num_warps=4,
            )  # fmt: skip
        return d_each, d_weights, grad if ctx.needs_input_grad[2] else None
