"""Triton kernels that unpack 4- and 8-bit weights to 16 bit, for products of many rows; those of few are in
`packed_rows`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taut.kernels.packed import Scales


@triton.jit
def scale_of(absmax, scale_table, nested, offset, at, inside, DOUBLE: tl.constexpr):
    """float32 scales of the blocks `at`."""
    if DOUBLE:
        value = tl.load(scale_table + tl.load(absmax + at, mask=inside, other=0).to(tl.int32))
        group = at // 256
        s = value * tl.load(nested + group, mask=inside, other=0.0)
        s += tl.load(offset + group, mask=inside, other=0.0)
    else:
        s = tl.load(absmax + at, mask=inside, other=0.0)
    return s


@triton.jit
def _unpack4(
    codes, values, absmax, scale_table, nested, offset, out, count,
    BLOCK: tl.constexpr, DOUBLE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    byte = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = 2 * byte < count
    packed = tl.load(codes + byte, mask=inside, other=0)
    scale = scale_of(absmax, scale_table, nested, offset, 2 * byte // BLOCK, inside, DOUBLE)
    code = packed.to(tl.int32)
    high, low = tl.load(values + (code >> 4)), tl.load(values + (code & 15))
    pair = tl.join(high * scale, low * scale)
    at = tl.program_id(0).to(tl.int64) * (2 * SIZE) + tl.arange(0, 2 * SIZE)
    tl.store(out + at, tl.reshape(pair, (2 * SIZE,)), mask=at < count)


@triton.jit
def _unpack8(values, scale, out, inputs, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    s = tl.load(scale + row) * (1 / 127)
    w = tl.load(values + row * inputs + k, mask=k < inputs, other=0).to(tl.float32)
    tl.store(out + row * inputs + k, w * s, mask=k < inputs)


def unpack4(
    codes: Tensor, values: Tensor, scales: Scales, block: int, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The values of 4-bit codes, `shape` in `dtype`; blocks may span rows."""
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    grid = (triton.cdiv(out.numel(), 2048),)
    _unpack4[grid](
        codes, values, scales.absmax, scales.table, scales.nested, scales.offset, out, out.numel(),
        BLOCK=block, DOUBLE=scales.table is not None, SIZE=1024, num_warps=4,
    )  # fmt: skip
    return out


def unpack8(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`values * scale / 127` by row, `[outputs, inputs]` in `dtype`."""
    outputs, inputs = values.shape
    out = torch.empty(outputs, inputs, dtype=dtype, device=values.device)
    grid = (outputs, triton.cdiv(inputs, 2048))
    _unpack8[grid](values, scale, out, inputs, SIZE=2048, num_warps=4)
    return out
