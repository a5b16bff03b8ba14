"""Logits processors for options that few calls have: what is forced, what the encoder read, and a pull to the
end.

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
class Read:
    """Tokens that the encoder read (or a decoder's prompt has) get likelier, for a `penalty` above 1."""

    penalty: float
    tokens: Sequence[int]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        tokens = torch.tensor(sorted(set(self.tokens)), device=scores.device)
        read = scores[:, tokens]
        scores[:, tokens] = torch.where(read < 0, read / self.penalty, read * self.penalty)
        return scores


class ReadNgrams:
    """No n-gram of `size` that the encoder read (or a decoder's prompt has) may be said."""

    def __init__(self, size: int, tokens: Sequence[int]):
        self.size = size
        self.following: dict[tuple[int, ...], list[int]] = {}  # each n-gram's last token by those before it
        for at in range(len(tokens) - size + 1):
            *before, last = tokens[at : at + size]
            self.following.setdefault(tuple(before), []).append(last)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        before = ids[0, max(ids.shape[1] - self.size + 1, 0) :].tolist() if self.size > 1 else []
        barred = self.following.get(tuple(before), [])
        if barred:
            scores[:, barred] = -torch.inf
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
