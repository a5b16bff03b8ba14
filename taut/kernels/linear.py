"""The product `x W^T + b` of a dense weight."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from taut.kernels.gemv import fuses, gemv


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[..., in] -> [..., out]`; `weight` `[out, in]`."""
    return gemv(x, weight, bias) if fuses(x, weight) else F.linear(x, weight, bias)
