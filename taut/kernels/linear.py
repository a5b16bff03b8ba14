"""The product `x W^T + b`, with the weight dense or, for inference in 16 bit on a CPU, in oneDNN's blocks.

Blocked weights hold the same numbers in the order in which the CPU's 16-bit dot products read them. One row
then runs at the speed of memory, about twice that of the dense layout, and takes no more of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from taut.kernels.gemv import fuses, gemv


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[..., in] -> [..., out]`; `weight` `[out, in]`, dense or as `block` gives it (inference only)."""
    if fuses(x, weight):
        return gemv(x, weight, bias)
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def why_not_blocked(weight: Tensor) -> str | None:
    """Why `block` can't take this weight, or None."""
    if weight.device.type != "cpu":
        return f"blocks are for the CPU; the weight is on {weight.device}"
    if weight.dtype is not torch.bfloat16:
        return f"blocks are for bfloat16, whose dot products CPUs have; the weight is {weight.dtype}"
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return "this CPU (or PyTorch build) has no bfloat16 dot products"
    return None


def block(weight: Tensor) -> Tensor:
    """The same matrix in oneDNN's blocked layout; `to_dense()` of it gives the same bytes back."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
