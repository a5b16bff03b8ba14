"""RMSNorm and LayerNorm over the last dimension, computed in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * (weight + offset)` over the last dimension (Zhang and Sennrich 2019).

    `x` `[..., dim]`, `weight` `[dim]`. The statistics are float32 (float64 for float64 input), the result
    has x's dtype.
    """
    if not offset and x.shape[0] == 1 and x.ndim == 2 and x.is_cpu and not torch.is_grad_enabled():
        # One row on a CPU: a handful of calls, where PyTorch's own takes twice as long.
        norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).item()
        return (x * (norm * norm / x.shape[1] + eps) ** -0.5).mul_(weight)
    if not offset:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)  # PyTorch's own takes float32 statistics too
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * (weight.to(wide) + offset)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension (Ba et al. 2016)."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """`rms_norm(x + residual)`, all `[..., dim]`."""
    return rms_norm(x + residual, weight, eps, offset)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`layer_norm(x + residual)`, all `[..., dim]`."""
    return layer_norm(x + residual, weight, bias, eps)
