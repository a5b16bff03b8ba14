"""RMSNorm and LayerNorm on the CPU, one pass over memory; inference only."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch
from torch import Tensor

from taut.kernels import norm as reference
from taut.kernels.arithmetic_llvm import read, write
from taut.kernels.llvm import LANES, Builder, Type
from taut.kernels.norm import add_layer_norm, add_rms_norm
from taut.kernels.threads import Kernel

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]

_FIELDS = {"x": "ptr", "weight": "ptr", "bias": "ptr", "y": "ptr", "rows": "i64", "dim": "i64"}
_FIELDS |= {"eps": "f32", "offset": "f32"}


@cache
def _kernel(dtype: torch.dtype, centred: bool, bias: bool) -> Kernel:
    return Kernel(_FIELDS, lambda b, a: _write(b, a, dtype, centred, bias))


def _write(b: Builder, a: SimpleNamespace, dtype: torch.dtype, centred: bool, bias: bool) -> None:
    wide = Type("f32", LANES)
    size = b.convert(a.dim, "f32")
    first, last = b.share(a.rows)
    with b.loop(first, last) as row:
        start = row * a.dim
        mean = b.const(0.0, Type("f32"))
        if centred:
            total = b.var(0.0, wide)
            with b.loop(0, a.dim, LANES) as i:
                total.value = total.value + read(b, a.x, start + i, dtype)
            mean = b.total(total.value) / size
        squares = b.var(0.0, wide)
        with b.loop(0, a.dim, LANES) as i:
            v = read(b, a.x, start + i, dtype) - mean
            squares.value = b.fma(v, v, squares.value)
        factor = 1.0 / b.sqrt(b.total(squares.value) / size + a.eps)
        with b.loop(0, a.dim, LANES) as i:
            v = (read(b, a.x, start + i, dtype) - mean) * b.splat(factor)
            v = v * (read(b, a.weight, i, dtype) + a.offset)
            if bias:
                v = v + read(b, a.bias, i, dtype)
            write(b, v, a.y, start + i, dtype)


def _refuses(x: Tensor, *others: Tensor | None) -> bool:
    return x.shape[-1] % LANES != 0 or any(t is not None and t.dtype is not x.dtype for t in others)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, offset: float, centred: bool) -> Tensor:
    x = x.contiguous()
    y, dim = torch.empty_like(x), x.shape[-1]
    _kernel(x.dtype, centred, bias is not None)(x, weight, bias, y, x.numel() // dim, dim, eps, offset)
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """As the reference; rounded once, at the end. A size that is no multiple of 16 is left to it."""
    if _refuses(x, weight):
        return reference.rms_norm(x, weight, eps, offset)
    return _run(x, weight, None, eps, offset, False)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """As the reference; rounded once, at the end. A size that is no multiple of 16 is left to it."""
    if _refuses(x, weight, bias):
        return reference.layer_norm(x, weight, bias, eps)
    return _run(x, weight, bias, eps, 0.0, True)
