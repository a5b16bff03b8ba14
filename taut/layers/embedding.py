"""Token embedding, which is also the head's matrix where the two are tied, and learned positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taut.batch import Batch
from taut.config import Positions
from taut.errors import RequestError
from taut.kernels.linear import block, linear, why_not_blocked


class Embedding(nn.Module):
    """Rows of `weight` `[vocab, dim]` by id, times `scale` (rounded to the weight's dtype)."""

    def __init__(self, vocab: int, dim: int, *, scale: float | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, dim, dtype=dtype))
        self.scale = scale
        self._head: tuple[tuple[int, int], Tensor] | None = (
            None  # version of the weight, and its blocked copy
        )

    def forward(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.weight)
        return x if self.scale is None else x * torch.tensor(self.scale, dtype=x.dtype)

    def project(self, hidden: Tensor) -> Tensor:
        """Logits `[tokens, vocab]` of `hidden` `[tokens, dim]` with the same matrix (a tied head)."""
        if self._head is not None and not torch.is_grad_enabled() and self._head[0] == self._version():
            return linear(hidden, self._head[1])
        return linear(hidden, self.weight)

    def block(self) -> None:
        """Keep a copy for `project` in the layout that the CPU reads fastest, if there is one: looking up
        rows needs the dense matrix, so this costs its bytes once more."""
        if why_not_blocked(self.weight) is None and (self._head is None or self._head[0] != self._version()):
            self._head = (self._version(), block(self.weight))

    def _version(self) -> tuple[int, int]:
        """Changes whenever the weight does."""
        return self.weight.data_ptr(), self.weight._version

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_head": None}

    def _apply(self, fn: Any, recurse: bool = True) -> Embedding:
        self._head = None
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class PositionEmbedding(nn.Module):
    """A learned vector `[dim]` for each absolute position."""

    def __init__(self, config: Positions, dim: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.count + config.offset, dim, dtype=dtype))

    def forward(self, batch: Batch) -> Tensor:
        """`[tokens, dim]`. `RequestError` for a row longer than the table; the engine refuses such rows
        before they begin."""
        if batch.kv is None and batch.longest > self.config.count:
            raise RequestError(
                f"a row has {batch.longest} tokens, and the model has learned {self.config.count} positions; "
                "shorten it (truncation=True, max_length=...)"
            )
        return F.embedding(batch.positions + self.config.offset, self.weight)

    def extra_repr(self) -> str:
        return f"{self.config.count}, {self.weight.shape[1]}, offset={self.config.offset}"
