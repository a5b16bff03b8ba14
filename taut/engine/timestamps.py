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
    """`scores` `[rows, vocab]`, changed in place: -inf for what the `timestamps` of the rows' options
    exclude, those of all rows from one token on."""
    vocab, rules = scores.shape[1], [row.params.timestamps for row in rows]
    begin, device = rules[0].begin, scores.device
    bounds = [rule.bounds(row.output, vocab) for rule, row in zip(rules, rows, strict=True)]
    text, times = scores[:, :begin], scores[:, begin:]
    text[:, rules[0].never] = -torch.inf
    least, first, last = torch.tensor(bounds, device=device).t().unsqueeze(2)
    ids = torch.arange(begin, vocab, device=device)
    times.masked_fill_((ids < first) | (ids >= last), -torch.inf)
    if late := [at for at, (start, *_) in enumerate(bounds) if start]:
        at = torch.tensor(late, device=device)
        barred = torch.arange(begin, device=device) < least[at]
        text[at] = text[at].masked_fill(barred, -torch.inf)
    # The sum over all tokens, by which probabilities differ from scores, is the same on both sides.
    likelier = times.logsumexp(-1, keepdim=True) > text.amax(-1, keepdim=True)
    text.masked_fill_(likelier, -torch.inf)
    return scores
