"""`Stream`: one row as it is generated; and how a row's text ends it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from taut.engine.engine import Engine
from taut.engine.generation import StopMatcher
from taut.engine.request import Request
from taut.engine.streamers import detokenizer


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

    `tokens`: ids so far. `finish_reason`: None until the end. `close()` (or `aclose()`, leaving a `with`
    block, or dropping the stream) cancels the row and frees its pages.
    """

    def __init__(self, engine: Engine, request: Request, text: RowText | None, model: Any) -> None:
        self.request = request
        self._model = model  # which the engine does not keep alive
        self._engine: Engine | None = engine  # None once closed
        self._text = text
        self._pieces: Generator[str | int] | None = None
        self._later: AsyncGenerator[str | int] | None = None

    @property
    def tokens(self) -> list[int]:
        return list(self.request.output)

    @property
    def finish_reason(self) -> str | None:
        return reason(self.request)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str | int:
        if self._engine is None:
            raise StopIteration
        if self._pieces is None:
            self._pieces = _pieces(self._engine, self.request, self._text)
        try:
            return next(self._pieces)
        except BaseException:  # the end, an error or an interrupt
            self.close()
            raise

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> str | int:
        if self._engine is None:
            raise StopAsyncIteration
        if self._later is None:
            self._later = _later(self._engine, self.request, self._text)
        try:
            return await anext(self._later)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Cancels the row if it is not finished; the iterator then ends. From any thread."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.cancel(self.request)  # waits for a step that is under way in another thread
            self._pieces = self._later = self._model = None

    async def aclose(self) -> None:
        """`close` for an event loop, which stays free while a step is under way."""
        engine, later = self._engine, self._later
        if later is not None:
            await later.aclose()
        if engine is not None:
            await asyncio.get_running_loop().run_in_executor(None, engine.cancel, self.request)
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


# Functions, not methods: a generator that held its stream would keep it alive after its user left.


def _pieces(engine: Engine, request: Request, text: RowText | None) -> Generator[str | int]:
    for token in engine.stream(request):
        yield from _shown(text, token)
    yield from _rest(text)


async def _later(engine: Engine, request: Request, text: RowText | None) -> AsyncGenerator[str | int]:
    tokens = engine.astream(request)
    try:
        async for token in tokens:
            for piece in _shown(text, token):
                yield piece
        for piece in _rest(text):
            yield piece
    finally:
        await tokens.aclose()


def _shown(text: RowText | None, token: int) -> list[str | int]:
    if text is None:
        return [token]
    shown = text.push(token)
    return [shown] if shown else []


def _rest(text: RowText | None) -> list[str | int]:
    rest = text.finish() if text is not None else ""
    return [rest] if rest else []
