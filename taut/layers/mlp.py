"""The feed-forward of a block, gated or not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from taut.config import Mlp
from taut.layers.linear import Linear
from taut.layers.norm import Norm


class GatedMlp(nn.Module):
    """`down(act(gate(x)) * up(x))` on `[tokens, dim]`, gate and up in one product."""

    def __init__(self, config: Mlp, dim: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        parts = {"gate_proj": config.hidden, "up_proj": config.hidden}
        self.gate_up_proj = Linear(dim, parts, bias=config.bias, dtype=dtype)
        self.down_proj = Linear(config.hidden, dim, bias=config.bias, dtype=dtype)

    def forward(self, x: Tensor, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        """`residual + down(act(gate(n)) * up(n))` with `n = norm(x)`, norm and residual where given."""
        return _add(self.down_proj, self.gate_up_proj(x, norm=norm, act=self.config.act), residual)


class PlainMlp(nn.Module):
    """`down(act(up(x)))` on `[tokens, dim]`."""

    def __init__(self, config: Mlp, dim: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.up_proj = Linear(dim, config.hidden, bias=config.bias, dtype=dtype)
        self.down_proj = Linear(config.hidden, dim, bias=config.bias, dtype=dtype)

    def forward(self, x: Tensor, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        """`residual + down(act(up(n)))` with `n = norm(x)`, norm and residual where given."""
        return _add(self.down_proj, self.up_proj(x, norm=norm, pointwise=self.config.act), residual)


# What is lost below it in float16 is far below the rounding of what it makes room for.
ROOM = 2.0**-6


def _add(down: Linear, x: Tensor, residual: Tensor | None) -> Tensor:
    """`residual + down(x)`. Where the residual is wider than x, it takes sums that x's dtype can't hold: the
    product is made of a smaller x, and grows again, exactly, as it is added."""
    if residual is None or residual.dtype is x.dtype or down.bias is not None:
        return down(x, residual=residual)
    return torch.add(residual, down(x * ROOM), alpha=1 / ROOM)
