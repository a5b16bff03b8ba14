"""Products of many rows on a GPU by cuBLAS, with the activation that follows in the same kernel: reading and
writing the output once more would take most of the product's time again.

Its GELU is the tanh approximation (Hendrycks and Gimpel 2016), which is at most 5e-4 from GELU by the error
function. It is taken for both: it sees the float32 sums, and the two steps that it stands for round them
first, which costs more. In float16 and bfloat16 alike its result is the closer one to float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from taut.kernels.dispatch import device_refuses

# The activations that it has, and whether PyTorch calls them GELU or ReLU.
POINTWISE: Mapping[str, bool] = MappingProxyType({"gelu": True, "gelu_tanh": True, "relu": False})


def takes(x: Tensor, weight: Tensor, bias: Tensor | None, pointwise: str | None) -> bool:
    """Whether `linear` takes `x` `[rows, in]`, `weight` `[out, in]` and what follows."""
    return pointwise is not None and refuses(x, weight, bias, pointwise) is None


def refuses(x: Tensor, weight: Tensor, bias: Tensor | None, pointwise: str) -> str | None:
    """Why `linear` can't take these, or None."""
    if (why := device_refuses(x.device)) is not None:
        return why
    if pointwise not in POINTWISE:
        return f"has {', '.join(POINTWISE)} behind a product, not {pointwise}"
    if bias is None:
        return "has an activation behind a bias alone"
    if x.dtype not in (torch.float16, torch.bfloat16) or not x.dtype is weight.dtype is bias.dtype:
        return f"wants float16 or bfloat16 for all; x is {x.dtype}, the weight {weight.dtype}"
    if x.dim() != 2:
        return f"wants rows of a matrix; x is {list(x.shape)}"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias)):
        return "has no gradients"
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor, pointwise: str) -> Tensor:
    """`pointwise(x W^T + b)`, `[rows, out]`."""
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=POINTWISE[pointwise])
