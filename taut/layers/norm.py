"""RMSNorm and LayerNorm modules, of a whole vector or of each of its heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taut.config import LayerScale as LayerScaleConfig
from taut.config import Norm as NormConfig
from taut.kernels.dispatch import ops
from taut.kernels.gemv import WINNING_ROWS


class Norm(nn.Module):
    """Normalises the last dimension `[..., dim]` as its config says; gives the dtype of its weight."""

    def __init__(self, config: NormConfig, dim: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, dtype=dtype)) if config.bias else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The norm of `x`, or of `residual + x`, which has the dtype of the weight then."""
        kernel, dtype = ops("norm", x), self.weight.dtype
        if residual is not None and self.config.kind == "rms":
            return kernel.add_rms_norm(x, residual, self.weight, self.config.eps, self.config.offset)
        if residual is not None:
            return kernel.add_layer_norm(x, residual, self.weight, self.bias, self.config.eps)
        if x.dtype is not dtype:  # a stream that is wider than the model
            weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        else:
            weight, bias = self.weight, self.bias
        if self.config.kind == "rms":
            return kernel.rms_norm(x, weight, self.config.eps, self.config.offset).to(dtype)
        return kernel.layer_norm(x, weight, bias, self.config.eps).to(dtype)

    def sums(self, x: Tensor) -> bool:
        """Whether what is added to the output of a product of `x` is best added here: there are too many rows
        on a GPU for the product to do it."""
        return x.is_cuda and x.dtype is self.weight.dtype and x.shape[0] > WINNING_ROWS

    def arguments(self) -> dict[str, Any]:
        """An RMSNorm as the arguments of a kernel that does it before something else."""
        return {"norm_weight": self.weight, "eps": self.config.eps, "offset": self.config.offset}

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.config.kind}, eps={self.config.eps}"


class LayerScale(nn.Module):
    """Multiplies each feature of `[..., dim]` by a learned factor."""

    def __init__(self, config: LayerScaleConfig, dim: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype))
        self.initial = {"weight": config.initial}

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class HeadNorm(nn.Module):
    """Normalises each head of `[tokens, heads, head_dim]` with a weight of its own, `[heads, head_dim]`."""

    def __init__(self, config: NormConfig, heads: int, head_dim: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(heads, head_dim, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normalised = F.rms_norm if self.config.kind == "rms" else F.layer_norm
        y = normalised(wide, x.shape[-1:], eps=self.config.eps)
        return (y * (self.weight.to(wide.dtype) + self.config.offset)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, {self.config.kind}, eps={self.config.eps}"
