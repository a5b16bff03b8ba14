"""`Beams`: beam search over the rows of one request, and which of them go on.

The order of operations and the rules for the end are those of transformers, so that sequences and scores are
equal: log-probabilities, processors (and, where beams are drawn, what shapes a draw), then the best
continuations of all beams together. Groups of beams follow transformers' last version of them (4.57), after
Vijayakumar et al. 2016 (arXiv:1610.02424): one group after the other, each token that an earlier group has
just taken at `diversity_penalty` a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taut.engine.request import Request, Row
from taut.engine.sampler import NonFiniteLogits, edit, signed, uniform, warped
from taut.errors import RequestError

# Stands for the score of what does not count: a beam that is only a copy, a sequence that has ended.
NEVER = np.float32(-1e9)


@dataclass
class Hypothesis:
    """A sequence that has ended: its new tokens, its score under the length penalty, and for each of its
    tokens the beam that was continued with it."""

    tokens: list[int]
    score: float
    beams: list[int]
    ended: bool = True


@dataclass
class _Beam:
    """A sequence that goes on: the sum of its log-probabilities, and the beams it came through."""

    score: np.float32
    beams: list[int] = field(default_factory=list)


@dataclass
class _Candidate:
    """A beam with one more token."""

    beam: int
    token: int
    score: np.float32
    ends: bool = False


class Beams:
    """A search for the likeliest sequences of one request.

    | argument | meaning |
    |---|---|
    | `count` | beams that are followed at a time |
    | `returned` | of the sequences that have ended, how many are wanted, at most `count` |
    | `length_penalty` | a score is the sum of log-probabilities divided by the length to this power |
    | `early_stopping` | True: end with `count` sequences; False: when the best beam is now below the worst \
of them; "never": when it can't rise above it any more |
    | `groups`, `diversity_penalty` | groups that the beams fall into, and what a token costs that an \
