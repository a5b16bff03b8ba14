"""`AsyncEngine`: one thread steps an engine; requests come from any thread and any event loop."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Any

import torch

from taut.engine.engine import Engine
from taut.engine.request import Request
from taut.errors import RequestError


class AsyncEngine:
    """Serves requests with an engine in a thread of its own, until it is closed.

    `stream` gives a request's tokens as they come, to an event loop; `submit` gives a `Ticket`, to a thread.
    A request that fails ends alone; one whose reader leaves is cancelled. An error of a whole step ends the
    newest request, which may have been one too many, and the others go on.

    `max_waiting`: more requests than these in the queue are refused. Methods may be called from any thread.
    """

    def __init__(self, engine: Engine, *, max_waiting: int | None = None):
        self.engine, self.max_waiting = engine, max_waiting
        self._inbox: deque[tuple[str, Ticket]] = deque()  # what is to be done between two steps
        self._tickets: dict[Request, Ticket] = {}
        self._wake = threading.Condition()
        self._closing = self._closed = False
        self._thread = threading.Thread(target=self._run, name="taut-engine", daemon=True)
        self._thread.start()

    # -- requests ------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Ticket:
        """Queue a request. Raises `RequestError` for one that can't be served, where the queue is full and
        once the engine is closing."""
        return self._submit(Ticket(self, request))

    async def stream(self, request: Request) -> AsyncIterator[list[int]]:
        """New tokens of a request, each time there are some (of beams, all at the end). Leaving the loop, or
        cancelling its task, cancels the request. Raises the request's error where it ends with one."""
        ticket = self._submit(Ticket(self, request, asyncio.get_running_loop()))
        try:
            while True:
                tokens = await ticket.inside.get()
                if tokens is None:
                    break
                yield tokens
        finally:
            self.cancel(request)
        if request.error is not None:
            raise request.error

    async def run(self, request: Request) -> Request:
        """Serve a request to its end."""
        async with contextlib.aclosing(self.stream(request)) as tokens:
            async for _ in tokens:
                pass
        return request

    def cancel(self, request: Request) -> None:
        """End a request between two steps; one that has finished stays as it is."""
        with self._wake:
            ticket = self._tickets.get(request)
            if ticket is not None and not request.finished:
                self._inbox.append(("cancel", ticket))
                self._wake.notify()

    def _submit(self, ticket: Ticket) -> Ticket:
        self.engine.check(ticket.request)
        with self._wake:
            if self._closing:
                raise RequestError("the engine is closing and takes no further request")
            waiting = len(self._inbox) + len(self.engine.scheduler.waiting)
            if self.max_waiting is not None and waiting >= self.max_waiting:
                raise RequestError(
                    f"{waiting} requests wait already (max_waiting={self.max_waiting}); try again later"
                )
            if ticket.request in self._tickets:
                raise RequestError("the request was submitted before; make a new one to run it again")
            self._tickets[ticket.request] = ticket
            self._inbox.append(("submit", ticket))
            self._wake.notify()
        return ticket

    # -- the end -------------------------------------------------------------------------------------------

    def close(self, timeout: float | None = None) -> None:
        """Take no more requests, serve those there are (for at most `timeout` seconds, then cancel them), and
        end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout)
        self._closed = True
        with self._wake:
            self._wake.notify()
        self._thread.join()

    async def aclose(self, timeout: float | None = None) -> None:
        """`close`, for an event loop, which stays free."""
        await asyncio.get_running_loop().run_in_executor(None, self.close, timeout)

    def __enter__(self) -> AsyncEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        self.close(timeout=None if kind is None else 0.0)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        await self.aclose(timeout=None if kind is None else 0.0)

    # -- the thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        device = torch.device(self.engine.model.device)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            while self._wait():
                self._settle()
                try:
                    events = self.engine.step()
                except Exception as error:
                    self._give_way(error)
                    continue
                self._deliver({event.request: event.tokens for event in events})
            for ticket in list(self._tickets.values()):
                self.engine.cancel(ticket.request)
            self._deliver({})

    def _wait(self) -> bool:
        """Until there is something to do; False where there is and will be nothing."""
        with self._wake:
            while not (self._closed or self._inbox or self.engine.has_work or self._closing):
                self._wake.wait()
            return not self._closed and bool(self._inbox or self.engine.has_work)

    def _settle(self) -> None:
        """Do what was posted."""
        while self._inbox:
            what, ticket = self._inbox.popleft()
            if what == "cancel":
                self.engine.cancel(ticket.request)
                continue
            try:
                self.engine.submit(ticket.request)
            except Exception as error:
                self.engine.fail(ticket.request, error)
        self._deliver({})

    def _give_way(self, error: Exception) -> None:
        """A step failed as a whole."""
        requests = self.engine.scheduler.requests
        running = self.engine.scheduler.running
        if requests:
            self.engine.fail(running[-1] if running else requests[0], error)
        self._deliver({})

    def _deliver(self, new: dict[Request, list[int]]) -> None:
        """Tokens to those who wait for them, and the news of an end; one call for each event loop."""
        calls: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, list[int] | None]]] = {}
        with self._wake:
            tickets = dict(self._tickets)
            ended = [request for request in tickets if request.finished]
            for request in ended:
                del self._tickets[request]
        for request, tokens in [*new.items(), *((request, None) for request in ended)]:
            ticket = tickets.get(request)
            if ticket is None or tokens == []:
                continue
            if ticket.loop is None:
                ticket.inside.put(tokens)
            else:
                calls.setdefault(ticket.loop, []).append((ticket, tokens))
        for loop, items in calls.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(_put, items)


class Ticket:
    """A request that is under way, for the thread that asked: an iterator of its new tokens, a list each."""

    def __init__(self, front: AsyncEngine, request: Request, loop: asyncio.AbstractEventLoop | None = None):
        self.front, self.request, self.loop = front, request, loop
        self.inside: Any = queue.SimpleQueue() if loop is None else asyncio.Queue()

    def __iter__(self) -> Iterator[list[int]]:
        try:
            while (tokens := self.inside.get()) is not None:
                yield tokens
        finally:
            self.cancel()
        if self.request.error is not None:
            raise self.request.error

    def result(self) -> Request:
        """The request, once it has finished; raises its error where it ends with one."""
        for _ in self:
            pass
        return self.request

    def cancel(self) -> None:
        self.front.cancel(self.request)


def _put(items: list[tuple[Ticket, list[int] | None]]) -> None:
    for ticket, tokens in items:
        ticket.inside.put_nowait(tokens)
