"""`Timestamps`: which tokens a row may go on with that says when things were said (Radford et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from taut.engine.request import Row


@dataclass(frozen=True)
class Timestamps:
    """Tokens from `begin` on are times, in order. They come in pairs, an end and the next beginning, but for
    the first, which begins the row and is at most the `initial`-th (None: any), and one right before `end`.
    They never go back, and a pair holds text. Where all times together are likelier than any text, a time it
    is. `never`: the token that says there are no times."""

    begin: int
    never: int
    end: int
    initial: int | None = None

    def bounds(self, output: Sequence[int], vocab: int) -> tuple[int, int, int]:
        """For a row that has said `output`: the first token that is text and allowed, and the first and one
        past the last that is a time and allowed."""
        if not output:
            last = vocab if self.initial is None else min(self.begin + self.initial + 1, vocab)
            return self.begin, self.begin, last
        here = output[-1] >= self.begin
        before = len(output) < 2 or output[-2] >= self.begin
        if here and before:
            return 0, vocab, vocab
        latest = next((token for token in reversed(output) if token >= self.begin), self.begin - 1)
        return (self.end, latest, vocab) if here else (0, latest + 1, vocab)


def timed(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """`scores` `[rows, vocab]` with -inf for what the `timestamps` of each row's options exclude."""
    vocab, rules = scores.shape[1], [row.params.timestamps for row in rows]
    bounds = [
        (*rule.bounds(row.output, vocab), rule.begin, rule.never)
        for rule, row in zip(rules, rows, strict=True)
    ]
    text, first, last, begin, never = torch.tensor(bounds, device=scores.device).t().unsqueeze(2)
    ids = torch.arange(vocab, device=scores.device)
    times = ids >= begin  # [rows, vocab]
    barred = torch.where(times, (ids < first) | (ids >= last), (ids < text) | (ids == never))
    scores = scores.masked_fill(barred, -torch.inf)
    logprobs = scores.float().log_softmax(-1)
    all_times = logprobs.masked_fill(~times, -torch.inf).logsumexp(-1, keepdim=True)
    likelier = all_times > logprobs.masked_fill(times, -torch.inf).amax(-1, keepdim=True)
    return scores.masked_fill(likelier & ~times, -torch.inf)