earlier group has taken in the same step |

    `hypotheses` are the sequences that have ended, the best first, once the request has finished. An object
    serves one request.
    """

    def __init__(
        self,
        count: int,
        *,
        returned: int = 1,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        groups: int = 1,
        diversity_penalty: float = 0.0,
    ):
        if count < 1 or not 1 <= returned <= count:
            raise RequestError(f"num_return_sequences is {returned}; expected 1 to num_beams={count}")
        if groups < 1 or count % groups:
            raise RequestError(f"num_beam_groups is {groups}; it must divide num_beams={count}")
        if early_stopping not in (True, False, "never"):
            raise RequestError(f"early_stopping is {early_stopping!r}; known: True, False, 'never'")
        self.width, self.returned = count, returned
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        self.groups, self.diversity_penalty = groups, diversity_penalty
        self.hypotheses: list[Hypothesis] = []
        size = count // groups
        self._beams = [_Beam(np.float32(0.0) if at % size == 0 else NEVER) for at in range(count)]
        self._ended: list[list[Hypothesis]] = [[] for _ in range(groups)]
        self._done = [False] * groups

    def rows(self, request: Request) -> list[Row]:
        """A search begins with the prompt alone."""
        return []

    def choose(self, request: Request, logits: Tensor) -> list[tuple[Row, int]] | None:
        """The beams that go on after `logits` `[rows, vocab]`: for each, a row that there is and its next
        token; None where the search is at its end.

        Raises `NonFiniteLogits`, and whatever the request's processors raise.
        """
        rows = list(request.rows)
        if logits.dtype not in (torch.float32, torch.float64):
            logits = logits.float()
        if not bool(logits.amax(-1).isfinite().all()):
            raise NonFiniteLogits([0])
        if len(rows) == 1:  # all beams are still one
            rows, logits = rows * self.width, logits.expand(self.width, -1)
        size, log_probs = self.width // self.groups, logits.log_softmax(-1)
        chosen: list[tuple[int, int]] = []  # (beam, token) of all that go on
        taken: Counter[int] = Counter()  # tokens of those of earlier groups
        following: list[_Beam] = []
        scored: list[Tensor] = []
        for group in range(self.groups):
            first = group * size
            scores = log_probs[first : first + size]
            if self.diversity_penalty and taken:
                penalty = scores.new_zeros(scores.shape[1])
                penalty[list(taken)] = penalty.new_tensor(list(taken.values())) * self.diversity_penalty
                scores = scores - penalty
            scores = _processed(scores, rows[first : first + size], request)
            scored.append(scores)
            if self._done[group]:  # its beams stand still
                chosen += [(at, rows[at].tokens()[-1]) for at in range(first, first + size)]
                following += self._beams[first : first + size]
                continue
            found = self._candidates(request, scores, first)
            for candidate in found:
                candidate.ends = self._ends(request, rows[candidate.beam], candidate.token)
            going = self._settle(request, group, found, rows)
            chosen += [(candidate.beam, candidate.token) for candidate in going]
            taken.update(candidate.token for candidate in going)
            following += [_Beam(c.score, [*self._beams[c.beam].beams, c.beam]) for c in going]
        self._keep(request, logits, scored)
        self._beams = following
        if all(self._done):
            self.close(request)
            return None
        return [(rows[beam], token) for beam, token in chosen]

    def close(self, request: Request) -> None:
        """End the search with what it has: where too few sequences have ended, beams that were going on."""
        for group, ended in enumerate(self._ended):
            size = self.width // self.groups
            if not self._done[group] and len(request.rows) == self.width:
                for at in range(group * size, (group + 1) * size):
                    beam, output = self._beams[at], list(request.rows[at].output)
                    ended.append(
                        Hypothesis(output, self._normed(beam.score, len(output)), beam.beams, ended=False)
                    )
                ended.sort(key=_score, reverse=True)
                del ended[size:]
        every = sorted((one for ended in self._ended for one in ended), key=_score, reverse=True)
        self.hypotheses = every[: self.returned]
        if self.hypotheses:
            request.output = list(self.hypotheses[0].tokens)

    # ------------------------------------------------------------------------------------ one group, one step

    def _candidates(self, request: Request, scores: Tensor, first: int) -> list[_Candidate]:
        """The continuations of a group's beams that count, `scores` `[beams, vocab]`: so many that enough go
        on however many of them end."""
        size, vocab = scores.shape
        sums = (
            scores + scores.new_tensor([float(b.score) for b in self._beams[first : first + size]])[:, None]
        )
        flat = sums.flatten()
        count = min(max(2, 1 + len(request.params.eos_token_ids)) * size, size * vocab)
        if request.params.greedy:
            values, index = flat.topk(count)
        else:  # drawn without replacement: the largest with Gumbel noise (Kool et al. 2019, 1903.06059)
            noise = -(-self._uniform(request, flat).log()).log()
            index = (flat.double() + noise).topk(count).indices
            values = flat[index]
        packed = torch.stack((values.double(), index.double())).tolist()
        return [
            _Candidate(first + int(at) // vocab, int(at) % vocab, np.float32(value))
            for value, at in zip(*packed, strict=True)
        ]

    def _uniform(self, request: Request, flat: Tensor) -> Tensor:
        """A number in [0, 1) for each continuation, from the seed and the step alone."""
        step = len(request.rows[0].output)
        count = torch.arange(flat.numel(), device=flat.device) + step * flat.numel()
        return uniform(count.new_tensor(signed(request.params.seed)), count)

    def _settle(
        self, request: Request, group: int, found: list[_Candidate], rows: Sequence[Row]
    ) -> list[_Candidate]:
        """Take in what has ended, see whether the group is done, and give the continuations that go on."""
        size, ended = self.width // self.groups, self._ended[group]
        length = len(rows[0].output) + 1
        full = length == request.params.max_new_tokens
        for candidate in found[:size]:
            if candidate.ends or full:
                tokens = [*rows[candidate.beam].output, candidate.token]
                beams = [*self._beams[candidate.beam].beams, candidate.beam]
                ended.append(Hypothesis(tokens, self._normed(candidate.score, len(tokens)), beams))
        ended.sort(key=_score, reverse=True)
        del ended[size:]
        last = [np.float32(c.score + NEVER) if c.ends else c.score for c in found]
        order = sorted(range(len(found)), key=last.__getitem__, reverse=True)[:size]
        going = [found[at] for at in order]
        going += [going[-1]] * (size - len(going))  # fewer tokens than beams
        if len(ended) == size and self.early_stopping is True:
            self._done[group] = True
        elif len(ended) == size:
            best = last[order[0]] if self.groups == 1 else max(c.score for c in found)
            reach = length
            if self.early_stopping == "never" and self.length_penalty > 0:
                reach = request.params.max_new_tokens
            self._done[group] = not self._normed(best, reach) > ended[-1].score
        if full or all(candidate.ends for candidate in found):
            self._done[group] = True
        return going

    def _normed(self, score: np.float32, length: int) -> float:
        return float(score / np.float32(length**self.length_penalty))

    def _ends(self, request: Request, row: Row, token: int) -> bool:
        """Whether this token ends a sequence, however long it may be."""
        if token in request.params.eos_token_ids:
            return True
        if request.constraint is not None and request.constraint.complete([*row.output, token]):
            return True
        if request.should_stop is None:
            return False
        return request.should_stop(_Seen(request, [*row.output, token]))

    def _keep(self, request: Request, logits: Tensor, scored: list[Tensor]) -> None:
        """What the caller wants to see of the step, `[beams, vocab]`, as ordinary tensors."""
        with torch.inference_mode(False):
            if request.keep_logits:
                request.logits.append(logits.clone())
            if request.keep_scores:
                request.scores.append(torch.cat([scores.clone() for scores in scored]))


@dataclass
class _Seen:
    """A continuation as `should_stop` sees it."""

    request: Request
    output: list[int]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.request, name)


def _score(hypothesis: Hypothesis) -> float:
    return hypothesis.score


def _processed(scores: Tensor, rows: Sequence[Row], request: Request) -> Tensor:
    """Log-probabilities `[beams, vocab]` after the request's options and processors."""
    scores = edit(scores, rows)
    if not request.params.greedy:
        scores = warped(scores, rows)
    return scores.log_softmax(-1) if request.params.renormalize else scores
