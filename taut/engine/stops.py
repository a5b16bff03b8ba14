"""What ends a row beside its tokens: stop strings in its text, and the user's criteria."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from taut.engine.request import Request
from taut.errors import RequestError
from taut.tokenizer import IncrementalDetokenizer, Tokenizer


class StopMatcher:
    """Finds the first stop string in text that arrives in pieces, and says what may be shown.

    The match is the one that is complete first; of several complete at the same character, the longest.
    So the result does not depend on where the text is cut into pieces: what `push` and `finish` give,
    joined, is the text before that match. `stopped`: whether a match was found.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.stopped = False
        self._held = ""  # the end of the text that may be the start of a stop string

    def push(self, piece: str) -> str:
        """Text that is certain not to belong to a stop string, now that `piece` is known; "" once stopped."""
        if self.stopped:
            return ""
        if not self.stops:
            return piece
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self.stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        self._held = text[self._safe(text) :]
        return text[: len(text) - len(self._held)]

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _safe(self, text: str) -> int:
        """Where the longest end of `text` that begins a stop string starts; its length when none does."""
        longest = max(map(len, self.stops)) - 1
        for start in range(max(len(text) - longest, 0), len(text)):
            if any(stop.startswith(text[start:]) for stop in self.stops):
                return start
        return len(text)


def detokenizer(tokenizer: Any, skip_special_tokens: bool) -> IncrementalDetokenizer:
    """One for `tokenizer`; raises `RequestError` unless that is a tokenizer of Taut."""
    if not isinstance(tokenizer, Tokenizer):
        raise RequestError(
            f"tokenizer is a {type(tokenizer).__name__}; expected a tokenizer of Taut. Next step: load it "
            "with taut.AutoTokenizer.from_pretrained"
        )
    return IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)


class RowText:
    """A row's text as its tokens come, up to the first stop string."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], skip_special_tokens: bool = True) -> None:
        self._pieces = detokenizer(tokenizer, skip_special_tokens)
        self._matcher = StopMatcher(stops)

    @property
    def stopped(self) -> bool:
        return self._matcher.stopped

    def push(self, token: int) -> str:
        return self._matcher.push(self._pieces.push(token))

    def finish(self) -> str:
        return self._matcher.push(self._pieces.finish()) + self._matcher.finish()

    def copy(self) -> RowText:
        """The same text so far, to be continued in another way."""
        shared = self._pieces.tokenizer, self._pieces.tokenizer.backend_tokenizer
        return copy.deepcopy(self, {id(one): one for one in shared})


class StopRow:
    """Ends a row at a stop string in its text, or where one of the user's criteria says so.

    It is asked about one sequence that grows, or about several that branch off one another, each after its
    last token.
    """

    def __init__(self, text: RowText | None, criteria: tuple[Callable[..., Any], ...], given: Tensor) -> None:
        self.text, self.criteria, self.given = text, criteria, given
        self._texts: dict[tuple[int, ...], RowText] = {}  # of the sequences before and with their last token
        self.by_criterion = False

    def __call__(self, request: Request) -> bool:
        if self.text is not None and self._reads_stop(request):
            return True
        if self.criteria:
            new = torch.tensor([request.output], dtype=torch.int64, device=self.given.device)
            ids = torch.cat((self.given, new), dim=1)  # [1, width + new]
            scores = tuple(step.view(-1, step.shape[-1]) for step in request.scores) or None
            self.by_criterion = any(bool(torch.as_tensor(one(ids, scores)).all()) for one in self.criteria)
        return self.by_criterion

    def _reads_stop(self, request: Request) -> bool:
        if request.group is None:
            self.text.push(request.output[-1])
            return self.text.stopped
        sequence = tuple(request.output)
        before = self._texts.get(sequence[:-1], self.text)
        text = before.copy()
        text.push(sequence[-1])
        self._texts = {seen: t for seen, t in self._texts.items() if len(seen) >= len(sequence) - 1}
        self._texts[sequence] = text
        return text.stopped
