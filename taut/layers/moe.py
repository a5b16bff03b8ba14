"""Mixture of experts: a router, the experts it chooses for each token, and one that all tokens share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from taut.config import Mlp, Moe
from taut.kernels.dispatch import ops, triton_refuses
from taut.kernels.moe import mixture, scores_of
from taut.layers.experts import ExpertLinear
from taut.layers.linear import Linear
from taut.layers.mlp import GatedMlp
from taut.layers.norm import Norm


class Router(nn.Module):
    """Scores of each expert, and the choice among them."""

    def __init__(self, config: Moe, dim: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, dim, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(config.experts, dtype=dtype)) if config.bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, in float32 at least, and numbers of the chosen experts, both `[tokens, chosen]`."""
        scores = scores_of(x, self.weight, self.bias)
        return ops("moe", x).route(scores, self.config.chosen, self.config.normalised)

    def extra_repr(self) -> str:
        return f"{self.config.chosen} of {self.config.experts}"


class Experts(nn.Module):
    """Gated MLPs of one shape, their weights stacked."""

    def __init__(self, config: Moe, dim: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        parts = {"gate_proj": config.hidden, "up_proj": config.hidden}
        count, chosen, settings = config.experts, config.chosen, {"bias": config.bias, "dtype": dtype}
        self.gate_up_proj = ExpertLinear(count, chosen, dim, parts, **settings)
        self.down_proj = ExpertLinear(count, chosen, config.hidden, dim, **settings)

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor, residual: Tensor | None = None) -> Tensor:
        """`residual` and `weight * expert(x)` summed over the experts chosen for each token."""
        c = self.config
        if triton_refuses(x) is not None:
            gate_up, down = self.gate_up_proj.products(), self.down_proj.products()
            out = mixture(x, weights, chosen, c.experts, gate_up, down, c.act, c.limit)
            return out if residual is None else residual + out
        from taut.kernels import moe_triton

        compute = self.gate_up_proj.compute or x.dtype
        gate_up, down = self.gate_up_proj.matrices(compute), self.down_proj.matrices(compute)
        if compute is x.dtype:
            return moe_triton.mixture(x, weights, chosen, gate_up, down, c.act, c.limit, residual)
        out = moe_triton.mixture(x.to(compute), weights, chosen, gate_up, down, c.act, c.limit).to(x.dtype)
        return out if residual is None else residual + out


class MoeMlp(nn.Module):
    """The sum of the experts chosen for each token, and, where there is a shared one, `sigmoid(
    shared_expert_gate(x)) * shared_expert(x)`, on `[tokens, dim]`."""

    def __init__(self, config: Moe, dim: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.gate = Router(config, dim, dtype=dtype)
        self.experts = Experts(config, dim, dtype=dtype)
        self.shared_expert = self.shared_expert_gate = None
        if config.shared is not None:
            self.shared_expert = GatedMlp(Mlp(config.shared, config.act), dim, dtype=dtype)
            self.shared_expert_gate = Linear(dim, 1, dtype=dtype)

    def forward(self, x: Tensor, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        """`residual + mlp(norm(x))`, norm and residual where given."""
        x = x if norm is None else norm(x)
        if self.shared_expert is not None:
            shared = torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
            residual = shared if residual is None else residual + shared
        return self.experts(x, *self.gate(x), residual=residual)
