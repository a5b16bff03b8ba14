"""`Linear`: a projection that may own several checkpoint matrices as one fused weight."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """`y = x W^T + b`, `[tokens, in_features] -> [tokens, out_features]`.

    `parts` names the checkpoint matrices stacked along the output, with their sizes, in order: the q, k
    and v projections are one product, and files still hold three matrices. Without parts, the module is
    the one matrix.
    """

    def __init__(
        self,
        in_features: int,
        out: int | Mapping[str, int],
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.parts = MappingProxyType(dict(out)) if isinstance(out, Mapping) else None
        self.in_features = in_features
        self.out_features = out if isinstance(out, int) else sum(out.values())
        self.weight = nn.Parameter(torch.empty(self.out_features, in_features, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.out_features, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        parts = f", parts={dict(self.parts)}" if self.parts else ""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{parts}"
