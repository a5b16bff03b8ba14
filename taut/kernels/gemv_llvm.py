"""Products of a few rows on the CPU, with what stands around them, by weights in any format: one pass over
the weight, at the speed of memory.

Each thread takes a share of the outputs. It brings the rows of x, normed, into float32 for itself, then reads
its rows of the weight one after the other, as one stream: reading several at once halves the speed of memory.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cache, reduce
from types import SimpleNamespace

import torch
from torch import Tensor

from taut.errors import RequestError
from taut.kernels.arithmetic_llvm import ACTIVATIONS, PAIRED, STORED, read, read_pairs, write
from taut.kernels.dispatch import compiled_refuses
from taut.kernels.llvm import LANES, Builder, Type, Value, has
from taut.kernels.threads import Kernel

MAX_ROWS = 32
_BLOCK = 16  # outputs that are finished together
_CACHE = 32768  # bytes of the first cache, where the rows of x that are multiplied together should be
AHEAD = 2048  # bytes that a stream is fetched ahead of its use


class Format:
    """How a weight `[outputs, inputs]` lies in memory, and how a row of it is multiplied.

    `tensors`: names of its tensors. `step`: inputs that are read at a time, as `each` vectors. `order`: of so
    many inputs, where the x of every lane is. `most`: rows of x for which this is the fastest way. Formats
    are values: kernels are kept for equal ones.
    """

    tensors: tuple[str, ...] = ()
    step = 2 * LANES
    each = 2
    order: tuple[int, ...] = tuple(range(2 * LANES))
    most = MAX_ROWS

    def for_one_row(self, dtype: torch.dtype, inputs: int) -> Format:
        """What reads the same tensors fastest for a single row of x."""
        return self

    def room(self, inputs: int) -> int:
        """Bytes that a row of x takes once it is prepared."""
        return 4 * inputs

    def put(self, b: Builder, a: SimpleNamespace, x: Value, i: Value, values: Value) -> None:
        """Prepare the inputs from `i` on of a row of x, whose place is `x`: `step` lanes of float32."""
        b.store(b.shuffle(values, self.order), x, i)

    def vectors(self, b: Builder, a: SimpleNamespace, row: Value, i: Value) -> list[Value]:
        """The weights of output `row` at the inputs from `i` on, as `add` takes them."""
        raise NotImplementedError

    def add(self, b: Builder, weights: Value, x: Value, i: Value, total: Value) -> Value:
        """`total` and the products of a vector of weights with the x from `i` on."""
        return b.fma(weights, b.load(x, i, Type("f32", LANES)), total)

    def finish(self, b: Builder, a: SimpleNamespace, row: Value, total: Value) -> Value:
        """The sum of a row, as the format's own scale of the row makes it."""
        return total

    def dot(self, b: Builder, a: SimpleNamespace, x: list[Value], row: Value) -> list[Value]:
        """Output `row` for the rows of x at these places. Several sums run side by side, since an addition
        takes as long as it takes to begin four."""
        width = self.step // self.each
        steps = max(1, 4 // (len(x) * self.each))
        wide = Type("f32", LANES)
        sums = [[b.var(0.0, wide) for _ in range(steps * self.each)] for _ in x]

        def add(i: Value, steps: int) -> None:
            for n in range(steps):
                at = i + n * self.step
                for v, weights in enumerate(self.vectors(b, a, row, at)):
                    for own, place in zip(sums, x, strict=True):
                        total = own[n * self.each + v]
                        total.value = self.add(b, weights, place, at + v * width, total.value)

        whole = a.inputs - a.inputs % (steps * self.step)
        with b.loop(0, whole, steps * self.step) as i:
            add(i, steps)
        if steps > 1:
            with b.loop(whole, a.inputs, self.step) as i:
                add(i, 1)
        totals = [b.total(reduce(operator.add, [total.value for total in own])) for own in sums]
        return [self.finish(b, a, row, total) for total in totals]


@dataclass(frozen=True)
class Dense(Format):
    """The weight itself, in a dtype."""

    dtype: torch.dtype
    tensors = ("weight",)

    @property
    def order(self) -> tuple[int, ...]:
        # bfloat16 is read two at a time, so that widening takes one operation each.
        return PAIRED if self.dtype is torch.bfloat16 else tuple(range(self.step))

    def vectors(self, b: Builder, a: SimpleNamespace, row: Value, i: Value) -> list[Value]:
        place = b.at(a.weight, row * a.inputs + i, STORED[self.dtype])
        b.prefetch(place, AHEAD, "i8")
        if self.dtype is not torch.bfloat16:
            return [read(b, place, n, self.dtype) for n in (0, LANES)]
        return list(read_pairs(b, place, 0))


@dataclass(frozen=True)
class Dots(Format):
    """The weight in bfloat16, for CPUs that multiply pairs of it and sum in float32."""

    tensors = ("weight",)
    each = 1

    def room(self, inputs: int) -> int:
        return 2 * inputs

    def put(self, b: Builder, a: SimpleNamespace, x: Value, i: Value, values: Value) -> None:
        write(b, values, x, i, torch.bfloat16)

    def vectors(self, b: Builder, a: SimpleNamespace, row: Value, i: Value) -> list[Value]:
        place = b.at(a.weight, row * a.inputs + i, "bf16")
        b.prefetch(place, AHEAD, "i8")
        return [b.load(place, 0, Type("bf16", self.step))]

    def add(self, b: Builder, weights: Value, x: Value, i: Value, total: Value) -> Value:
        values = b.load(x, i, Type("bf16", self.step))
        return b.intrinsic("x86.avx512bf16.dpbf16ps.512", total.type, total, values, weights)


@cache
def dense(dtype: torch.dtype) -> Format:
    """The format of a weight as it is."""
    return Dots() if dtype is torch.bfloat16 and has("avx512bf16") else Dense(dtype)


@dataclass(frozen=True)
class Product:
    """What a kernel is made for. `few`: several rows, not one."""

    weight: Format
    dtype: torch.dtype
    out: torch.dtype
    few: bool
    norm: bool
    bias: bool
    act: str | None
    pointwise: str | None
    residual: bool


_FIELDS = ("x", "norm", "bias", "residual", "y", "scratch")


@cache
def _kernel(p: Product) -> Kernel:
    fields = dict.fromkeys((*_FIELDS, *p.weight.tensors), "ptr")
    fields |= dict.fromkeys(("rows", "inputs", "outputs", "room"), "i64")
    fields |= dict.fromkeys(("eps", "offset"), "f32")
    return Kernel(fields, lambda b, a: _write(b, a, p))


def _write(b: Builder, a: SimpleNamespace, p: Product) -> None:
    rows = a.rows if p.few else b.like(1, a.rows)
    x = b.at(a.scratch, b.thread * rows * a.room, "i8")
    with b.loop(0, rows) as m:
        _prepare(b, a, p, b.at(x, m * a.room, "i8"), m * a.inputs)
    size, wide = _BLOCK * (MAX_ROWS if p.few else 1), Type("f32", _BLOCK)
    buffer, second = b.array("f32", size), b.array("f32", size) if p.act else None
    first, last = b.share((a.outputs + (_BLOCK - 1)) // _BLOCK)
    with b.loop(first, last) as block:
        begin = block * _BLOCK
        count = b.select(a.outputs - begin < _BLOCK, a.outputs - begin, _BLOCK)
        _dots(b, a, p, x, rows, begin, count, buffer)
        if p.act:
            _dots(b, a, p, x, rows, begin + a.outputs, count, second)
        with b.loop(0, rows) as m:
            if p.act:
                gate, up = (b.load(place, m * _BLOCK, wide) for place in (buffer, second))
                b.store(ACTIVATIONS[p.act](b, gate) * up, buffer, m * _BLOCK)
            if p.pointwise:
                y = ACTIVATIONS[p.pointwise](b, b.load(buffer, m * _BLOCK, wide))
                b.store(y, buffer, m * _BLOCK)
            with b.loop(0, count) as j:
                at = m * a.outputs + begin + j
                y = b.load(buffer, m * _BLOCK + j, "f32")
                if p.residual:
                    y = y + read(b, a.residual, at, p.dtype, 0)
                write(b, y, a.y, at, p.out)


def _prepare(b: Builder, a: SimpleNamespace, p: Product, x: Value, start: Value) -> None:
    """The row of x that begins at element `start`, normed, to the place `x` as the weight's format has it."""
    factor = None
    if p.norm:
        squares = b.var(0.0, Type("f32", LANES))
        with b.loop(0, a.inputs, LANES) as i:
            v = read(b, a.x, start + i, p.dtype)
            squares.value = b.fma(v, v, squares.value)
        mean = b.total(squares.value) / b.convert(a.inputs, "f32")
        factor = 1.0 / b.sqrt(mean + a.eps)
    step = p.weight.step
    with b.loop(0, a.inputs, step) as i:
        v = read(b, a.x, start + i, p.dtype, step)
        if factor is not None:
            v = v * b.like(factor, v) * (read(b, a.norm, i, p.dtype, step) + a.offset)
        p.weight.put(b, a, x, i, v)


def _dots(
    b: Builder, a: SimpleNamespace, p: Product, x: Value, rows: Value, begin: Value, count: Value, out: Value
) -> None:
    """The products of outputs `begin` to `begin + count`, into `out[row * _BLOCK + output]`."""

    def tile(m: Value, size: int) -> None:
        places = [b.at(x, (m + k) * a.room, "i8") for k in range(size)]
        with b.loop(0, count) as j:
            for k, y in enumerate(p.weight.dot(b, a, places, begin + j)):
                if p.bias:
                    y = y + read(b, a.bias, begin + j, p.dtype, 0)
                b.store(y, out, (m + k) * _BLOCK + j)

    if not p.few:
        tile(b.like(0, rows), 1)
        return
    eights = b.select(a.room * 8 <= _CACHE, rows - rows % 8, 0)
    with b.loop(0, eights, 8) as m:
        tile(m, 8)
    with b.loop(eights, rows - rows % 4, 4) as m:
        tile(m, 4)
    for size in (2, 1):
        with b.when((rows & size).equals(size)):
            tile(rows - rows % (2 * size), size)


def refuses(x: Tensor, weight: Format) -> str | None:
    """Why no kernel can take this x `[rows, inputs]` for a weight, or None."""
    if (why := compiled_refuses(x)) is not None:
        return why
    if x.ndim != 2 or not 0 < x.shape[0] <= weight.most:
        return f"wants 1 to {weight.most} rows; there are {x.shape[0]}"
    if x.shape[1] % weight.step:
        return f"wants inputs divisible by {weight.step}; there are {x.shape[1]}"
    return None


def run(
    x: Tensor,
    weight: Format,
    tensors: tuple[Tensor | None, ...],
    outputs: int,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    act: str | None = None,
    residual: Tensor | None = None,
    pointwise: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """What `gemv.gemv_reference` gives, for W `[outputs, inputs]` in some format with these tensors. bias,
    norm and residual are of x's dtype."""
    rows, inputs = x.shape
    weight = weight.for_one_row(x.dtype, inputs) if rows == 1 else weight
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    for name, tensor in (("bias", bias), ("norm_weight", norm_weight), ("residual", residual)):
        if tensor is not None and tensor.dtype is not x.dtype:
            raise RequestError(f"{name} is {tensor.dtype}; expected x's dtype, {x.dtype}")
    outputs = outputs // 2 if act else outputs
    product = Product(
        weight,
        x.dtype,
        out_dtype or x.dtype,
        rows > 1,
        norm_weight is not None,
        bias is not None,
        act,
        pointwise,
        residual is not None,
    )
    y = x.new_empty(rows, outputs, dtype=product.out)
    room = weight.room(inputs)
    scratch = x.new_empty(torch.get_num_threads() * rows * room, dtype=torch.uint8)
    counts = (rows, inputs, outputs, room, eps, offset)
    _kernel(product)(x, norm_weight, bias, residual, y, scratch, *tensors, *counts)
    return y
