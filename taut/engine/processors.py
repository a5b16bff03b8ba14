"""Logits processors for options that few calls have: what is forced or barred, and a pull to the end.

Each is called with `ids` `[1, length]` and `scores` `[1, vocab]`, as the user's are, and gives new scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Forced:
    """Nothing but `tokens` may stand at `position`, counted with the prompt."""

    position: int
    tokens: Sequence[int]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == self.position:
            scores = torch.full_like(scores, -torch.inf)
            scores[:, list(self.tokens)] = 0
        return scores


@dataclass(frozen=True)
class Barred:
    """None of `tokens` may stand at `position`, counted with the prompt."""

    position: int
    tokens: Sequence[int]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == self.position:
            scores[:, list(self.tokens)] = -torch.inf
        return scores


@dataclass(frozen=True)
class LengthDecay:
    """From the token after `start` (counted with the prompt) on, scores of the `ends` grow by `factor` to the
    power of the tokens since then."""

    start: int
    factor: float
    ends: Sequence[int]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        over = ids.shape[1] - self.start
        if over > 0:
            ends = scores[:, list(self.ends)]
            scores[:, list(self.ends)] = ends + ends.abs() * (self.factor**over - 1)
        return scores
