"""Mixture of experts: a router, the experts it chooses for each token, and one that all tokens share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taut.config import Mlp, Moe
from taut.layers.linear import Linear
from taut.layers.mlp import GatedMlp
from taut.layers.norm import Norm


class Router(nn.Module):
    """Scores of each expert, and the choice among them."""

    def __init__(self, config: Moe, dim: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, dim, dtype=dtype))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, in float32 at least, and indices of the chosen experts, both `[tokens, chosen]`."""
        scores = F.linear(x, self.weight)
        shares = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        weights, chosen = shares.topk(self.config.chosen, -1)
        return weights / weights.sum(-1, keepdim=True) if self.config.normalised else weights, chosen

    def extra_repr(self) -> str:
        return f"{self.config.chosen} of {self.config.experts}"


class MoeMlp(nn.Module):
    """`weight * expert(x)` summed over the experts chosen for each token, and, where there is a shared one,
    `sigmoid(shared_expert_gate(x)) * shared_expert(x)`, on `[tokens, dim]`.

    Tokens are sorted by expert, so that each expert in use runs once, and no other is read. How many tokens
    each has decides shapes: the host waits for it.
    """

    def __init__(self, config: Moe, dim: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        expert = Mlp(config.hidden, config.act)
        self.gate = Router(config, dim, dtype=dtype)
        self.experts = nn.ModuleList(GatedMlp(expert, dim, dtype=dtype) for _ in range(config.experts))
        self.shared_expert = self.shared_expert_gate = None
        if config.shared is not None:
            self.shared_expert = GatedMlp(Mlp(config.shared, config.act), dim, dtype=dtype)
            self.shared_expert_gate = Linear(dim, 1, dtype=dtype)

    def forward(self, x: Tensor, norm: Norm | None = None, residual: Tensor | None = None) -> Tensor:
        """`residual + mlp(norm(x))`, norm and residual where given."""
        x = x if norm is None else norm(x)
        weights, chosen = self.gate(x)
        order = chosen.flatten().argsort(stable=True)  # of the tokens' choices: those of expert 0 first
        counts = chosen.flatten().bincount(minlength=self.config.experts).tolist()
        tokens = (order // self.config.chosen).split(counts)
        shares = weights.flatten()[order].split(counts)
        out = torch.zeros_like(x)
        for expert, rows, share in zip(self.experts, tokens, shares, strict=True):
            if len(rows):
                out = out.index_add(0, rows, (expert(x[rows]) * share[:, None]).to(x.dtype))
        if self.shared_expert is not None:
            out = out + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return out if residual is None else residual + out
