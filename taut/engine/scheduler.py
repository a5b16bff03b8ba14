"""`Scheduler`: which tokens of which requests go into the next batch, and who owns which pages."""

from __future__ import annotations

from collections import deque
from itertools import chain
from typing import NamedTuple

from taut.engine.pages import PagePool
from taut.engine.request import Request, Status
from taut.errors import RequestError


class Work(NamedTuple):
    """Tokens [start, start + count) of a request go into the batch; `ready`: the last of them is its last
    token, so the next one can be sampled."""

    request: Request
    start: int
    count: int
    ready: bool


class Scheduler:
    """Continuous batching with chunked prefill (Agrawal et al. 2023, Sarathi): each step, every row that
    decodes gets its one token, and prefills share what is left of `chunk` tokens (at least one, so that
    they always advance). Holds no tensors.

    First come, first served: `running` and then `waiting` are in order of submission. Where pages run out,
    the newest running request gives up its pages and waits at the front of the queue, keeping its output,
    which is computed again later. The oldest request can therefore always go on, and since `add` refuses
    what wouldn't fit alone, everything finishes.

    `context` is the longest sequence the model takes. `recompute_at` is a length past which all cached keys
    of a row turn by other angles (longrope): the row is then computed again, once, in pages it keeps.
    """

    def __init__(
        self,
        pages: PagePool,
        *,
        max_rows: int,
        chunk: int,
        context: int | None = None,
        recompute_at: int | None = None,
    ):
        for name, value in (("max_rows", max_rows), ("chunk", chunk)):
            if not isinstance(value, int) or value < 1:
                raise RequestError(f"{name} is {value!r}; expected an integer of at least 1")
        self.pages, self.max_rows, self.chunk = pages, max_rows, chunk
        self.context, self.recompute_at = context, recompute_at
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def requests(self) -> list[Request]:
        """All that are not finished, oldest first."""
        return list(chain(self.running, self.waiting))

    def check(self, request: Request) -> None:
        """Raise `RequestError` for a request that can never be served."""
        if request.status is not Status.WAITING or request.output:
            raise RequestError(
                f"request {request.id} is {request.status.value}; make a new one to run it again"
            )
        prompt, new = len(request.prompt), request.params.max_new_tokens
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token (such as the model's BOS token)")
        if self.context is not None and prompt + new > self.context:
            fits = self.context - prompt
            advice = f"max_new_tokens can be at most {fits}" if fits > 0 else "shorten the prompt"
            raise RequestError(
                f"prompt of {prompt} tokens + max_new_tokens={new} is {prompt + new} tokens, but the model's "
                f"context is {self.context}; {advice}"
            )
        held = prompt + new - 1  # nothing attends to the last token
        if held > self.pages.tokens:
            raise RequestError(
                f"prompt of {prompt} tokens + max_new_tokens={new} needs {self.pages.needed(held)} pages of "
                f"{self.pages.size} tokens, but the cache has {self.pages.count}; ask for at most "
                f"{self.pages.tokens + 1} tokens in all, or make an engine with cache_tokens={held} or more"
            )

    def add(self, request: Request) -> None:
        """Queue a request; raises `RequestError` if it can never be served."""
        self.check(request)
        self.waiting.append(request)

    def finish(self, request: Request, reason: str) -> None:
        """End a request and free its pages; one that is finished stays as it is."""
        if request.finished:
            return
        queue = self.running if request.status is Status.RUNNING else self.waiting
        if request in queue:
            queue.remove(request)
        self.pages.release(request.pages)
        request.computed = 0
        request.finish_reason = reason
        request.status = Status.FINISHED  # last: it tells other threads that the rest is final

    def schedule(self) -> list[Work]:
        """The next batch, with pages for all its tokens; empty only where there is nothing to do."""
        plan: dict[Request, int] = {}
        for request in self.running.copy():
            if request.length - request.computed == 1 and self._reserve(request, 1, plan):
                plan[request] = 1
        left = max(self.chunk - len(plan), 1)
        for request in self.running.copy():
            pending = request.length - request.computed
            count = min(pending, left)
            if pending > 1 and count and self._reserve(request, count, plan):
                plan[request] = count
                left -= count
        while left and self._admissible():
            request = self.waiting.popleft()
            request.status = Status.RUNNING
            self.running.append(request)
            count = min(request.length, left)
            self._reserve(request, count, plan)
            plan[request] = count
            left -= count
        return [Work(r, r.computed, n, r.computed + n == r.length) for r, n in plan.items()]

    def ahead(self, under_way: list[Work]) -> list[Work] | None:
        """The decode step after one whose tokens are not known yet, for the same rows, with pages for it;
        None where the next step may have to be another: a row ends or is computed anew, a request waits, or
        there is no free page."""
        rows = [work.request for work in under_way]
        if self.waiting or len(rows) != len(self.running):
            return None
        for request in rows:
            length = request.length + 1  # once the token under way has come
            ends = len(request.output) + 1 >= request.params.max_new_tokens
            if request.status is not Status.RUNNING or ends or length - 1 == self.recompute_at:
                return None
        missing = [self.pages.needed(r.length + 1) - len(r.pages) for r in rows]
        if sum(max(count, 0) for count in missing) > self.pages.free:
            return None
        for request, count in zip(rows, missing, strict=True):
            if count > 0:
                self.pages.extend(request.pages, count)
        return [Work(r, r.length, 1, True) for r in rows]

    def commit(self, work: Work, token: int | None = None) -> None:
        """The work has run: its keys are in the cache and, where it was ready, `token` comes next."""
        request = work.request
        if token is not None:
            request.output.append(token)
        request.computed = work.start + work.count
        if token is not None and self.recompute_at is not None and request.length == self.recompute_at + 1:
            request.computed = 0

    def _reserve(self, request: Request, count: int, plan: dict[Request, int]) -> bool:
        """Pages for `count` more tokens, if need be those of the newest; False if that is `request`."""
        if request.status is not Status.RUNNING:  # preempted earlier in this step
            return False
        need = self.pages.needed(request.computed + count) - len(request.pages)
        while need > self.pages.free:
            newest = self.running.pop()
            self.pages.release(newest.pages)
            newest.computed = 0
            newest.status = Status.WAITING
            self.waiting.appendleft(newest)
            plan.pop(newest, None)
            if newest is request:
                return False
        if need > 0:
            self.pages.extend(request.pages, need)
        return True

    def _admissible(self) -> bool:
        """Whether the first in the queue can start: beside other rows only if all of it would fit now, so
        that it isn't preempted before its first token."""
        if not self.waiting or len(self.running) >= self.max_rows:
            return False
        if not self.running:
            return True
        needed = self.pages.needed
        promised = sum(max(needed(r.length) - len(r.pages), 0) for r in self.running)
        return self.pages.free - promised >= needed(self.waiting[0].length + 1)
