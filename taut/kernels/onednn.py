"""Products of many float32 rows on a CPU by oneDNN, with the activation or the sum that follows in the same
pass over the output."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

# What oneDNN calls the activations that it has, and their kind.
POINTWISE: Mapping[str | None, tuple[str, str]] = MappingProxyType(
    {
        None: ("none", ""),
        "gelu": ("gelu", "none"),
        "gelu_tanh": ("gelu", "tanh"),
        "relu": ("relu", ""),
        "silu": ("swish", ""),
        "tanh": ("tanh", ""),
    }
)


def takes(x: Tensor, weight: Tensor, pointwise: str | None = None) -> bool:
    """Whether `linear` takes `x` `[rows, in]` and `weight` `[out, in]`: many rows, without gradients."""
    return (
        x.is_cpu
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.dim() == 2
        and x.shape[0] > 1
        and x.is_contiguous()
        and weight.is_contiguous()
        and not weight.is_mkldnn
        and pointwise in POINTWISE
        and torch.backends.mkldnn.is_available()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pointwise: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`pointwise(x W^T + b)`, or, without a `pointwise`, `residual + x W^T + b`; `[rows, out]`."""
    if residual is not None and residual.is_contiguous():
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
    name, kind = POINTWISE[pointwise]
    y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, name, [], kind)
    return y if residual is None else y.add_(residual)
