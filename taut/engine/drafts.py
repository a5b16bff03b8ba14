"""`Drafter`: guesses of what comes next, and `Ledger`: whether checking them has paid.

A guess is checked in the step that computes the row's next token. It is right where it is the token that the
row gets anyway: the likeliest one or, where a row samples, the one that its seed and step draw.
So guesses change when tokens are known and never which: a row's tokens are those it gets without them, greedy
or drawn, and each is drawn from the model's own distribution. (Speculative decoding, Leviathan et al. 2023,
arXiv:2211.17192, with the draft and the model coupled by a common random number.)
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from taut.engine.request import Request, Row


class Drafter(Protocol):
    """Where guesses come from. One object may serve many requests."""

    def propose(self, requests: Sequence[Request]) -> Mapping[Row, Sequence[int]]:
        """The next tokens of each of these requests that there is a guess for."""

    def learn(self, request: Request, offered: int, right: int) -> None:
        """So many of the tokens that were offered were right."""

    def rests(self, request: Request) -> bool:
        """Whether there will be no guess after the token that the request gets next."""

    def forget(self, request: Request) -> None:
        """The request has finished."""


class Ledger:
    """Keeps account of what checking guesses costs and gives, in decode steps, so that all in all they cost
    at most `ALLOWANCE` of the time that would be spent without them.

    A check is charged what such a step takes longer than one without guesses (the median of the last ones,
    since a first one may compile kernels), and credited the tokens of a row that it saved a step for.
    """

    ALLOWANCE = 0.03
    START, MOST = 3.0, 8.0
    FIRST_CHARGE = 4.0
    SAMPLES, EVERY = 3, 32  # plain steps before the first check, and one in so many later, to compare with

    def __init__(self) -> None:
        self.credit = self.START
        self._since = 0  # steps with guesses since the last one without
        self._plain: dict[int, deque[float]] = {}  # rows -> seconds of a step without guesses
        self._extra: dict[int, deque[float]] = {}  # guesses, as a power of two -> steps that a check adds

    def record(self, rows: int, drafted: int, right: int, seconds: float) -> None:
        """A step in which `rows` rows got their next tokens, and `drafted` guesses were checked."""
        self.credit = min(self.credit + self.ALLOWANCE, self.MOST)
        self._since = self._since + 1 if drafted else 0
        if not drafted:
            self._plain.setdefault(rows, deque(maxlen=31)).append(seconds)
            return
        plain = self._seconds(rows)
        if plain is None:
            return
        extra = self._extra.setdefault(drafted.bit_length(), deque(maxlen=15))
        extra.append(max(seconds / plain - 1, 0.0))
        charge = statistics.median(extra)
        if len(extra) < 3:
            charge = min(charge, self.FIRST_CHARGE)
        self.credit = min(self.credit + right / rows - charge, self.MOST)

    def affords(self, rows: int, drafted: int) -> bool:
        """Whether so many guesses may be checked now."""
        if self._seconds(rows) is None or self._since + 1 >= self.EVERY:
            return False
        known = [size for size in self._extra if size >= drafted.bit_length()] or list(self._extra)
        cost = statistics.median(self._extra[min(known)]) if known else 0.0
        return self.credit >= cost

    def _seconds(self, rows: int) -> float | None:
        """Of a step without guesses; of the nearest number of rows there is."""
        known = [size for size, samples in self._plain.items() if len(samples) >= self.SAMPLES]
        return statistics.median(self._plain[min(known, key=lambda s: abs(s - rows))]) if known else None


def grouped(requests: Iterable[Request]) -> dict[Drafter, list[Request]]:
    """Those that guesses can be made for, by who makes them."""
    found: dict[Drafter, list[Request]] = {}
    for request in requests:
        if request.drafter is not None and request.group is None and request.pending == 1:
            found.setdefault(request.drafter, []).append(request)
    return found
