"""`Scheduler`: which tokens of which requests go into the next batch, and who owns which pages."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
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

    A row begins with the pages that already hold its first tokens, whoever computed them: rows that have
    ended, rows that run, or rows that are computed in the same batch, which writes all keys before it reads
    any. Only whole pages are shared, and never the last token, whose successor is asked for.

    `context` is the longest sequence the model takes. `recompute_at` is a length past which all cached keys
    of a row turn by other angles (longrope): the row is then computed again, once. `share`: whether equal
    tokens have equal keys at all.
    """

    def __init__(
        self,
        pages: PagePool,
        *,
        max_rows: int,
        chunk: int,
        context: int | None = None,
        recompute_at: int | None = None,
        share: bool = True,
    ):
        for name, value in (("max_rows", max_rows), ("chunk", chunk)):
            if not isinstance(value, int) or value < 1:
                raise RequestError(f"{name} is {value!r}; expected an integer of at least 1")
        self.pages, self.max_rows, self.chunk = pages, max_rows, chunk
        self.context, self.recompute_at, self.share = context, recompute_at, share
        self._entered: list[int] = []  # pages that the batch under way makes known,
        self._begun: list[Request] = []  # and rows that begin in it
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
        self._enter(request, request.computed)
        self._vacate(request)
        request.finish_reason = reason
        request.status = Status.FINISHED  # last: it tells other threads that the rest is final

    def schedule(self) -> list[Work]:
        """The next batch, with pages for all its tokens; empty only where there is nothing to do."""
        plan: dict[Request, int] = {}
        self._entered, self._begun = [], []
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
        for request, count in plan.items():
            self._enter(request, request.computed + count)
        while left and self._admissible():
            request = self.waiting.popleft()
            request.status = Status.RUNNING
            self.running.append(request)
            self._begun.append(request)
            request.pages = self.pages.share(self._known(request))
            request.indexed = len(request.pages)
            request.found = request.computed = request.indexed * self.pages.size
            count = min(request.length - request.computed, left)
            self._reserve(request, count, plan)
            self._enter(request, request.computed + count)
            plan[request] = count
            left -= count
        return [Work(r, r.computed, n, r.computed + n == r.length) for r, n in plan.items()]

    def abandon(self) -> None:
        """The batch last scheduled has failed: no page that it was to fill may be shared, and rows that began
        in it, which may share such pages, begin again."""
        self.pages.forget(self._entered)
        for request in reversed(self._begun):
            if request.status is Status.RUNNING:
                self._preempt(request)

    def spoil(self, request: Request) -> list[int]:
        """A request's keys aren't finite: nobody may share its pages. Gives those that it alone holds."""
        self.pages.forget(request.pages)
        request.indexed = None
        return [page for page in request.pages if self.pages.holders(page) == 1]

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
            self._vacate(request)

    def _reserve(self, request: Request, count: int, plan: dict[Request, int]) -> bool:
        """Pages for `count` more tokens, if need be those of the newest; False if that is `request`."""
        if request.status is not Status.RUNNING:  # preempted earlier in this step
            return False
        need = self.pages.needed(request.computed + count) - len(request.pages)
        while need > self.pages.free:
            newest = self.running[-1]
            self._preempt(newest)
            plan.pop(newest, None)
            if newest is request:
                return False
        if need > 0:
            self.pages.extend(request.pages, need)
        return True

    def _preempt(self, request: Request) -> None:
        """A running row gives up its pages and waits, first in the queue."""
        self.running.remove(request)
        self._enter(request, request.computed)
        self._vacate(request)
        request.status = Status.WAITING
        self.waiting.appendleft(request)

    def _vacate(self, request: Request) -> None:
        self.pages.release(request.pages)
        request.computed = request.indexed = 0

    def _admissible(self) -> bool:
        """Whether the first in the queue can start: beside other rows only if all of it would fit now, so
        that it isn't preempted before its first token."""
        if not self.waiting or len(self.running) >= self.max_rows:
            return False
        if not self.running:
            return True
        needed = self.pages.needed
        promised = sum(max(needed(r.length) - len(r.pages), 0) for r in self.running)
        request, room = self.waiting[0], self.pages.free - promised
        need = needed(request.length + 1)
        if room >= need:
            return True
        known = self._known(request)
        return room - self.pages.idle(known) >= need - len(known)

    # -- shared prefixes ---------------------------------------------------------------------------------

    def _scope(self, request: Request) -> Hashable:
        """What a request's prefixes are shared in: keys differ on both sides of `recompute_at`."""
        return request.scope, self.recompute_at is not None and request.length > self.recompute_at

    def _known(self, request: Request) -> list[int]:
        """Pages that hold the beginning of a request, but for its last token."""
        if not self.share or request.scope is None:
            return []
        size = self.pages.size
        ends = range(size, request.length, size)
        return self.pages.prefixes.find(
            self._scope(request), (request.tokens(end - size, end) for end in ends)
        )

    def _enter(self, request: Request, stop: int) -> None:
        """Let others share a request's pages that are full with the keys of its first `stop` tokens, until
        one of them stands in another page too."""
        if not self.share or request.scope is None or request.indexed is None:
            return
        size, pages = self.pages.size, request.pages
        for at in range(request.indexed, stop // size):
            block = request.tokens(at * size, (at + 1) * size)
            parent = pages[at - 1] if at else None
            if not self.pages.prefixes.add(self._scope(request), parent, block, pages[at]):
                request.indexed = None
                return
            self._entered.append(pages[at])
            request.indexed = at + 1
