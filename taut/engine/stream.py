"""`Stream`: one row as it is generated."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from typing import Any

from taut.engine.engine import Engine
from taut.engine.request import Request
from taut.engine.stops import RowText, StopRow


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
