"""Token embedding, which is also the head's matrix where the two are tied."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Module):
    """Rows of `weight` `[vocab, dim]` by id, times `scale` (rounded to the weight's dtype)."""

    def __init__(self, vocab: int, dim: int, *, scale: float | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, dim, dtype=dtype))
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.weight)
        return x if self.scale is None else x * torch.tensor(self.scale, dtype=x.dtype)

    def project(self, hidden: Tensor) -> Tensor:
        """Logits `[tokens, vocab]` of `hidden` `[tokens, dim]` with the same matrix (a tied head)."""
        return F.linear(hidden, self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"
