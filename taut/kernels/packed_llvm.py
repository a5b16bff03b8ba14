"""Packed weights as the CPU's kernels read them, for `gemv_llvm`; and unpacking them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cache, reduce
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from taut.kernels.arithmetic_llvm import PAIRED, unpaired, write
from taut.kernels.dispatch import compiled_refuses
from taut.kernels.gemv_llvm import AHEAD, MAX_ROWS, Format
from taut.kernels.llvm import LANES, Builder, Type, Value, Var, has
from taut.kernels.threads import Kernel

_STEP = 2 * LANES
_WIDE, _BYTES = Type("f32", LANES), Type("i8", LANES)
_SCALES = {torch.float16: "f16", torch.float32: "f32", torch.uint8: "i8"}


def _scale(b: Builder, place: Value, index: Value, dtype: torch.dtype) -> Value:
    return b.convert(b.load(place, index, _SCALES[dtype]), "f32")


@dataclass(frozen=True)
class Nibbles(Format):
    """4-bit codes, two neighbours a byte, and a scale for each `block` of them, a multiple of 32 in the order
    of rows: a value is `values[code] * scale`, plus the block's minimum if it has one. `high`: the first of a
    pair is in the high half. Scales of one byte are codes themselves: `levels[code] * nested + shift` of
    `nest` blocks.

    `tensors`: codes, scale, minimum, levels, nested, shift, those that it has.
    """

    values: tuple[float, ...]
    block: int
    high: bool
    scale: torch.dtype
    minimum: torch.dtype | None = None
    nest: int = 256
    tensors = ("codes", "scale", "minimum", "levels", "nested", "shift")
    order = PAIRED

    def for_one_row(self, dtype: torch.dtype, inputs: int) -> Format:
        if self.minimum is None or self.block != _STEP or self.high or not _counts(dtype, inputs):
            return self
        return Counts(4, self.scale, self.minimum, self.tensors)

    def vectors(self, b: Builder, a: SimpleNamespace, row: Value, i: Value) -> list[Value]:
        at = row * a.inputs + i
        place = b.at(a.codes, at // 2, "i8")
        b.prefetch(place, AHEAD, "i8")
        codes = b.convert(b.load(place, 0, _BYTES), "i32")
        values = b.vector(self.values, "f32") * b.splat(self._scale(b, a, at // self.block))
        if self.minimum is not None:
            values = values + b.splat(_scale(b, a.minimum, at // self.block, self.minimum))
        low, high = _looked_up(b, values, codes & 15), _looked_up(b, values, codes >> 4)
        return [high, low] if self.high else [low, high]

    def _scale(self, b: Builder, a: SimpleNamespace, block: Value) -> Value:
        if self.scale is not torch.uint8:
            return _scale(b, a.scale, block, self.scale)
        level = b.load(a.levels, b.convert(b.load(a.scale, block, "i8"), "i64"), "f32")
        nest = block // self.nest
        return level * b.load(a.nested, nest, "f32") + b.load(a.shift, nest, "f32")


def _looked_up(b: Builder, values: Value, index: Value) -> Value:
    """The lanes of `values` that the lanes of `index` name."""
    if has("avx512f"):
        return b.intrinsic("x86.avx512.permvar.sf.512", _WIDE, values, index)
    if has("avx2"):
        half, eight = LANES // 2, Type("f32", LANES // 2)
        low, high = (b.shuffle(values, range(n, n + half)) for n in (0, half))
        parts = []
        for n in (0, half):
            part = b.shuffle(index, range(n, n + half))
            below, above = (b.intrinsic("x86.avx2.permps", eight, side, part) for side in (low, high))
            parts.append(b.select(part < half, below, above))
        return b.shuffle(parts[0], range(LANES), parts[1])
    table, found = b.array("f32", LANES), None
    b.store(values, table, 0)
    for lane in range(LANES):
        value = b.load(table, b.convert(b.lane(index, lane), "i64"), "f32")
        found = b.insert(b.const(0.0, _WIDE) if found is None else found, value, lane)
    return found


@dataclass(frozen=True)
class Bytes(Format):
    """Signed 8-bit codes and a scale, times `factor`: one for each `block` of them, a multiple of 32, or with
    `block` 0 one a row. `tensors`: codes, scale."""

    scale: torch.dtype
    block: int = 0
    factor: float = 1.0
    tensors = ("codes", "scale")

    @property
    def most(self) -> int:
        return MAX_ROWS if self.block else MAX_ROWS // 2  # with one scale a row, LLM.int8() is faster then

    def for_one_row(self, dtype: torch.dtype, inputs: int) -> Format:
        if self.block != _STEP or self.factor != 1.0 or not _counts(dtype, inputs):
            return self
        return Counts(8, self.scale, None, self.tensors)

    def vectors(self, b: Builder, a: SimpleNamespace, row: Value, i: Value) -> list[Value]:
        at = row * a.inputs + i
        place = b.at(a.codes, at, "i8")
        b.prefetch(place, AHEAD, "i8")
        found = [b.convert(b.load(place, n, _BYTES), "i32", signed=True) for n in (0, LANES)]
        found = [b.convert(v, "f32", signed=True) for v in found]
        if self.block:
            scale = b.splat(_scale(b, a.scale, at // self.block, self.scale))
            found = [v * scale for v in found]
        return found

    def finish(self, b: Builder, a: SimpleNamespace, row: Value, total: Value) -> Value:
        return total if self.block else total * (_scale(b, a.scale, row, self.scale) * self.factor)


def _counts(dtype: torch.dtype, inputs: int) -> bool:
    """Whether 16-bit integers with a scale hold an x of this dtype, and rows have a vector of scales."""
    return dtype is not torch.float32 and inputs >= _STEP * LANES


def _lined(count: Any) -> Any:
    """So many float32, or more that whole lines of a cache hold."""
    return (count + (LANES - 1)) // LANES * LANES


@dataclass(frozen=True)
class Counts(Format):
    """4-bit codes of values 0 to 15, the first of a pair in the low half, or signed 8-bit ones, with a scale
    and perhaps a minimum for each 32, for one row of x: codes are multiplied as integers with x, which has a
    scale of its own for each 32 and 16 bits, twice those of bfloat16 and more.

    A row of x is these integers, then for each 32 of them their scale, their sum, and room for the products
    of both scales.
    """

    bits: int
    scale: torch.dtype
    minimum: torch.dtype | None
    tensors: tuple[str, ...]

    @property
    def order(self) -> tuple[int, ...]:
        return PAIRED if self.bits == 4 else tuple(range(_STEP))

    def room(self, inputs: int) -> int:
        return 2 * inputs + 3 * 4 * _lined(inputs // _STEP)

    def put(self, b: Builder, a: SimpleNamespace, x: Value, i: Value, values: Value) -> None:
        total = b.total(values)
        most = b.largest(b.intrinsic(f"fabs.{values.type.mangled}", values.type, values))
        inverse = b.select(most > 0.0, 32767.0 / most, 0.0)
        whole = b.intrinsic(f"rint.{values.type.mangled}", values.type, values * b.splat(inverse, _STEP))
        whole = b.convert(b.convert(whole, "i32", signed=True), "i16")
        b.store(b.shuffle(whole, self.order), x, i)
        # What is not finite in x has no integer: its scale is not finite either then.
        b.store(b.fma(total, 0.0, most * (1 / 32767)), self._beside(b, a, x, 0), i // _STEP)
        b.store(total, self._beside(b, a, x, 1), i // _STEP)

    def _beside(self, b: Builder, a: SimpleNamespace, x: Value, which: int) -> Value:
        """Where the numbers for each 32 inputs are."""
        return b.at(b.at(x, a.inputs, "i16"), _lined(a.inputs // _STEP) * which, "f32")

    def dot(self, b: Builder, a: SimpleNamespace, x: list[Value], row: Value) -> list[Value]:
        (x,) = x
        groups = a.inputs // _STEP
        own, sums, both = (self._beside(b, a, x, which) for which in range(3))
        start, fresh = row * groups, b.var(0.0, _WIDE)

        def scales(g: Value, known: Value | None = None) -> None:
            """The 16 scales from `g` on; the first `known` were there already."""
            scale = b.convert(b.load(a.scale, start + g, Type(_SCALES[self.scale], LANES)), "f32")
            b.store(scale * b.load(own, g, _WIDE), both, g)
            if self.minimum is not None:
                least = b.convert(b.load(a.minimum, start + g, Type(_SCALES[self.minimum], LANES)), "f32")
                total = b.load(sums, g, _WIDE)
                if known is not None:
                    new = b.vector(range(LANES), "i32") >= b.convert(known, "i32")
                    total = b.select(new, total, 0.0)
                fresh.value = b.fma(least, total, fresh.value)

        whole = groups - groups % LANES
        # What a vector at the end knows already is written again, as it is read fastest: by whole lines.
        with b.when(whole < groups):
            scales(groups - LANES, LANES - (groups - whole))
        with b.loop(0, whole, LANES) as g:
            scales(g)
        half = Type("f32", LANES // 2 if self.bits == 4 else LANES)
        totals = [b.var(0.0, half) for _ in range(4)]

        def add(g: Value, total: Var) -> None:
            factor = b.splat(b.load(both, g, "f32"), half.lanes)
            count = b.convert(self._count(b, a, x, row, g), "f32", signed=True)
            total.value = b.fma(count, factor, total.value)

        fours = groups - groups % 4
        with b.loop(0, fours, 4) as g:
            for n, total in enumerate(totals):
                add(g + n, total)
        with b.loop(fours, groups) as g:
            add(g, totals[0])
        return [b.total(reduce(operator.add, [t.value for t in totals])) + b.total(fresh.value)]

    def _count(self, b: Builder, a: SimpleNamespace, x: Value, row: Value, g: Value) -> Value:
        """The products of 32 codes and x, added to a few int32."""
        at = row * a.inputs + g * _STEP
        place = b.at(a.codes, at // (8 // self.bits), "i8")
        b.prefetch(place, AHEAD, "i8")
        if self.bits == 8:
            codes = b.convert(b.load(place, 0, Type("i8", _STEP)), "i16", signed=True)
            return b.pairs(codes, b.load(x, g * _STEP, Type("i16", _STEP)))
        codes, wide = b.convert(b.load(place, 0, _BYTES), "i16"), Type("i16", LANES)
        low, high = (b.load(x, g * _STEP + n, wide) for n in (0, LANES))
        return b.pairs(codes & 15, low) + b.pairs(codes >> 4, high)


@cache
def _unpacking(weight: Format, dtype: torch.dtype, picked: bool) -> Kernel:
    fields = dict.fromkeys((*weight.tensors, "index", "out"), "ptr") | {"rows": "i64", "inputs": "i64"}

    def body(b: Builder, a: SimpleNamespace) -> None:
        first, last = b.share(a.rows)
        with b.loop(first, last) as n:
            row = b.load(a.index, n, "i64") if picked else n
            with b.loop(0, a.inputs, weight.step) as i:
                values = weight.vectors(b, a, row, i)
                if weight.order == PAIRED:
                    values = unpaired(b, *values)
                for at, value in enumerate(values):
                    value = weight.finish(b, a, row, value)
                    write(b, value, a.out, n * a.inputs + i + at * LANES, dtype)

    return Kernel(fields, body)


def refuses(
    weight: Format, tensors: tuple[Tensor | None, ...], inputs: int, dtype: torch.dtype
) -> str | None:
    """Why `unpack` can't give the values of a weight of so many inputs in a dtype, or None."""
    if (why := compiled_refuses(torch.empty(0, dtype=dtype, device=tensors[0].device))) is not None:
        return why
    if inputs % weight.step:
        return f"wants inputs divisible by {weight.step}; there are {inputs}"
    return None


def unpack(
    weight: Format,
    tensors: tuple[Tensor | None, ...],
    shape: tuple[int, int],
    dtype: torch.dtype,
    index: Tensor | None = None,
) -> Tensor:
    """The values `[outputs, inputs]`, or those of the rows that `index`, int64 `[n]`, names; computed in
    float32 and rounded once."""
    rows, inputs = shape[0] if index is None else index.shape[0], shape[1]
    out = torch.empty(rows, inputs, dtype=dtype)
    _unpacking(weight, dtype, index is not None)(*tensors, index, out, rows, inputs)
    return out
