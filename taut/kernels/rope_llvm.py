"""Rotary position embedding on the CPU, with the norm before it and the cache write after; inference only."""

from __future__ import annotations

import math
from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from taut.kernels import rope as reference
from taut.kernels.arithmetic_llvm import STORED, read, sine_and_cosine, write
from taut.kernels.llvm import LANES, Builder, Type, Value
from taut.kernels.threads import Kernel

__all__ = ["angles", "rotate", "rotate_and_store"]

_POINTERS = ("qkv", "cos", "sin", "q_norm", "k_norm", "out", "keys", "values", "slots")
_FIELDS = dict.fromkeys(_POINTERS, "ptr") | dict.fromkeys(
    ("tokens", "stride", "heads", "kv_heads", "kept"), "i64"
)
_FIELDS |= {"eps": "f32", "offset": "f32"}


@cache
def _kernel(
    dtype: torch.dtype, head_dim: int, turned: int, interleaved: bool, norm: bool, store: bool
) -> Kernel:
    lanes = math.gcd(head_dim, turned // 2 if turned else head_dim, LANES)

    def rotated(b: Builder, a: SimpleNamespace, head: Value, token: Value) -> None:
        """Turn the float32 head in place."""
        wide, at = Type("f32", lanes), token * turned

        def angle(place: Value, i: Value) -> Value:
            return read(b, place, at + i, dtype, lanes)

        with b.loop(0, turned // 2, lanes) as i:
            other = i + turned // 2
            if interleaved:
                both = b.load(head, i + i, Type("f32", 2 * lanes))
                x, y = (b.shuffle(both, range(n, 2 * lanes, 2)) for n in (0, 1))
                cos, sin = angle(a.cos, i), angle(a.sin, other)
                x, y = b.fma(x, cos, -(y * sin)), b.fma(y, cos, x * sin)
                mixed = b.shuffle(x, [lane for n in range(lanes) for lane in (n, n + lanes)], y)
                b.store(mixed, head, i + i)
            else:
                x, y = b.load(head, i, wide), b.load(head, other, wide)
                b.store(b.fma(x, angle(a.cos, i), y * angle(a.sin, i)), head, i)
                b.store(b.fma(y, angle(a.cos, other), x * angle(a.sin, other)), head, other)

    def normed(b: Builder, a: SimpleNamespace, head: Value, weight: Value) -> None:
        squares = b.var(0.0, Type("f32", lanes))
        with b.loop(0, head_dim, lanes) as i:
            v = b.load(head, i, Type("f32", lanes))
            squares.value = b.fma(v, v, squares.value)
        factor = 1.0 / b.sqrt(b.total(squares.value) / float(head_dim) + a.eps)
        with b.loop(0, head_dim, lanes) as i:
            v = b.load(head, i, Type("f32", lanes)) * b.splat(factor, lanes)
            b.store(v * (read(b, weight, i, dtype, lanes) + a.offset), head, i)

    def body(b: Builder, a: SimpleNamespace) -> None:
        head = b.array("f32", head_dim)
        turning = a.heads + a.kv_heads
        every = turning + a.kv_heads if store else turning
        first, last = b.share(a.tokens * every)

        def put(place: Value, index: Value) -> None:
            with b.loop(0, head_dim, lanes) as i:
                write(b, b.load(head, i, Type("f32", lanes)), place, index * head_dim + i, dtype)

        with b.loop(first, last) as item:
            token, h = item // every, item % every
            with b.loop(0, head_dim, lanes) as i:
                b.store(read(b, a.qkv, token * a.stride + h * head_dim + i, dtype, lanes), head, i)
            with b.when(h < turning):
                if norm:
                    normed(b, a, head, b.select(h < a.heads, a.q_norm, a.k_norm))
                if turned:
                    rotated(b, a, head, token)
            with b.when(h < a.kept):
                put(a.out, token * a.kept + h)
            if store:
                slot = b.load(a.slots, token, "i64")
                with b.when(~(h < a.heads) & ~(slot < 0)):
                    cache = b.select(h < turning, a.keys, a.values)
                    place = b.select(h < turning, h - a.heads, h - turning)
                    put(cache, slot * a.kv_heads + place)

    return Kernel(_FIELDS, body)


_ANGLES = dict.fromkeys(("positions", "frequencies", "cos", "sin"), "ptr")
_ANGLES |= {"tokens": "i64", "half": "i64", "stride": "i64", "magnitude": "f32"}


@cache
def _angles(dtype: torch.dtype, lanes: int) -> Kernel:
    def body(b: Builder, a: SimpleNamespace) -> None:
        first, last = b.share(a.tokens)
        with b.loop(first, last) as token:
            position = b.convert(b.load(a.positions, token, "i32"), "f32", signed=True)
            with b.loop(0, a.half, lanes) as i:
                f = b.load(a.frequencies, token * a.stride + i, Type("f32", lanes))
                sine, cosine = sine_and_cosine(b, b.like(position, f) * f)
                sine, cosine = sine * a.magnitude, cosine * a.magnitude
                at = token * a.half * 2 + i
                for place, value in ((a.cos, cosine), (a.sin, -sine)):
                    write(b, value, place, at, dtype)
                for place, value in ((a.cos, cosine), (a.sin, sine)):
                    write(b, value, place, at + a.half, dtype)

    return Kernel(_ANGLES, body)


def angles(
    positions: Tensor, frequencies: Tensor, magnitude: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As the reference; cos and sin are those of the float32 angle, rounded once."""
    if positions.dtype is not torch.int32 or dtype not in STORED or frequencies.dtype is not torch.float32:
        return reference.angles(positions, frequencies, magnitude, dtype)
    tokens, half = positions.shape[0], frequencies.shape[-1]
    cos, sin = positions.new_empty(2, tokens, 1, 2 * half, dtype=dtype).unbind()
    each = half if frequencies.ndim == 2 else 0
    kernel = _angles(dtype, math.gcd(half, LANES))
    kernel(positions.contiguous(), frequencies.contiguous(), cos, sin, tokens, half, each, magnitude)
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """As the reference; computed in float32 and rounded once."""
    tokens, heads, head_dim = x.shape
    if x.stride(2) != 1 or x.stride(1) != head_dim:
        x = x.contiguous()
    out = x.new_empty(x.shape)
    kernel = _kernel(x.dtype, head_dim, cos.shape[-1], interleaved, False, False)
    rest = (None, None, out, None, None, None, tokens, x.stride(0), heads, 0, heads, 0.0, 0.0)
    kernel(x, cos.contiguous(), sin.contiguous(), *rest)
    return out


def rotate_and_store(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    interleaved: bool = False,
    keep_keys: bool = False,
) -> Tensor:
    """As the reference; computed in float32 and rounded once."""
    tensors = (cos, sin, q_weight, k_weight, keys, values)
    odd = any(t is not None and t.dtype is not qkv.dtype for t in tensors) or slots.dtype is not torch.int64
    if odd or not (keys.is_contiguous() and values.is_contiguous()):
        given = (q_weight, k_weight, eps, offset, interleaved, keep_keys)
        return reference.rotate_and_store(qkv, heads, kv_heads, cos, sin, keys, values, slots, *given)
    tokens, head_dim = qkv.shape[0], keys.shape[-1]
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    kept = heads + kv_heads if keep_keys else heads
    out = qkv.new_empty(tokens, kept, head_dim)
    turned = 0 if cos is None else cos.shape[-1]
    _kernel(qkv.dtype, head_dim, turned, interleaved, q_weight is not None, True)(
        qkv,
        None if cos is None else cos.contiguous(),
        None if sin is None else sin.contiguous(),
        q_weight,
        k_weight,
        out,
        keys,
        values,
        slots.contiguous(),
        tokens,
        qkv.stride(0),
        heads,
        kv_heads,
        kept,
        eps,
        offset,
    )
    return out
