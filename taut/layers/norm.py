"""RMSNorm and LayerNorm modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from taut.config import Norm as NormConfig
from taut.kernels.norm import layer_norm, rms_norm


class Norm(nn.Module):
    """Normalises the last dimension `[..., dim]` as its config says."""

    def __init__(self, config: NormConfig, dim: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, dtype=dtype)) if config.kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.config.kind == "rms":
            return rms_norm(x, self.weight, self.config.eps, self.config.offset)
        return layer_norm(x, self.weight, self.bias, self.config.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.config.kind}, eps={self.config.eps}"
