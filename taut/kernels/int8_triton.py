"""Triton kernels of LLM.int8() products of many rows (Dettmers et al. 2022): outliers found, activations
quantized and multiplied without the host waiting for any of it.

A column of x in which some value reaches the threshold is taken out of the 8-bit product and multiplied in
16 bit. How many there are is known on the device alone: up to `CAPACITY` are gathered into dense strips, that
the product's last steps multiply; where there are more, all of x is multiplied in 16 bit, by a copy of the
weight that is made for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from taut.kernels.act_triton import activate
from taut.kernels.device import multiprocessors

CAPACITY = 128


@triton.jit(do_not_specialize=["rows", "span"])
def _find(x, flags, rows, inputs, span, threshold, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """Set the flags `[inputs]` of columns in which some value reaches the threshold, in `span` rows each."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = k if EVEN else tl.minimum(k, inputs - 1)
    most = tl.zeros([32, BLOCK], tl.float32)
    first = tl.program_id(1) * span
    for start in range(first, first + span, 32):
        # The last row again and again where there are no more: loads without a mask are under way together.
        row = tl.minimum(start + tl.arange(0, 32), rows - 1)
        v = tl.load(x + row.to(tl.int64)[:, None] * inputs + at[None, :])
        most = tl.maximum(most, tl.abs(v.to(tl.float32)))
    tl.store(flags + k, 1, mask=(k < inputs) & (tl.max(most, 0) >= threshold))  # whoever does: it is a 1


@triton.jit
def _taken(found, CAPACITY: tl.constexpr):
    """How many columns the strips take: none where there are more than they hold."""
    count = tl.load(found)
    return tl.where(count <= CAPACITY, count, 0)


@triton.jit
def _list(flags, found, inputs, BLOCK: tl.constexpr):
    """`found[0]`: how many columns are flagged; `found[1 ..]`: which, in order."""
    k = tl.arange(0, BLOCK)
    flag = tl.load(flags + k, mask=k < inputs, other=0)
    at = tl.cumsum(flag, 0)
    tl.store(found + at, k, mask=flag > 0)
    tl.store(found, tl.sum(flag, 0))


