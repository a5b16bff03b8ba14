"""`Scheduler`: which tokens of which rows go into the next batch, and who holds which pages."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import NamedTuple

from taut.engine.pages import PagePool
from taut.engine.request import Branch, Request, Row, Status
from taut.errors import RequestError

NO_DRAFTS: Mapping[Row, Sequence[int]] = MappingProxyType({})


class Work(NamedTuple):
    """Tokens [start, start + count) of a row go into the batch; `ready`: the last of them is its last token,
    so the next one can be chosen. `drafts` are guesses of what follows that go in behind them: then the next
    one can be chosen after each."""

    row: Row
    start: int
    count: int
    ready: bool
    drafts: tuple[int, ...] = ()


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
    any. Only whole pages are shared that way, and never the last token, whose successor is asked for.

    The rows of one request (`Request.rows`) decode in the same steps or not at all. Where one was branched
    off another, they hold the same pages, also a last one that isn't full: a row that is to write in a page
    which others hold first gets a copy of its own (`copies`, page -> the page it is a copy of, to be made
    before the batch runs).

    The source of a request, which an encoder reads, is encoded as a whole before the first batch with one of
    its rows (`sources`, in order), as many of them a step as fit into `chunk` and at least one; the keys made
    of it lie in pages that all its rows read and none writes, nor those of a request of the same source.

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
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.copies: dict[int, int] = {}
        self.sources: list[Request] = []
        self._entered: list[int] = []  # pages that others may share once the batch under way has run,
        self.begun: list[Row] = []  # and rows that begin in it

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
        prompt, new = max(len(row.prompt) for row in request.rows), request.params.max_new_tokens
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token (such as the model's BOS token)")
        if self.context is not None and prompt + new > self.context:
            fits = self.context - prompt
            advice = f"max_new_tokens can be at most {fits}" if fits > 0 else "shorten the prompt"
            raise RequestError(
                f"prompt of {prompt} tokens + max_new_tokens={new} is {prompt + new} tokens, but the model's "
                f"context is {self.context}; {advice}"
            )
        check_width(request, self.max_rows)
        needed = pages_needed(request, self.pages.size, self.share)
        beside = "" if request.source is None else f" and a source of {len(request.source)}"
        if needed > self.pages.count and (request.width > 1 or request.source is not None):
            raise RequestError(
                f"{request.width} rows (num_beams, guidance) of up to {prompt + new} tokens{beside} need "
                f"{needed} pages of {self.pages.size} tokens, but the cache has {self.pages.count}; ask for "
                f"fewer beams or tokens, or make an engine with num_pages={needed} or more"
            )
        if needed > self.pages.count:
            raise RequestError(
                f"prompt of {prompt} tokens + max_new_tokens={new} needs {needed} pages of "
                f"{self.pages.size} tokens, but the cache has {self.pages.count}; ask for at most "
                f"{self.pages.tokens + 1} tokens in all, or make an engine with "
                f"cache_tokens={prompt + new - 1} or more"
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
        self._vacate(request)
        request.branches = []
        request.finish_reason = reason
        request.status = Status.FINISHED  # last: it tells other threads that the rest is final

    # -- from step to step -------------------------------------------------------------------------------

    def schedule(self, drafts: Mapping[Row, Sequence[int]] = NO_DRAFTS) -> list[Work]:
        """The next batch, with pages for all its tokens; empty only where there is nothing to do. `drafts`
        of rows that decode go in as far as there is room for them without preemption."""
        plan: dict[Row, Work] = {}
        self._entered, self.begun, self.sources = [], [], []
        prefills = []
        for request in self.running.copy():
            if _decodes(request):
                self._decode(request, plan)
            else:
                prefills.append(request)
        left = max(self.chunk - len(plan), 1)
        for row, guess in drafts.items():
            if row in plan:
                fitting = self._fitting(row, guess, left - 1)
                plan[row] = plan[row]._replace(drafts=fitting)
                left -= len(fitting)
        for request in prefills:
            if left and request.status is Status.RUNNING:
                left = max(left - self._prefill(request, left, plan), 0)
        for row, start, count, *_ in plan.values():
            self._enter(row, start + count)
        while left and self._admissible(left):
            request = self.waiting.popleft()
            request.status = Status.RUNNING
            self.running.append(request)
            left = max(left - self._prefill(request, left, plan), 0)
        return list(plan.values())

    def ahead(self, under_way: list[Work]) -> list[Work] | None:
        """The decode step after one whose tokens are not known yet, for those of its rows that have not ended
        and do not end with it, with pages for it; None where there are none, or the next step may have to be
        another: a row is computed anew, a request that waits could begin, or there is no free page."""
        rows = [work.row for work in under_way if work.row.request.status is Status.RUNNING]
        if len(rows) != len(self.running) or self._admissible(self.chunk):
            return None
        if any(row.length == self.recompute_at for row in rows):
            return None
        rows = [row for row in rows if len(row.output) + 1 < row.request.params.max_new_tokens]
        missing = [self.pages.needed(r.length + 1) - len(r.pages) for r in rows]
        if sum(max(count, 0) for count in missing) > self.pages.free:
            return None
        for row, count in zip(rows, missing, strict=True):
            if count > 0:
                self.pages.extend(row.pages, count)
        return [Work(r, r.length, 1, True) for r in rows] or None

    def abandon(self) -> None:
        """The batch last scheduled has failed: no page that it was to fill may be shared, and rows that began
        in it, which may share such pages, begin again, as do those that read the pages of its sources."""
        self.pages.forget(self._entered)
        lost = {page for request in self.sources for page in request.source_pages}
        for request in self.running:
            if not lost.isdisjoint(request.source_pages):
                self._vacate(request)
        self.sources = []
        for row in self.begun:
            if row.request.status is Status.RUNNING:
                self._leave(row)

    def commit(self, work: Work, token: int | None = None) -> None:
        """The work has run: its keys are in the cache and, where it was ready, `token` comes next."""
        row = work.row
        row.computed = work.start + work.count
        if token is not None:
            if row.length == self.recompute_at:
                self._leave(row)
            row.output.append(token)

    def branch(self, request: Request, choice: Sequence[tuple[Row, int]]) -> None:
        """The rows of a request from now on: each goes on from one of those it has, with one more token, and
        shares the pages of the one it comes from."""
        before, after = request.rows, []
        again = before[0].length == self.recompute_at
        for row, token in choice:
            branch = Branch(request, row.prompt, [*row.output, token])
            if not again:
                branch.pages = self.pages.share(row.pages[: self.pages.needed(row.computed)])
                branch.computed, branch.indexed = row.computed, row.indexed
            after.append(branch)
        for row in before:
            self._leave(row)
        request.branches = after

    def spoil(self, request: Request) -> list[int]:
        """A request's keys aren't finite: nobody may share its pages. Gives those that it alone holds."""
        alone: list[int] = []
        for row in request.rows:
            self.pages.forget(row.pages)
            row.indexed = None
            alone += [page for page in row.pages if self.pages.holders(page) == 1]
        return alone + [page for page in request.source_pages if self.pages.holders(page) == 1]

    # -- the parts of a step -----------------------------------------------------------------------------

    def _decode(self, request: Request, plan: dict[Row, Work]) -> None:
        """All rows of a request get their one token, or none does, where the request itself gave way."""
        for row in request.rows:
            if not self._reserve(row, 1, plan):
                return
            plan[row] = Work(row, row.computed, 1, True)

    def _prefill(self, request: Request, left: int, plan: dict[Row, Work]) -> int:
        """The source of a request, if it is still to be encoded, and as many tokens of its rows as are then
        `left`, one row after the other, so that each begins with what those before it have computed. Gives
        how many tokens there are.

        The last tokens of several rows wait for one another: they are a decode step.
        """
        encoded = self._encode(request, left, plan)
        if encoded is None:
            return 0
        left = max(left - encoded, 1)
        if _decodes(request):
            self._decode(request, plan)
            return encoded + len(request.rows)
        hold, used, entered = len(request.rows) > 1, 0, len(self._entered)
        for row in request.rows:
            if not row.pages:
                self._begin(row)
            wanted = row.pending - hold
            count = min(wanted, left - used)
            if count > 0:
                if not self._reserve(row, count, plan):
                    self.pages.forget(self._entered[entered:])
                    break
                plan[row] = Work(row, row.computed, count, count == row.pending)
                self._enter(row, row.computed + count)
                used += count
            if count < wanted:
                break
        return encoded + used

    def _encode(self, request: Request, left: int, plan: dict[Row, Work]) -> int | None:
        """Pages for the source of a request, to be filled before the batch runs. Gives its tokens, 0 if there
        is nothing to encode, and None where that has to wait."""
        if not _lacks_source(request):
            return 0
        same = self._same_source(request)
        if same is not None:
            request.source_pages = self.pages.share(same.source_pages)
            return 0
        length = len(request.source)
        if (self.sources and length > left) or not self._free(self.pages.needed(length), request, plan):
            return None
        self.pages.extend(request.source_pages, self.pages.needed(length))
        self.sources.append(request)
        return length

    def _same_source(self, request: Request) -> Request | None:
        """A request whose source's pages this one can read too."""
        if not (self.share and request.shares):
            return None
        asked = request.scope, request.source
        held = (other for other in self.running if other.source_pages and other.shares)
        return next((other for other in held if (other.scope, other.source) == asked), None)

    def _begin(self, row: Row) -> None:
        """A row starts, with the pages that there are of it."""
        self.begun.append(row)
        row.pages = self.pages.share(self._known(row))
        row.indexed = len(row.pages)
        row.found = row.computed = row.indexed * self.pages.size

    def _leave(self, row: Row) -> None:
        """A row gives up its pages. What they are full of stays known; its length must still be the one that
        its keys were computed for."""
        self._enter(row, row.computed)
        self.pages.release(row.pages)
        row.computed = row.indexed = 0

    def _vacate(self, request: Request) -> None:
        for row in request.rows:
            self._leave(row)
        self.pages.release(request.source_pages)

    def _reserve(self, row: Row, count: int, plan: dict[Row, Work]) -> bool:
        """Pages of its own for a row's next `count` tokens, if need be those of the newest request; False if
        that is the row's own."""
        if row.request.status is not Status.RUNNING:  # preempted earlier in this step
            return False
        at = row.computed // self.pages.size
        shared = at < len(row.pages) and self.pages.holders(row.pages[at]) > 1
        need = self.pages.needed(row.computed + count) - len(row.pages)
        if not self._free(max(need, 0) + shared, row.request, plan):
            return False
        if shared:
            own, common = self.pages.exchange(row.pages, at)
            self.copies[own] = common
        if need > 0:
            self.pages.extend(row.pages, need)
        return True

    def _free(self, count: int, request: Request, plan: dict[Row, Work]) -> bool:
        """Have so many pages free for a request, if need be those of the newest; False if that is itself."""
        while count > self.pages.free:
            newest = self.running.pop()
            for row in newest.rows:
                plan.pop(row, None)
            if newest in self.sources:
                self.sources.remove(newest)
            self._vacate(newest)
            newest.status = Status.WAITING
            self.waiting.appendleft(newest)
            if newest is request:
                return False
        return True

    def _fitting(self, row: Row, guess: Sequence[int], left: int) -> tuple[int, ...]:
        """As much of a guess of the next tokens as may be checked: not past the row's end, nor past a length
        at which it is computed again, nor past what is free."""
        most = min(left, row.request.params.max_new_tokens - len(row.output) - 1)
        if self.recompute_at is not None and row.length <= self.recompute_at:
            most = min(most, self.recompute_at - row.length)
        room = (len(row.pages) + self.pages.free) * self.pages.size - row.length
        guess = tuple(guess[: max(min(most, room), 0)])
        need = self.pages.needed(row.length + len(guess)) - len(row.pages)
        if need > 0:
            self.pages.extend(row.pages, need)
        return guess

    def _admissible(self, left: int) -> bool:
        """Whether the first in the queue can start, with so many tokens `left` in this step: beside other
        rows only if all of it would fit now, and an eighth of what all may still generate. So no row is
        preempted before its first token, and few are at all: some always end before the others have grown."""
        if not self.waiting:
            return False
        if not self.running:
            return True
        request, needed = self.waiting[0], self.pages.needed
        encodes = _lacks_source(request) and self._same_source(request) is None
        if encodes and self.sources and len(request.source) > left:
            return False
        if sum(r.width for r in self.running) + request.width > self.max_rows:
            return False
        promised = 0
        for other in self.running:
            ahead = (other.params.max_new_tokens - len(other.output)) // 8
            for row in other.rows:
                promised += max(needed(row.length + ahead) - len(row.pages), 0)
            promised += needed(len(other.source)) if _lacks_source(other) else 0
        room = self.pages.free - promised
        ahead = 1 + (request.params.max_new_tokens - len(request.output)) // 8
        need = sum(needed(row.length + ahead) for row in request.rows)
        need += needed(len(request.source)) if encodes else 0
        if room >= need:
            return True
        known = self._known(request.rows[0])
        return room - self.pages.idle(known) >= need - len(known)

    # -- shared prefixes ---------------------------------------------------------------------------------

    def _scope(self, row: Row) -> Hashable:
        """What a row's prefixes are shared in: keys differ by the source, and on both sides of
        `recompute_at`."""
        beyond = self.recompute_at is not None and row.length > self.recompute_at
        return row.request.scope, row.request.source, beyond

    def _known(self, row: Row) -> list[int]:
        """Pages that hold the beginning of a row, but for its last token."""
        if not (self.share and row.request.shares):
            return []
        size = self.pages.size
        ends = range(size, row.length, size)
        return self.pages.prefixes.find(self._scope(row), (row.tokens(end - size, end) for end in ends))

    def _enter(self, row: Row, stop: int) -> None:
        """Let others share a row's pages that are full with the keys of its first `stop` tokens, until one of
        them stands in another page too."""
        if not (self.share and row.request.shares) or row.indexed is None:
            return
        size, pages = self.pages.size, row.pages
        for at in range(row.indexed, stop // size):
            block = row.tokens(at * size, (at + 1) * size)
            parent = pages[at - 1] if at else None
            if not self.pages.prefixes.add(self._scope(row), parent, block, pages[at]):
                row.indexed = None
                return
            self._entered.append(pages[at])
            row.indexed = at + 1


def _decodes(request: Request) -> bool:
    """Whether every row of a request lacks but its last token."""
    if _lacks_source(request):
        return False
    if not request.branches:
        return request.pending == 1
    return all(row.pending == 1 for row in request.branches)


def _lacks_source(request: Request) -> bool:
    """Whether a request has a source, and its keys are not cached."""
    return request.source is not None and not request.source_pages


def check_width(request: Request, max_rows: int) -> None:
    """Raise `RequestError` for a request of more rows than run at a time."""
    if request.width > max_rows:
        raise RequestError(
            f"the request has {request.width} rows (num_beams, guidance), but the engine runs at most "
            f"{max_rows}; ask for fewer, or make an engine with max_rows={request.width}"
        )


def pages_needed(request: Request, size: int, share: bool = True) -> int:
    """Most pages that a request can hold at a time; `share`: whether its rows hold those of the prompt
    together."""
    new = request.params.max_new_tokens - 1  # nothing attends to the last token
    rows = [-(-(len(row.prompt) + new) // size) for row in request.rows]
    source = 0 if request.source is None else -(-len(request.source) // size)
    if len(rows) == request.width:
        return source + sum(rows)
    common = len(request.prompt) // size if share and request.shares else 0
    return source + common + request.width * (rows[0] - common)
