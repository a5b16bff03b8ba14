"""`Stream`: one row as it is generated; and how a row's text ends it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from taut.engine.engine import Engine
from taut.engine.generation import StopMatcher
from taut.engine.request import Request
from taut.tokenizer import IncrementalDetokenizer


class RowText:
    """A row's text as its tokens come, up to the first stop string."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], skip_special_tokens: bool = True) -> None:
        self._pieces = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._matcher = StopMatcher(stops)

    @property
    def stopped(self) -> bool:
        return self._matcher.stopped

    def push(self, token: int) -> str:
        return self._matcher.push(self._pieces.push(token))

    def finish(self) -> str:
        return self._matcher.push(self._pieces.finish()) + self._matcher.finish()


class StopRow:
    """Ends a row at a stop string in its text, or where one of the user's criteria says so."""

    def __init__(self, text: RowText | None, criteria: tuple[Callable[..., Any], ...], given: Tensor) -> None:
        self.text, self.criteria, self.given = text, criteria, given
        self.seen = 0  # tokens whose text was looked at
        self.by_criterion = False

    def __call__(self, request: Request) -> bool:
        if self.text is not None:
            for token in request.output[self.seen :]:
                self.text.push(token)
            self.seen = len(request.output)
            if self.text.stopped:
                return True
        if self.criteria:
            new = torch.tensor([request.output], dtype=torch.int64, device=self.given.device)
            ids = torch.cat((self.given, new), dim=1)  # [1, width + new]
            scores = tuple(step.unsqueeze(0) for step in request.scores) or None
            self.by_criterion = any(bool(torch.as_tensor(one(ids, scores)).all()) for one in self.criteria)
        return self.by_criterion


def reason(request: Request) -> str | None:
    """Why a row ended; a stopping criterion counts as "stop"."""
    stop = request.should_stop
    return "stop" if isinstance(stop, StopRow) and stop.by_criterion else request.finish_reason


class Stream:
    """One row as it is generated: an iterator of text or token ids, see `stream`.

    `tokens`: ids so far. `finish_reason`: None until the end. `close()` (or `aclose()`, or leaving a
    `with` block) cancels the row, frees its pages and drops the cache.
    """

    def __init__(self, engine: Engine, request: Request, text: RowText | None) -> None:
        self.request = request
        self._engine: Engine | None = engine
        self._text = text
        self._pieces: Iterator[str | int] | None = None
        self._later: AsyncIterator[str | int] | None = None

    @property
    def tokens(self) -> list[int]:
        return list(self.request.output)

    @property
    def finish_reason(self) -> str | None:
        return reason(self.request)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str | int:
        if self._pieces is None:
            self._pieces = self._run()
        return next(self._pieces)

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> str | int:
        if self._later is None:
            self._later = self._arun()
        return await anext(self._later)

    def close(self) -> None:
        """Cancels the row if it is not finished; the iterator then ends."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.cancel(self.request)

    async def aclose(self) -> None:
        """`close` for an event loop: waits for the step that is under way."""
        if self._later is not None:
            await self._later.aclose()
        self.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self.close()

    def _run(self) -> Iterator[str | int]:
        if self._engine is None:
            return
        try:
            for token in self._engine.stream(self.request):
                yield from self._show(token)
                if self._engine is None:
                    return
            yield from self._rest()
        finally:
            self.close()

    async def _arun(self) -> AsyncIterator[str | int]:
        if self._engine is None:
            return
        tokens = self._engine.astream(self.request)
        try:
            async for token in tokens:
                for piece in self._show(token):
                    yield piece
                if self._engine is None:
                    return
            for piece in self._rest():
                yield piece
        finally:
            await tokens.aclose()
            self.close()

    def _show(self, token: int) -> list[str | int]:
        if self._text is None:
            return [token]
        shown = self._text.push(token)
        return [shown] if shown else []

    def _rest(self) -> list[str | int]:
        rest = self._text.finish() if self._text is not None else ""
        return [rest] if rest else []
