"""`choose`: the next token of each row, or why there is none; `Asked`: a request that asks for one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taut.engine.request import Ahead, Request, Row, TokenLogprobs
from taut.engine.scheduler import Work
from taut.errors import TautError


@dataclass
class Asked:
    """A request that is chosen for by itself: its work, and its rows of logits `[n, vocab]`."""

    request: Request
    work: list[Work]
    raw: Tensor
    checked: tuple[int, int] = (0, 0)  # guesses, and how many were right

    def views(self) -> list[Row]:
        """The request as it is before each token that may be chosen now: after its last, and after each of
        its drafts."""
        drafts = self.work[0].drafts
        return [self.request, *(Ahead(self.request, drafts[: n + 1]) for n in range(len(drafts)))]

    def logits(self) -> Tensor:
        """What is chosen from, a row for each of `views`."""
        return self.raw if self.request.group is None else self.request.group.combine(self.raw)


def choose(
    sampler: Callable[..., Any], logits: Tensor, rows: Sequence[Row]
) -> list[tuple[int, Tensor | None] | Exception]:
    """For each row of `logits` `[n, vocab]`, its next token and scores, or why there is none.

    Rows with processors of their own go alone, so that one that raises fails alone; the others go
    together, and one by one only if there is something wrong with any of them.
    """
    chosen: list = [None] * len(rows)
    plain = [at for at, row in enumerate(rows) if not row.logits_processors]
    if len(plain) > 1:
        some = logits if len(plain) == len(rows) else logits[plain]
        try:
            tokens, scores = sampler(some, [rows[at] for at in plain])
        except TautError:
            pass
        else:
            for index, at in enumerate(plain):
                chosen[at] = tokens[index], None if scores is None else scores[index]
    for at, row in enumerate(rows):
        if chosen[at] is None:
            try:
                (token,), scores = sampler(logits[at : at + 1], [row])
                chosen[at] = token, None if scores is None else scores[0]
            except Exception as error:
                if not row.logits_processors and not isinstance(error, TautError):
                    raise
                chosen[at] = error
    return chosen


def logprobs(logits: Tensor, token: int, count: int) -> TokenLogprobs:
    """Of a token and of the `count` likeliest, from `logits` `[vocab]`."""
    values = logits.log_softmax(-1)
    top = values.topk(min(count, values.shape[0]))
    found = torch.cat((values[token : token + 1], top.values)).tolist()
    return TokenLogprobs(found[0], list(zip(top.indices.tolist(), found[1:], strict=True)))
