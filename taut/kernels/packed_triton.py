"""Triton kernels of packed weights: one row by NF4 and FP4, up to 64 by int8, and unpacking to 16 bit.

A 4-bit block's scale multiplies the block's part of the sum, not its values; scales that are codes themselves
are decoded in the kernel. More rows than these are dense products of the unpacked weight: on an H100, 8 rows
by 4 bits on tensor cores took three times as long.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 64  # of int8; 4-bit codes: one


@dataclass(frozen=True)
class Scales:
    """Scales of 4-bit blocks: float32 `[blocks]`; or, doubly quantized, uint8 `[blocks]` into `table`
    float32 `[256]`, times `nested` plus `offset`, float32 `[blocks / 256]` each."""

    absmax: Tensor
    table: Tensor | None = None
    nested: Tensor | None = None
    offset: Tensor | None = None


@cache
def _decoder(values: tuple[float, ...]) -> str:
    """PTX that turns four bytes, eight codes into 16 `values`, into float16: `$0, $1` of the low halves of
    the bytes, `$2, $3` of the high halves.

    A byte permutation looks up four codes at once among eight bytes; two of them and a third that picks by
    the code's highest bit make a table of 16, and two such planes the two bytes of each value.
    """
    raw = struct.unpack("16H", struct.pack("16e", *values))
    planes = [bytes(half >> shift & 255 for half in raw) for shift in (0, 8)]
    lines = [".reg .b32 w, s, t, p, q, l, h;"]
    for at, (low, high) in enumerate((("$0", "$2"), ("$1", "$3"))):
        lines += [f"shr.b32 w, $4, {16 * at};", "and.b32 s, w, 0x7777;"]
        lines += ["shr.b32 t, w, 1;", "and.b32 t, t, 0x4444;", "or.b32 t, t, 0x3210;"]
        for plane, table in zip("lh", planes, strict=True):
            a, b, c, d = struct.unpack("4I", table)
            lines += [f"mov.b32 p, {a};", f"mov.b32 q, {b};", f"prmt.b32 {plane}, p, q, s;"]
            lines += [f"mov.b32 p, {c};", f"mov.b32 q, {d};", "prmt.b32 p, p, q, s;"]
            lines += [f"prmt.b32 {plane}, {plane}, p, t;"]
        lines += [f"prmt.b32 {low}, l, h, 0x6240;", f"prmt.b32 {high}, l, h, 0x7351;"]
    return "{ " + " ".join(lines) + " }"


@triton.jit
def _decode(packed, values, ASM: tl.constexpr):
    """The values of the high and the low halves of `packed` uint8, float32: by table where ASM is empty."""
    if ASM == "":
        code = packed.to(tl.int32)
        high, low = tl.load(values + (code >> 4)), tl.load(values + (code & 15))
    else:
        low16, high16 = tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
        high, low = high16.to(tl.float32), low16.to(tl.float32)
    return high, low


@triton.jit
def _scale(absmax, scale_table, nested, offset, at, inside, DOUBLE: tl.constexpr):
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
def _one_row4(
    x, codes, values, absmax, scale_table, nested, offset, bias, y, outputs, inputs,
    BLOCK: tl.constexpr, DOUBLE: tl.constexpr, BIAS: tl.constexpr, ASM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = n.to(tl.int64)[:, None]
    acc = tl.zeros((BN,), tl.float32)
    for start in range(0, inputs, BK):
        half = start // 2 + tl.arange(0, BK // 2)
        inside = (n < outputs)[:, None] & (half < inputs // 2)[None, :]
        packed = tl.load(codes + row * (inputs // 2) + half[None, :], mask=inside, other=0)
        k = start + tl.arange(0, BK)
        pairs = tl.load(x + k, mask=k < inputs, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.reshape(pairs, (BK // 2, 2)))
        high, low = _decode(packed, values, ASM)
        part = high * even[None, :] + low * odd[None, :]
        sums = tl.sum(tl.reshape(part, (BN, BK // BLOCK, BLOCK // 2)), 2)  # [BN, BK / BLOCK]
        block = start // BLOCK + tl.arange(0, BK // BLOCK)
        known = (n < outputs)[:, None] & (block < inputs // BLOCK)[None, :]
        at = row * (inputs // BLOCK) + block[None, :]
        acc += tl.sum(sums * _scale(absmax, scale_table, nested, offset, at, known, DOUBLE), 1)
    if BIAS:
        acc += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)
    tl.store(y + n, acc, mask=n < outputs)


@triton.jit
def _one_row8(
    x, values, scale, bias, y, outputs, inputs,
    BIAS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    acc = tl.zeros((BN,), tl.float32)
    for start in range(0, inputs, BK):
        k = start + tl.arange(0, BK)
        inside = (n < outputs)[:, None] & (k < inputs)[None, :]
        w = tl.load(values + n.to(tl.int64)[:, None] * inputs + k[None, :], mask=inside, other=0)
        acc += tl.sum(
            w.to(tl.float32) * tl.load(x + k, mask=k < inputs, other=0.0).to(tl.float32)[None, :], 1
        )
    acc *= tl.load(scale + n, mask=n < outputs, other=0.0) * (1 / 127)
    if BIAS:
        acc += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)
    tl.store(y + n, acc, mask=n < outputs)


@triton.jit
def _few_rows8(
    x, values, scale, bias, y, rows, outputs, inputs,
    BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, inputs, BK):
        k = start + tl.arange(0, BK)
        inside = (n < outputs)[:, None] & (k < inputs)[None, :]
        w = tl.load(values + n.to(tl.int64)[:, None] * inputs + k[None, :], mask=inside, other=0)
        there = (m < rows)[:, None] & (k < inputs)[None, :]
        a = tl.load(x + m[:, None] * inputs + k[None, :], mask=there, other=0.0)
        acc = tl.dot(a, tl.trans(w.to(a.dtype)), acc)  # 8-bit integers are exact in 16-bit floats
    acc *= (tl.load(scale + n, mask=n < outputs, other=0.0) * (1 / 127))[None, :]
    if BIAS:
        acc += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[None, :]
    there = (m < rows)[:, None] & (n < outputs)[None, :]
    tl.store(y + m[:, None] * outputs + n[None, :], acc, mask=there)


@triton.jit
def _unpack4(
    codes, values, absmax, scale_table, nested, offset, out, count,
    BLOCK: tl.constexpr, DOUBLE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    byte = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = 2 * byte < count
    packed = tl.load(codes + byte, mask=inside, other=0)
    scale = _scale(absmax, scale_table, nested, offset, 2 * byte // BLOCK, inside, DOUBLE)
    high, low = _decode(packed, values, "")  # exact, and bound by what it writes
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


def refuses(x: Tensor, block: int | None = None) -> str | None:
    """Why these products can't take `x` `[rows, inputs]`, None if they can; `block` for 4-bit codes."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    most = MAX_ROWS if block is None else 1
    if not 0 < x.shape[0] <= most:
        return f"takes up to {most} row{'s' * (most > 1)}, not {x.shape[0]}"
    if block is not None and (x.shape[1] % block or block > 1024):
        return f"wants rows of whole blocks, of at most 1024; inputs are {x.shape[1]} in blocks of {block}"
    return None


