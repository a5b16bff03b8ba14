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
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if offset:
        return (y * (weight.to(wide) + offset)).to(x.dtype)
    return y.to(x.dtype) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension (Ba et al. 2016)."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
