"""What CPU kernels compute with, in float32: values in and out of memory, exp, tanh, erf, activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from taut.kernels.llvm import LANES, Builder, Type, Value

# How the dtypes that kernels take lie in memory.
STORED: Mapping[torch.dtype, str] = MappingProxyType(
    {torch.bfloat16: "i16", torch.float16: "f16", torch.float32: "f32"}
)


def read(b: Builder, place: Value, index: Value | int, dtype: torch.dtype, lanes: int = LANES) -> Value:
    """`lanes` elements from `index` on, in float32; 0: a single one."""
    raw = b.load(place, index, Type(STORED[dtype], lanes))
    if dtype is torch.bfloat16:
        return b.bits(b.convert(raw, "i32") << 16, Type("f32", lanes))
    return b.convert(raw, "f32")


def read_pairs(b: Builder, place: Value, index: Value | int) -> tuple[Value, Value]:
    """32 values of bfloat16 as the first of each pair of neighbours and the second: widening takes one
    operation each then, where their order would take two."""
    pairs = b.load(b.at(place, index, "i16"), 0, Type("i32", LANES))
    low, high = (b.bits(half, Type("f32", LANES)) for half in (pairs << 16, pairs & 0xFFFF0000))
    return low, high


# The inputs that `read_pairs` gives, in its order.
PAIRED = (*range(0, 2 * LANES, 2), *range(1, 2 * LANES, 2))


def unpaired(b: Builder, low: Value, high: Value) -> tuple[Value, Value]:
    """What `read_pairs` gave, in the order of memory."""
    order = [lane for n in range(LANES) for lane in (n, n + LANES)]
    return b.shuffle(low, order[:LANES], high), b.shuffle(low, order[LANES:], high)


def write(b: Builder, value: Value, place: Value, index: Value | int, dtype: torch.dtype) -> None:
    """Store float32 in a dtype, rounded to the nearest, ties to even."""
    if dtype is torch.bfloat16:
        bits = b.bits(value, Type("i32", value.type.lanes))
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40  # a NaN stays one, whichever bits it has
        nan = b.compare("ne", "une", value, value)
        value = b.convert(b.select(nan, quiet, rounded), "i16")
    b.store(b.convert(value, STORED[dtype]) if dtype is not torch.bfloat16 else value, place, index)


def _polynomial(b: Builder, x: Value, coefficients: tuple[float, ...]) -> Value:
    """From the highest power down."""
    y = b.like(coefficients[0], x)
    for c in coefficients[1:]:
        y = b.fma(y, x, c)
    return y


def exp(b: Builder, x: Value) -> Value:
    """Within 2 units in the last place; 0 below -87.3 and infinite above 88.7 (after Cephes' expf)."""
    inside = b.select(x > 88.72, 88.72, b.select(x < -87.33, -87.33, x))
    turns = b.intrinsic(f"rint.{x.type.mangled}", x.type, inside * 1.4426950408889634)
    r = b.fma(turns, -0.693359375, inside)
    r = b.fma(turns, 2.12194440e-4, r)
    tail = (
        1.9875691500e-4,
        1.3981999507e-3,
        8.3334519073e-3,
        4.1665795894e-2,
        1.6666665459e-1,
        5.0000001201e-1,
    )
    y = b.fma(_polynomial(b, r, tail), r * r, r + 1.0)
    # 2 ** turns in two factors, so that neither leaves the range of float32.
    whole = b.convert(turns, "i32", signed=True)
    half = b.emit(whole.type, f"ashr {whole.type} {whole.name}, {b.const(1, whole.type).name}")
    for part in (half, whole - half):
        y = y * b.bits((part + 127) << 23, y.type)
    y = b.select(x < -87.33, 0.0, y)
    return b.select(x > 88.72, math.inf, y)


def sigmoid(b: Builder, x: Value) -> Value:
    return 1.0 / (exp(b, -x) + 1.0)


def tanh(b: Builder, x: Value) -> Value:
    """Within 2e-7."""
    return 1.0 - 2.0 / (exp(b, x + x) + 1.0)


def erf(b: Builder, x: Value) -> Value:
    """Within 2e-7 (Abramowitz and Stegun, 7.1.26)."""
    size = b.select(x < 0.0, -x, x)
    t = 1.0 / b.fma(size, 0.3275911, 1.0)
    series = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
    y = 1.0 - _polynomial(b, t, series) * t * exp(b, -(size * size))
    return b.select(x < 0.0, -y, y)


# 1 / n! with alternating signs, from the highest power of r^2 down.
_SINE = tuple((-1) ** n / math.factorial(2 * n + 1) for n in range(6, -1, -1))
_COSINE = tuple((-1) ** n / math.factorial(2 * n) for n in range(7, -1, -1))


def sine_and_cosine(b: Builder, x: Value) -> tuple[Value, Value]:
    """Of float32 angles up to 1e9, rounded from float64."""
    wide = b.convert(x, "f64")
    quarters = b.intrinsic(f"rint.{wide.type.mangled}", wide.type, wide * (2 / math.pi))
    r = b.fma(quarters, -math.pi / 2, wide)
    r = b.fma(quarters, -6.123233995736766e-17, r)  # what float64 leaves of pi / 2
    sine, cosine = _polynomial(b, r * r, _SINE) * r, _polynomial(b, r * r, _COSINE)
    turn = b.convert(quarters, "i32", signed=True)
    odd, back, ahead = ((turn & 1).equals(1), (turn & 2).equals(2), ((turn + 1) & 2).equals(2))
    sine, cosine = b.select(odd, cosine, sine), b.select(odd, sine, cosine)
    sine, cosine = b.select(back, -sine, sine), b.select(ahead, -cosine, cosine)
    return b.convert(sine, "f32"), b.convert(cosine, "f32")


def _relu(b: Builder, x: Value) -> Value:
    return b.select(x < 0.0, 0.0, x)


# The names of `kernels.act.ACTIVATIONS`.
ACTIVATIONS: Mapping[str, Callable[[Builder, Value], Value]] = MappingProxyType(
    {
        "silu": lambda b, x: x * sigmoid(b, x),
        "gelu": lambda b, x: x * 0.5 * (erf(b, x * math.sqrt(0.5)) + 1.0),
        "gelu_tanh": lambda b, x: (
            x * 0.5 * (tanh(b, (x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)) + 1.0)
        ),
        "gelu_quick": lambda b, x: x * sigmoid(b, x * 1.702),
        "relu": _relu,
        "relu2": lambda b, x: _relu(b, x) * _relu(b, x),
        "tanh": tanh,
    }
)