def product4(
    x: Tensor,
    codes: Tensor,
    values: Tensor,
    host: tuple[float, ...],
    scales: Scales,
    block: int,
    outputs: int,
    bias: Tensor | None,
) -> Tensor:
    """`x W^T + bias` `[1, outputs]` for one row `x` `[1, inputs]`; `codes` uint8
    `[outputs * inputs / 2]`, the first of a pair in the high half, into `values` float32 `[16]`, which are
    `host` too. A GPU rounds the values to float16. Sums are float32. For what `refuses` accepts; no
    gradients."""
    x = x.contiguous()
    inputs = x.shape[1]
    y = torch.empty(1, outputs, dtype=x.dtype, device=x.device)
    asm = _decoder(host) if x.is_cuda else ""  # the interpreter knows no PTX
    _one_row4[(triton.cdiv(outputs, 2),)](
        x, codes, values, scales.absmax, scales.table, scales.nested, scales.offset, bias, y, outputs, inputs,
        BLOCK=block, DOUBLE=scales.table is not None, BIAS=bias is not None, ASM=asm,
        BN=2, BK=1024, num_warps=1,
    )  # fmt: skip
    return y


def product8(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + bias` `[rows, outputs]` for 1 to 64 rows, with `W = values * scale / 127` int8 `[outputs,
    inputs]` by float32 `[outputs]`. Activations stay as they are; sums are float32. No gradients."""
    x = x.contiguous()
    rows, inputs = x.shape
    outputs = values.shape[0]
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    biased = bias is not None
    if rows == 1:
        grid = (triton.cdiv(outputs, 2),)
        _one_row8[grid](x, values, scale, bias, y, outputs, inputs, BIAS=biased, BN=2, BK=2048, num_warps=4)
        return y
    bm = max(16, triton.next_power_of_2(rows))
    bn = 32 if bm < 64 else 64
    grid = (triton.cdiv(outputs, bn),)
    _few_rows8[grid](
        x, values, scale, bias, y, rows, outputs, inputs, BIAS=biased, BM=bm, BN=bn, BK=128, num_warps=4
    )
    return y


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
