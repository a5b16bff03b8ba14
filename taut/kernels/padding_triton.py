"""Triton kernels between padded grids and packed rows: two launches find all that packing needs to know."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taut.kernels.padding import Places

_BLOCK = 1024


@triton.jit(do_not_specialize=["mask", "width", "outer"])
def _count(mask, counts, width, outer, inner, BLOCK: tl.constexpr):
    """Tokens of each row; a program a row. `outer` and `inner` are the strides of the mask."""
    row = tl.program_id(0)
    found = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, width, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        value = tl.load(mask + row.to(tl.int64) * outer + at * inner, mask=at < width, other=0)
        found += (value != 0).to(tl.int32)
    tl.store(counts + row, tl.sum(found, 0))


@triton.jit(do_not_specialize=["mask", "rows", "width", "outer"])
def _place(
    mask, counts, index, token, positions, starts, totals, rows, width, outer, inner, BLOCK: tl.constexpr
):
    """What `Places` holds, of one row a program; the first also writes the number of all tokens and that of
    the longest row to `totals`."""
    row = tl.program_id(0)
    before = tl.zeros([BLOCK], tl.int32)
    whole = tl.zeros([BLOCK], tl.int32)
    longest = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, rows, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        count = tl.load(counts + at, mask=at < rows, other=0)
        before += tl.where(at < row, count, 0)
        whole += count
        longest = tl.maximum(longest, count)
    start = tl.sum(before, 0)
    tl.store(starts + row, start)
    if row == 0:
        tokens = tl.sum(whole, 0)
        tl.store(starts + rows, tokens)
        tl.store(totals, tokens)
        tl.store(totals + 1, tl.max(longest, 0))
    position = 0
    for begin in range(0, width, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        value = tl.load(mask + row.to(tl.int64) * outer + at * inner, mask=at < width, other=0)
        real = value != 0
        rank = position + tl.cumsum(real.to(tl.int32), 0) - 1
        place = row.to(tl.int64) * width + at
        tl.store(index + start + rank, place, mask=real)
        tl.store(positions + start + rank, rank, mask=real)
        tl.store(token + place, tl.where(real, start + rank, -1), mask=at < width)
        position += tl.sum(real.to(tl.int32), 0)


@triton.jit(do_not_specialize=["token"])
def _spread(packed, token, out, dim, outer, BLOCK: tl.constexpr):
    """One place of the grid a program: its token's features, or zeros."""
    place = tl.program_id(0).to(tl.int64)
    source = tl.load(token + place).to(tl.int64)
    for begin in range(0, dim, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        value = tl.load(packed + source * outer + at, mask=(at < dim) & (source >= 0), other=0.0)
        tl.store(out + place * dim + at, value, mask=at < dim)


def places(mask: Tensor) -> Places:
    """As `kernels.padding.places`."""
    rows, width = mask.shape
    mask = mask.view(torch.uint8) if mask.dtype is torch.bool else mask
    size, device = rows * width, mask.device
    index = torch.empty(size, dtype=torch.int64, device=device)
    token, positions, starts, totals, counts = (
        torch.empty(length, dtype=torch.int32, device=device) for length in (size, size, rows + 1, 2, rows)
    )
    strides = mask.stride()
    _count[(rows,)](mask, counts, width, *strides, BLOCK=_BLOCK)
    _place[(rows,)](
        mask, counts, index, token, positions, starts, totals, rows, width, *strides, BLOCK=_BLOCK
    )  # fmt: skip
    tokens, longest = totals.tolist()
    return Places(index[:tokens], token, positions[:tokens], starts, longest)


def spread(packed: Tensor, token: Tensor) -> Tensor:
    """As `kernels.padding.spread`, `[tokens, dim] -> [places, dim]`."""
    packed = packed if packed.stride(1) == 1 else packed.contiguous()
    dim = packed.shape[1]
    out = packed.new_empty(len(token), dim)
    if out.numel():
        block = min(_BLOCK, triton.next_power_of_2(dim))
        _spread[(len(token),)](packed, token, out, dim, packed.stride(0), BLOCK=block, num_warps=2)
    return out
