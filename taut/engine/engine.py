"""`Engine`: requests in, tokens out, many rows at a time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from taut.engine.admit import check_request
from taut.engine.beams import Beams
from taut.engine.choose import Asked, choose, logprobs
from taut.engine.drafts import Ledger, grouped
from taut.engine.graph import DecodeGraph, Pending, refuses
from taut.engine.pages import PagePool
from taut.engine.request import Request, Row
from taut.engine.runner import Runner, turns_by_length
from taut.engine.sampler import Sampler
from taut.engine.scheduler import Scheduler, Work
from taut.errors import NumericsError, RequestError, TautError

DEFAULT_CACHE_BYTES = 1 << 30


class Event(NamedTuple):
    """What a step did for a request: its new tokens, none where it only ended (see `finish_reason`)."""

    request: Request
    tokens: list[int]


class Engine:
    """Serves requests with one model by continuous batching; each row's tokens are those it gets alone.

    `max_rows` rows run at a time, `chunk` tokens are computed a step, and keys are cached in pages of
    `page_size` tokens: `num_pages` of them, or enough for `cache_tokens` tokens, or by default what all
    rows can use within 1 GiB. Rows that begin alike share the pages of their prefix (`prefix_caching`), also
    with rows that have ended, as long as there is room. `sampler(logits [n, vocab], requests)` gives the next
    tokens and the processed scores (or None).

    Methods may be called from any thread; only one step runs at a time. An error in a request's own hooks,
    options or numbers ends that request alone (`finish_reason` "error", `error`); any other is raised by
    `step`, which can then be called again.
    """

    def __init__(
        self,
        model,
        *,
        max_rows: int = 64,
        num_pages: int | None = None,
        cache_tokens: int | None = None,
        page_size: int = 16,
        chunk: int = 2048,
        prefix_caching: bool = True,
        sampler=None,
    ):
        config = model.config
        if num_pages is not None and cache_tokens is not None:
            raise RequestError(
                f"num_pages={num_pages} and cache_tokens={cache_tokens} both size the cache; give one of them"
            )
        if num_pages is None:
            if cache_tokens is None:
                affordable = DEFAULT_CACHE_BYTES // token_bytes(model)
                cache_tokens = max(min(max_rows * config.context, affordable), 1)
            num_pages = -(-cache_tokens // page_size) if page_size > 0 else 0
        self.model = model
        self.pages = PagePool(num_pages, page_size)
        self.scheduler = Scheduler(
            self.pages,
            max_rows=max_rows,
            chunk=chunk,
            context=config.context,
            recompute_at=config.rope_boundary,
            share=prefix_caching and not turns_by_length(config),
        )
        self.runner = Runner(model, page_size, num_pages)
        self.sampler = Sampler() if sampler is None else sampler
        graphable = refuses(model) is None
        # Decode steps as graphs, with one step under way while the host reads the one before.
        self.graphs = DecodeGraph(self.runner) if sampler is None and graphable else None
        self._under_way: Pending | None = None
        self.ledger = Ledger()
        self._timed: list[Request] = []  # those with a time limit
        self._submitted = 0
        self._lock = threading.RLock()
        self._stepper: int | None = None  # the thread that is inside a step

    @property
    def has_work(self) -> bool:
        """Whether any submitted request is not finished."""
        return self.scheduler.has_work

    @property
    def stepping(self) -> bool:
        """Whether the calling thread is inside a step, as a request's own hooks are."""
        return self._stepper == threading.get_ident()

    def check(self, request: Request) -> None:
        """Raise `RequestError` for a request that can't be served: empty or too long, or with a token id
        that the model doesn't know."""
        check_request(request, self.model.config)
        self.scheduler.check(request)

    def submit(self, request: Request) -> Request:
        """Queue a request and give it its number; raises `RequestError` if it can't be served."""
        with self._lock:
            self.check(request)
            self.scheduler.add(request)
            request.id, self._submitted = self._submitted, self._submitted + 1
            request.submitted = time.monotonic()
            if request.params.max_time is not None:
                self._timed.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request and free its pages; one that is finished stays as it is."""
        with self._lock:
            self._finish(request, "cancelled")

    def fail(self, request: Request, error: Exception) -> None:
        """End a request with an error, as if it had raised it itself."""
        with self._lock:
            if not request.finished:
                request.error = error
                self._finish(request, "error")

    def reset_prefix_cache(self) -> None:
        """Let no further request share what is cached now, as when the model's weights have changed."""
        with self._lock:
            self.pages.forget_all()

    def step(self) -> list[Event]:
        """Run one batch; what it did for each request that got a token or ended. [] without work."""
        with self._lock, torch.inference_mode():
            if self.stepping:
                raise RequestError(
                    "a request's hook steps the engine that called it; it may submit and cancel requests"
                )
            self._stepper = threading.get_ident()
            try:
                return self._step()
            finally:
                self._stepper = None

    def _step(self) -> list[Event]:
        started = time.perf_counter()
        if self._under_way is not None:
            return self._read(self._under_way, started)
        work = self.scheduler.schedule(self._drafts())
        chained, rest = self._apart(work)
        try:
            self.runner.copy(self.scheduler.copies)
            self.runner.encode(self.scheduler.sources)
            pending = self.graphs.start(chained) if chained else None
            logits = self.runner(rest, busy=pending is not None)
        except BaseException:
            self.scheduler.abandon()
            raise
        self.scheduler.copies.clear()
        self.scheduler.sources.clear()
        if not work:  # rows whose tokens are all cached may still have had their source encoded
            return []
        if pending is not None and not rest:
            return self._read(pending, started)
        for item in rest:
            if not item.ready:
                self.scheduler.commit(item)
        events = [] if pending is None else self._receive(pending)
        asked: list[Asked] = []
        at = 0
        for request, items in groupby((item for item in rest if item.ready), lambda item: item.row.request):
            group = list(items)
            count = sum(1 + len(item.drafts) for item in group)
            own, at = logits[at : at + count], at + count
            if isinstance(request.group, Beams):
                events += self._choose(request, group, own)
            else:
                asked.append(Asked(request, group, own))
        events += self._take(asked, logits)
        if all(item.ready and item.count == 1 for item in work):
            drafted, right = (sum(one.checked[at] for one in asked) for at in range(2))
            self.ledger.record(len(work), drafted, right, time.perf_counter() - started)
        return events + self._expired()

    def _apart(self, work: list[Work]) -> tuple[list[Work], list[Work]]:
        """The work that a decode graph does, and the rest, which runs after it on the device.

        Rows that decode beside a prefill keep their graph: it is launched at once, its attention is made for
        one query a row, and it runs while the host still prepares the prefill. What reads keys that the rest
        computes belongs to the rest: rows that only begin now, on pages that may be filled in this batch.
        Without a prefill one pass over the weights does all, so that it is one or the other.
        """
        if self.graphs is None:
            return [], work
        chained = self.graphs.takes(work)
        if len(chained) == len(work):
            return chained, []
        if all(w.count == 1 for w in work):
            return [], work
        rows = {w.row for w in chained}.difference(self.scheduler.begun)
        return [w for w in work if w.row in rows], [w for w in work if w.row not in rows]

    def _drafts(self) -> dict[Row, Sequence[int]]:
        """Guesses that are worth checking now."""
        asked, rows = grouped(self.scheduler.running), len(self.scheduler.running)
        if not asked or not self.ledger.affords(rows, 1):
            return {}
        drafts: dict[Row, Sequence[int]] = {}
        for drafter, requests in asked.items():
            drafts |= drafter.propose(requests)
        while drafts and not self.ledger.affords(rows, sum(map(len, drafts.values()))):
            drafts = {row: guess[: len(guess) // 2] for row, guess in drafts.items() if len(guess) > 1}
        return drafts

    def _choose(self, request: Request, work: list[Work], logits: Tensor) -> list[Event]:
        """Let beams go on, or end with what they found."""
        if request.finished:  # cancelled by another request's hook
            return []
        beams: Beams = request.group
        try:
            following = beams.choose(request, logits)
        except Exception as error:
            if not isinstance(error, TautError) and not request.logits_processors and not request.should_stop:
                raise
            self._fail(work[0], error)
            return [Event(request, [])]
        if request.finished:  # cancelled by a hook
            return []
        for item in work:
            self.scheduler.commit(item)
        if following is not None:
            self.scheduler.branch(request, following)
            return []
        self._finish(request, self._reason(request))
        return [Event(request, list(request.output))]

    def _take(self, asked: list[Asked], logits: Tensor | None) -> list[Event]:
        """Choose the next tokens of rows that are chosen for one by one, and take them in."""
        views = [view for one in asked for view in one.views()]
        if not views:
            return []
        if any(one.request.group for one in asked) or len(views) < logits.shape[0]:
            logits = torch.cat([one.logits() for one in asked])
        chosen = choose(self.sampler, logits, views)
        events, at = [], 0
        for one in asked:
            request, first = one.request, at
            at += len(one.views())
            if request.finished:  # cancelled by another request's hook
                continue
            if isinstance(chosen[first], Exception):
                self._fail(one.work[0], chosen[first])
                events.append(Event(request, []))
                continue
            events.append(Event(request, self._accept(one, chosen[first:at])))
        return events

    def _accept(self, one: Asked, chosen: list) -> list[int]:
        """Take in the tokens that were chosen after a row's last token and after each of its drafts, as long
        as the drafts were right and nothing ends the row; gives these tokens."""
        request, drafts, taken = one.request, one.work[0].drafts, []
        for index, choice in enumerate(chosen):
            if isinstance(choice, Exception):  # found again, and then reported, once it is next
                break
            token, scores = choice
            for item in one.work:
                self.scheduler.commit(item._replace(count=item.count + index), token)
            taken.append(token)
            if request.logprobs is not None:
                request.token_logprobs.append(logprobs(one.raw[index], token, request.logprobs))
            if request.keep_logits or request.keep_scores:
                with torch.inference_mode(False):  # what the caller keeps are ordinary tensors
                    if request.keep_logits:
                        request.logits.append(one.raw[index].clone())
                    if request.keep_scores and scores is not None:
                        request.scores.append(scores.clone())
            self._end(request, token)
            if request.finished or (index < len(drafts) and token != drafts[index]):
                break
        if drafts:
            one.checked = len(drafts), len(taken) - 1
            if not request.finished:
                request.drafter.learn(request, *one.checked)
        return taken

    def _read(self, pending: Pending, started: float) -> list[Event]:
        """Launch the step after `pending`, if it is sure to be for rows of that one alone, then take in the
        tokens of `pending`, for which the host waits meanwhile."""
        following = None if self._may_draft(pending.work) else self.scheduler.ahead(pending.work)
        self._under_way = None if following is None else self.graphs.follow(pending, following)
        events = self._receive(pending)
        self.ledger.record(len(pending.work), 0, 0, time.perf_counter() - started)
        events += self._expired()
        if self._under_way is not None and all(w.row.request.finished for w in self._under_way.work):
            self._under_way = None
        return events

    def _receive(self, pending: Pending) -> list[Event]:
        """Take in the tokens of a graph's step, waiting for them."""
        events = []
        for item, token in zip(pending.work, pending.tokens(), strict=True):
            request = item.row.request
            if request.finished:  # it ended while this step was under way: the token is not part of it
                continue
            if token < 0:
                self._fail(item, NumericsError())
                events.append(Event(request, []))
                continue
            self.scheduler.commit(item, token)
            self._end(request, token)
            events.append(Event(request, [token]))
        return events

    def _may_draft(self, work: list[Work]) -> bool:
        """Whether the step after this one may check guesses, which only its tokens can lead to."""
        drafters = [(w.row.request.drafter, w.row.request) for w in work if w.row.request.drafter is not None]
        return any(not drafter.rests(request) for drafter, request in drafters) and self.ledger.affords(
            len(work), 1
        )

    def run(self, requests: Iterable[Request]) -> list[Request]:
        """Serve requests to their end, submitting those that weren't; if interrupted, cancel them."""
        requests = list(requests)
        new = [request for request in requests if request.id < 0]
        for request in new:
            self.check(request)  # all, before any is queued
        try:
            for request in new:
                self.submit(request)
            for request in requests:
                while not request.finished:
                    self.step_for(request, len(request.output))
        finally:
            for request in requests:
                self.cancel(request)
        return requests

    def stream(self, request: Request) -> Iterator[int]:
        """Token ids of a request as they come; it is submitted, if it wasn't, when the first is asked for.

        Closing the iterator cancels the request and frees its pages. Other requests move along with it.
        Raises the request's error where it ends with one.
        """
        if request.id < 0:
            self.check(request)
        return self._stream(request)

    def _stream(self, request: Request) -> Iterator[int]:
        seen = 0
        try:
            if request.id < 0:
                self.submit(request)
            while True:
                finished = request.finished  # before looking for tokens: another thread may add the last one
                while seen < len(request.output):
                    seen += 1
                    yield request.output[seen - 1]
                if finished:
                    break
                self.step_for(request, seen)
        finally:
            self.cancel(request)
        if request.error is not None:
            raise request.error

    async def astream(self, request: Request) -> AsyncIterator[int]:
        """`stream` for asyncio: steps run in a thread, so the event loop stays free."""
        loop = asyncio.get_running_loop()
        seen = 0
        try:
            if request.id < 0:
                await loop.run_in_executor(None, self.submit, request)
            while True:
                finished = request.finished
                while seen < len(request.output):
                    seen += 1
                    yield request.output[seen - 1]
                if finished:
                    break
                await loop.run_in_executor(None, self.step_for, request, seen)
        finally:
            # In a thread as well: a step that is under way holds the lock.
            await loop.run_in_executor(None, self.cancel, request)
        if request.error is not None:
            raise request.error

    def step_for(self, request: Request, seen: int) -> None:
        """Step, unless the request has finished or has more than `seen` tokens: another thread's step may
        have brought it further."""
        with self._lock:
            if len(request.output) == seen and not request.finished:
                if not self.has_work:
                    raise RequestError(f"request {request.id} is not one of this engine's")
                self.step()

    def _end(self, request: Request, token: int) -> None:
        """Finish a request for which `token` was the last."""
        params = request.params
        try:
            stopped = request.should_stop is not None and request.should_stop(request)
        except Exception as error:
            request.error = error
            self._finish(request, "error")
            return
        if stopped or token in params.eos_token_ids or len(request.output) >= params.max_new_tokens:
            self._finish(request, self._reason(request, stopped))
        elif request.constraint is not None and request.constraint.complete(request.output):
            self._finish(request, "stop")

    @staticmethod
    def _reason(request: Request, stopped: bool = False) -> str:
        """Why a request that is at its end ends."""
        if request.output and request.output[-1] in request.params.eos_token_ids:
            return "stop"
        whole = len(request.output) >= request.params.max_new_tokens
        return "length" if whole and not stopped else "stop_string"

    def _finish(self, request: Request, reason: str) -> None:
        if isinstance(request.group, Beams) and not request.finished:
            request.group.close(request)
        if request.drafter is not None and not request.finished:
            request.drafter.forget(request)
        self.scheduler.finish(request, reason)

    def _expired(self) -> list[Event]:
        """Finish the requests, waiting ones included, whose time is up."""
        if not self._timed:
            return []
        now = time.monotonic()
        self._timed = [request for request in self._timed if not request.finished]
        expired = [r for r in self._timed if now - r.submitted >= r.params.max_time]
        for request in expired:
            self._finish(request, "time")
        return [
            Event(request, list(request.output) if isinstance(request.group, Beams) else [])
            for request in expired
        ]

    def _fail(self, item: Work, error: Exception) -> None:
        """End a request that can't be sampled from; for numbers that aren't finite, say where they began."""
        request = item.row.request
        if isinstance(error, NumericsError):
            locate = getattr(self.model, "locate_nonfinite", None)
            where = f", first in {locate(self.runner.batch([item]))}" if locate is not None else ""
            error = NumericsError(
                f"request {request.id}: the logits after {item.row.length} tokens are not finite{where}; "
                "check the weights, or load with dtype='bfloat16' or 'float32' if it was 'float16'"
            )
            self.runner.scrub(self.scheduler.spoil(request))
        request.error = error
        self._finish(request, "error")


def token_bytes(model) -> int:
    """Bytes of cache that one token takes, over all layers."""
    attentions = [layer.attn for layer in model.config.layers]
    return sum(2 * attn.kv_heads * attn.head_dim for attn in attentions) * model.dtype.itemsize