@triton.jit(do_not_specialize=["rows"])
def _quantize(
    x, flags, found, values, scale, strip, rows, inputs,
    OUTLIERS: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of x without its outliers: int8 values and largest magnitude; the outliers go to its row of the
    strip `[rows, CAPACITY]`."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    v = tl.load(x + row * inputs + k, mask=k < inputs, other=0.0).to(tl.float32)
    if OUTLIERS:
        v = tl.where(tl.load(flags + k, mask=k < inputs, other=0) > 0, 0.0, v)
        count = _taken(found, CAPACITY)
        for start in range(0, tl.cdiv(count, 32) * 32, 32):
            c = start + tl.arange(0, 32)
            column = tl.load(found + 1 + c, mask=c < count, other=0)
            out = tl.load(x + row * inputs + column, mask=c < count, other=0.0)
            tl.store(strip + row * CAPACITY + c, out)
    largest = tl.max(tl.abs(v), 0)
    q = v * tl.where(largest > 0, 127.0 / largest, 0.0)
    # To the nearest integer, halves to the even one: that is what adding 1.5 * 2^23 leaves.
    q = (q + 12582912.0) - 12582912.0
    tl.store(values + row * inputs + k, q.to(tl.int8), mask=k < inputs)
    tl.store(scale + row, largest)


@triton.jit
def _gather(weight, weight_scale, found, strip, outputs, inputs, CAPACITY: tl.constexpr, BLOCK: tl.constexpr):
    """Columns of the weight that the outliers meet, as a strip `[outputs, CAPACITY]` in 16 bit."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = _taken(found, CAPACITY)
    s = tl.load(weight_scale + n, mask=n < outputs, other=0.0) * (1 / 127)
    wide = n.to(tl.int64)[:, None]
    for start in range(0, tl.cdiv(count, 32) * 32, 32):
        c = start + tl.arange(0, 32)
        column = tl.load(found + 1 + c, mask=c < count, other=0)
        there = (n < outputs)[:, None]
        w = tl.load(weight + wide * inputs + column[None, :], mask=there & (c < count)[None, :], other=0)
        tl.store(strip + wide * CAPACITY + c[None, :], w.to(tl.float32) * s[:, None], mask=there)


@triton.jit
def _widen(weight, found, wide, count, CAPACITY: tl.constexpr, SIZE: tl.constexpr):
    """The integers of the weight, `count`, in the dtype of `wide`, where the strips hold too few columns."""
    if tl.load(found) > CAPACITY:
        for start in range(tl.program_id(0).to(tl.int64) * SIZE, count, tl.num_programs(0) * SIZE):
            at = start + tl.arange(0, SIZE)
            tl.store(
                wide + at, tl.load(weight + at, mask=at < count).to(wide.dtype.element_ty), mask=at < count
            )


@triton.jit
def _whole(a_at, b_at, total, inputs, k, BK: tl.constexpr, EVEN: tl.constexpr):
    """Adds a tile of `A B^T` over all inputs to `total`."""
    for start in range(0, inputs, BK):
        if EVEN:
            a = tl.load(a_at + start)
            b = tl.load(b_at + start)
        else:
            a = tl.load(a_at + start, mask=(start + k < inputs)[None, :], other=0)
            b = tl.load(b_at + start, mask=(start + k < inputs)[:, None], other=0)
        total = tl.dot(a, b, total, out_dtype=total.dtype)
    return total


@triton.jit
def _strips(y, strip, weight_strip, m, n, rows, last, count, CAPACITY: tl.constexpr):
    """Adds the product of the columns that were taken out to `y`; the weight has `last` rows."""
    wide_m = m.to(tl.int64)[:, None]
    wide_n = n.to(tl.int64)[None, :]
    for start in range(0, tl.cdiv(count, 32) * 32, 32):
        c = start + tl.arange(0, 32)
        a = tl.load(strip + wide_m * CAPACITY + c[None, :], mask=(m < rows)[:, None], other=0.0)
        b = tl.load(weight_strip + wide_n * CAPACITY + c[:, None], mask=(n < last)[None, :], other=0.0)
        y = tl.dot(a, b, y)
    return y


@triton.jit(do_not_specialize=["rows"])
def _product(
    x, values, scale, strip, weight, weight_scale, weight_strip, wide, found, bias, residual, out, rows,
    outputs, inputs,
    OUTLIERS: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr,
    CAPACITY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """A tile of the output: int8 sums over all inputs, scaled, plus what was taken out, bias, activation and
    residual. With ACT the tile's columns are BN / 2 of the gate half, then the same of the up half."""
    HALVES: tl.constexpr = 1 if ACT == "" else 2
    WIDTH: tl.constexpr = BN // HALVES
    down, across = tl.cdiv(rows, BM), tl.cdiv(outputs, WIDTH)
    # Neighbours in time share tiles of x and of the weight in the cache.
    group = tl.program_id(0) // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    inside = tl.program_id(0) % (GROUP * across)
    m = (group * GROUP + inside % height) * BM + tl.arange(0, BM)
    column = tl.arange(0, BN)
    at = inside // height * WIDTH + column % WIDTH  # of the output
    n = at + column // WIDTH * outputs  # of the weight
    k = tl.arange(0, BK)
    real, there = m < rows, at < outputs
    a_from = tl.where(real, m, 0).to(tl.int64)[:, None] * inputs + k[None, :]
    b_from = tl.where(there, n, 0).to(tl.int64)[None, :] * inputs + k[:, None]
    columns = tl.load(weight_scale + n, mask=there, other=0.0) * (1 / 127)
    count = 0
    if OUTLIERS:
        count = tl.load(found)
    if count <= CAPACITY:
        total = _whole(values + a_from, weight + b_from, tl.zeros([BM, BN], tl.int32), inputs, k, BK, EVEN)
        y = total.to(tl.float32) * (tl.load(scale + m, mask=real, other=0.0) * (1 / 127))[:, None]
        y = y * columns[None, :]
        if OUTLIERS:
            y = _strips(y, strip, weight_strip, m, n, rows, HALVES * outputs, count, CAPACITY)
    else:  # more columns than the strips hold: all of them in 16 bit, which is only more exact
        HALF: tl.constexpr = BK // 2  # which take as many bytes
        half = tl.arange(0, HALF)
        a_at = x + tl.where(real, m, 0).to(tl.int64)[:, None] * inputs + half[None, :]
        b_at = wide + tl.where(there, n, 0).to(tl.int64)[None, :] * inputs + half[:, None]
        y = _whole(a_at, b_at, tl.zeros([BM, BN], tl.float32), inputs, half, HALF, EVEN) * columns[None, :]
    if BIAS:
        y += tl.load(bias + n, mask=there, other=0.0).to(tl.float32)[None, :]
    if ACT != "":
        y = tl.trans(tl.reshape(y, [BM, 2, WIDTH]), 0, 2, 1)
        gate, up = tl.split(y)
        y = activate(gate, ACT) * up
        at = inside // height * WIDTH + tl.arange(0, WIDTH)
    keep = real[:, None] & (at < outputs)[None, :]
    place = m.to(tl.int64)[:, None] * outputs + at[None, :]
    if RESIDUAL:
        y += tl.load(residual + place, mask=keep, other=0.0).to(tl.float32)
    tl.store(out + place, y, mask=keep)


def refuses(x: Tensor) -> str | None:
    """Why `product` can't take `x` `[rows, inputs]`, None if it can."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    if x.shape[1] % 16:
        return f"wants inputs divisible by 16, not {x.shape[1]}"
    return None


def product(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    threshold: float,
    bias: Tensor | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
    tile: tuple[int, int, int, int, int] | None = None,
) -> Tensor:
    """`residual + glu(x W^T + bias)`, each part only where asked for, for `W = weight * weight_scale / 127`,
    int8 `[outputs, inputs]` by float32 `[outputs]`.

    Each row of x `[rows, inputs]` is quantized by its largest magnitude, the columns in which some row
    reaches `threshold` (0: none) aside: those are multiplied in x's dtype. With `act`, weight and bias hold
    the gate half, then the up half. Sums are int32 and float32, rounded once, at the end. No gradients.
    """
    x = x.contiguous()
    rows, inputs = x.shape
    outputs = weight.shape[0] // 2 if act else weight.shape[0]
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    values = torch.empty(rows, inputs, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    flags = found = strip = weight_strip = None
    wide = x  # of the dtype; not read without outliers
    outliers = threshold > 0
    block = triton.next_power_of_2(inputs)
    if outliers:
        flags = torch.zeros(inputs, dtype=torch.int32, device=x.device)
        found = torch.empty(inputs + 1, dtype=torch.int32, device=x.device)
        strip = torch.empty(rows, CAPACITY, dtype=x.dtype, device=x.device)
        weight_strip = torch.empty(weight.shape[0], CAPACITY, dtype=x.dtype, device=x.device)
        across = triton.cdiv(inputs, 256)
        span = 32 * triton.cdiv(rows * across, 32 * 4 * multiprocessors(x.device))
        _find[(across, triton.cdiv(rows, span))](
            x, flags, rows, inputs, span, threshold, BLOCK=256, EVEN=inputs % 256 == 0, num_warps=8
        )
        _list[(1,)](flags, found, inputs, BLOCK=block, num_warps=8)
        _gather[(triton.cdiv(weight.shape[0], 32),)](
            weight, weight_scale, found, weight_strip, weight.shape[0], inputs, CAPACITY=CAPACITY, BLOCK=32
        )
        wide = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
        _widen[(8 * multiprocessors(x.device),)](
            weight, found, wide, weight.numel(), CAPACITY=CAPACITY, SIZE=4096, num_warps=8
        )
    _quantize[(rows,)](
        x, flags, found, values, scale, strip, rows, inputs, OUTLIERS=outliers, CAPACITY=CAPACITY,
        BLOCK=block, num_warps=min(max(block // 1024, 1), 16),
    )  # fmt: skip
    bm, bn, bk, warps, stages = tile or tiles(rows, outputs, act is not None, x.device)
    width = bn // 2 if act else bn
    _product[(triton.cdiv(rows, bm) * triton.cdiv(outputs, width),)](
        x, values, scale, strip, weight, weight_scale, weight_strip, wide, found, bias,
        None if residual is None else residual.contiguous(), out, rows, outputs, inputs,
        OUTLIERS=outliers, BIAS=bias is not None, ACT=act or "", RESIDUAL=residual is not None,
        CAPACITY=CAPACITY, BM=bm, BN=bn, BK=bk, GROUP=8, EVEN=inputs % bk == 0, num_warps=warps,
        num_stages=stages,
    )  # fmt: skip
    return out


def tiles(rows: int, outputs: int, gated: bool, device: torch.device) -> tuple[int, int, int, int, int]:
    """Rows, columns of the weight and inputs of a tile, warps and stages; measured on an H100."""
    columns = 2 * outputs if gated else outputs
    many = triton.cdiv(rows, 128) * triton.cdiv(columns, 256) >= 2 * multiprocessors(device)
    return (128, 256, 128, 8, 3) if many else (128, 128, 128, 8, 4)
