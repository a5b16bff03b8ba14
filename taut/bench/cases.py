"""What is measured: kinds of work, and the cases that options ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from taut.errors import RequestError, nearest


@dataclass(frozen=True)
class Kind:
    """One kind of work. `unit`: of its figures. `more`: whether more is better. `axis`: what `length` is."""

    title: str
    unit: str
    more: bool = False
    axis: str = "length"
    generates: bool = False


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "forward": Kind("forward, all rows full", "ms"),
        "padded": Kind("forward, uneven rows in a padded batch", "ms"),
        "generate": Kind("generate, uneven rows in a padded batch", "ms", generates=True),
        "decode": Kind("decode", "tok/s", more=True, axis="context", generates=True),
        "memory": Kind("peak memory of a forward, weights included", "GB"),
    }
)

# Of the tokens that a decode generates, so many come before the clock starts: graphs are captured and
# kernels compiled for what decodes, and the prompt is none of its business.
UNCOUNTED = 4
# The shortest row of an uneven batch is this part of the longest.
UNEVENNESS = 32


@dataclass(frozen=True)
class Case:
    """One point of a chart: `batch` rows, the longest of `length` tokens, `new_tokens` generated a row."""

    what: str
    batch: int
    length: int
    new_tokens: int = 0

    @property
    def rows(self) -> list[int]:
        """Real tokens of each row: all full, or evenly from a 32nd of the longest to the longest."""
        if self.what not in ("padded", "generate") or self.batch == 1:
            return [self.length] * self.batch
        least = max(1, self.length // UNEVENNESS)
        return [least + (self.length - least) * row // (self.batch - 1) for row in range(self.batch)]

    @property
    def span(self) -> int:
        """Positions that the longest row takes."""
        return self.length + self.new_tokens

    def __str__(self) -> str:
        return f"{self.what} {self.batch} x {self.length}"


@dataclass(frozen=True)
class Inputs:
    """Random ids `[rows, width]` int64, and `mask` `[rows, width]` int64, or None where no row is padded."""

    ids: Tensor
    mask: Tensor | None

    @staticmethod
    def of(case: Case, vocab: int, device: torch.device) -> Inputs:
        """The case's inputs, the same each time: padded on the left where text is generated (the peers need
        that), otherwise on the right."""
        generator = torch.Generator().manual_seed(case.batch * 1_000_003 + case.length)
        ids = torch.randint(0, vocab, (case.batch, case.length), generator=generator)
        rows = torch.tensor(case.rows).unsqueeze(1)
        place = torch.arange(case.length).unsqueeze(0)
        mask = place >= case.length - rows if KINDS[case.what].generates else place < rows
        mask = mask.to(torch.int64)
        return Inputs(ids.to(device), None if bool(mask.all()) else mask.to(device))


def names(option: str, text: str, known: Sequence[str]) -> list[str]:
    """The comma-separated names in `text`, each once, in the order of `known`; `RequestError` otherwise."""
    given = [part.strip() for part in text.split(",") if part.strip()]
    for name in given:
        if name not in known:
            raise RequestError(
                f"{option} has {name!r}; known, separated by commas: {', '.join(known)}{nearest(name, known)}"
            )
    if not given:
        raise RequestError(f"{option} is empty; known, separated by commas: {', '.join(known)}")
    return [name for name in known if name in given]


def integers(option: str, text: str) -> list[int]:
    """The comma-separated integers in `text`, ascending, each once; `RequestError` for one below 1."""
    found = set()
    for part in text.split(","):
        if not part.strip().isdecimal() or int(part) < 1:
            raise RequestError(f"{option} is {text!r}; expected integers of at least 1, such as 1,8")
        found.add(int(part))
    return sorted(found)


def make_cases(
    what: Sequence[str],
    *,
    lengths: Sequence[int],
    batches: Sequence[int],
    contexts: Sequence[int],
    new_tokens: int,
) -> list[Case]:
    """The cases of each kind in turn, small before large. A padded forward needs at least two rows."""
    cases = []
    for kind in what:
        if kind == "padded" and max(batches) < 2:
            raise RequestError(
                "--what padded measures rows of several lengths, and --batches has only 1; add a batch of 2 "
                "or more, or leave padded out"
            )
        new = new_tokens if KINDS[kind].generates else 0
        for batch in batches:
            if kind == "padded" and batch < 2:
                continue
            spans = contexts if KINDS[kind].axis == "context" else lengths
            cases += [Case(kind, batch, length, new) for length in spans]
    return cases
