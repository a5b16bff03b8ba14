"""`Lookup`: guesses from what stands in the row already, after the same tokens (prompt lookup decoding)."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import Tensor

from taut.engine.request import Request, Row

# Places with the same last tokens that are compared, the newest, and how far back.
PLACES, BACK = 8, 32


class Lookup:
    """Guesses that a row goes on as it did the last time its last `ngram` tokens (2, or 1) stood in it; of
    several places, where most of what comes before is the same too.

    `source`: of an encoder-decoder, look into what the encoder read as well, which has the same vocabulary.

    After guesses that were right a row gets longer ones, of up to `most` tokens; after wrong ones it gets
    short ones, and rarely.
    """

    def __init__(self, most: int, ngram: int = 2, *, source: bool = False):
        self.most, self.ngram, self.source = most, min(ngram, 2), source
        self._rows: WeakKeyDictionary[Request, _History] = WeakKeyDictionary()

    def propose(self, requests: Sequence[Request]) -> Mapping[Row, Sequence[int]]:
        guesses = {}
        for request in requests:
            row = self._rows.setdefault(request, _History(self.ngram, self._read(request)))
            if len(request.output) < row.rests_until:
                continue
            guess = row.guess(request, min(row.size, self.most))
            if guess:
                guesses[request] = guess
            else:
                row.missed(request)
        return guesses

    def _read(self, request: Request) -> list[int]:
        known = self.source and request.source is not None and not isinstance(request.source, Tensor)
        return list(request.source) if known else []

    def learn(self, request: Request, offered: int, right: int) -> None:
        row = self._rows[request]
        row.misses = 0
        if right:
            row.wait = 0
            row.size = 2 * (right + 1) if right == offered else max(right + 1, 2)
        else:
            row.size, row.wait = 2, min(max(2 * row.wait, 1), 16)
            row.rests_until = len(request.output) + row.wait

    def rests(self, request: Request) -> bool:
        row = self._rows.get(request)
        return row is not None and len(request.output) + 1 < row.rests_until

    def forget(self, request: Request) -> None:
        self._rows.pop(request, None)


@dataclass
class _History:
    """What is known of one row: places of its n-grams, and how good guesses were lately."""

    ngram: int
    source: list[int] = field(default_factory=list)
    size: int = 4  # of the next guess
    wait: int = 0
    misses: int = 0
    rests_until: int = 0
    _seen: int = 0
    _places: dict[tuple[int, ...], deque[int]] = field(default_factory=dict)

    def guess(self, request: Request, size: int) -> list[int]:
        """Tokens that followed where the row ended as it does now; [] where it never did."""
        tokens = self.source + request.prompt + request.output
        length = len(tokens)
        for end in range(max(self._seen, self.ngram), length):  # the n-gram at the very end is looked for
            key = tuple(tokens[end - self.ngram : end])
            self._places.setdefault(key, deque(maxlen=PLACES)).append(end)
        self._seen = length
        places = self._places.get(tuple(tokens[length - self.ngram :]), ())
        if not places:
            return []
        best = max(reversed(places), key=lambda end: _common(tokens, end))
        guess: list[int] = []
        for at in range(best, best + size):  # past the end, what is guessed repeats itself
            guess.append(tokens[at] if at < length else guess[at - length])
        return guess

    def missed(self, request: Request) -> None:
        """There was no place to look at."""
        self.misses = min(self.misses + 1, 8)
        self.rests_until = len(request.output) + self.misses


def _common(tokens: Sequence[int], end: int) -> int:
    """How many tokens before `end` are those before the row's end."""
    length = len(tokens)
    count = 0
    while count < min(BACK, end) and tokens[end - 1 - count] == tokens[length - 1 - count]:
        count += 1
    return count
