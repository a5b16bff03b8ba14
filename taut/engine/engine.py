"""`Engine`: requests in, tokens out, many rows at a time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from taut.engine.graph import DecodeGraph, Pending, refuses
from taut.engine.pages import PagePool
from taut.engine.request import Request
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
        if request.id >= 0:
            raise RequestError(f"request {request.id} was submitted before; make a new one to run it again")
        self.scheduler.check(request)
        vocab = self.model.config.vocab_size
        for name, ids in (
            ("prompt", request.prompt),
            ("logit_bias", request.params.logit_bias),
            *(("sequence_bias", ids) for ids in request.params.sequence_bias),
            *(("bad_words", ids) for ids in request.params.bad_words),
            ("eos_token_ids", request.params.eos_token_ids if request.params.min_new_tokens else ()),
        ):
            if ids and not (min(ids) >= 0 and max(ids) < vocab):
                at, bad = next((at, token) for at, token in enumerate(ids) if not 0 <= token < vocab)
                raise RequestError(
                    f"{name} has token id {bad} at index {at}, but the model's ids are 0 to {vocab - 1}; "
                    "was it made by another model's tokenizer?"
                )

    def submit(self, request: Request) -> Request:
        """Queue a request and give it its number; raises `RequestError` if it can't be served."""
        with self._lock:
            self.check(request)
            self.scheduler.add(request)
            request.id, self._submitted = self._submitted, self._submitted + 1
            request.submitted = time.monotonic()
        return request

    def cancel(self, request: Request) -> None:
        """End a request and free its pages; one that is finished stays as it is."""
        with self._lock:
            self.scheduler.finish(request, "cancelled")

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
        if self._under_way is not None:
            return self._read(self._under_way)
        work = self.scheduler.schedule()
        if not work:
            return []
        graph = self.graphs is not None and self.graphs.accepts(work)
        try:
            begun = self.graphs.start(work) if graph else self.runner(work)
        except BaseException:
            self.scheduler.abandon()
            raise
        if graph:
            return self._read(begun)
        logits = begun
        ready = [item for item in work if item.ready]
        chosen = [] if logits is None else self._sample(logits, ready)
        for item in work:
            if not item.ready:
                self.scheduler.commit(item)
        events = []
        for row, (item, choice) in enumerate(zip(ready, chosen, strict=True)):
            request = item.request
            if request.finished:  # cancelled by another request's hook
                continue
            if isinstance(choice, Exception):
                self._fail(item, choice)
                events.append(Event(request, []))
                continue
            token, scores = choice
            self.scheduler.commit(item, token)
            if request.keep_logits or request.keep_scores:
                with torch.inference_mode(False):  # what the caller keeps are ordinary tensors
                    if request.keep_logits:
                        request.logits.append(logits[row].clone())
                    if request.keep_scores and scores is not None:
                        request.scores.append(scores.clone())
            self._end(request, token)
            events.append(Event(request, [token]))
        events += [Event(request, []) for request in self._expired()]
        return events

    def _read(self, pending: Pending) -> list[Event]:
        """Launch the step after `pending`, if it is sure to be for the same rows, then take in the tokens of
        `pending`, for which the host waits meanwhile."""
        following = self.scheduler.ahead(pending.work)
        self._under_way = None if following is None else self.graphs.follow(pending, following)
        events = []
        for item, token in zip(pending.work, pending.tokens(), strict=True):
            request = item.request
            if request.finished:  # it ended while this step was under way: the token is not part of it
                continue
            if token < 0:
                self._fail(item, NumericsError())
                events.append(Event(request, []))
                continue
            self.scheduler.commit(item, token)
            self._end(request, token)
            events.append(Event(request, [token]))
        events += [Event(request, []) for request in self._expired()]
        if self._under_way is not None and all(item.request.finished for item in self._under_way.work):
            self._under_way = None
        return events

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

    def _sample(self, logits: Tensor, work: list[Work]) -> list[tuple[int, Tensor | None] | Exception]:
        """For each row of `logits` `[n, vocab]`, its next token and scores, or why there is none.

        Rows with processors of their own go alone, so that one that raises fails alone; the others go
        together, and one by one only if there is something wrong with any of them.
        """
        requests = [item.request for item in work]
        chosen: list = [None] * len(work)
        plain = [row for row, request in enumerate(requests) if not request.logits_processors]
        if len(plain) > 1:
            some = logits if len(plain) == len(work) else logits[plain]
            try:
                tokens, scores = self.sampler(some, [requests[row] for row in plain])
            except TautError:
                pass
            else:
                for at, row in enumerate(plain):
                    chosen[row] = tokens[at], None if scores is None else scores[at]
        for row, request in enumerate(requests):
            if chosen[row] is None:
                try:
                    (token,), scores = self.sampler(logits[row : row + 1], [request])
                    chosen[row] = token, None if scores is None else scores[0]
                except Exception as error:
                    if not request.logits_processors and not isinstance(error, TautError):
                        raise
                    chosen[row] = error
        return chosen

    def _end(self, request: Request, token: int) -> None:
        """Finish a request for which `token` was the last."""
        params = request.params
        try:
            stopped = request.should_stop is not None and request.should_stop(request)
        except Exception as error:
            request.error = error
            self.scheduler.finish(request, "error")
            return
        if token in params.eos_token_ids:
            self.scheduler.finish(request, "stop")
        elif stopped:
            self.scheduler.finish(request, "stop_string")
        elif len(request.output) >= params.max_new_tokens:
            self.scheduler.finish(request, "length")

    def _expired(self) -> list[Request]:
        """Finish the requests, waiting ones included, whose time is up."""
        now = time.monotonic()
        expired = [
            request
            for request in self.scheduler.requests
            if request.params.max_time is not None and now - request.submitted >= request.params.max_time
        ]
        for request in expired:
            self.scheduler.finish(request, "time")
        return expired

    def _fail(self, item: Work, error: Exception) -> None:
        """End a request that can't be sampled from; for numbers that aren't finite, say where they began."""
        request = item.request
        if isinstance(error, NumericsError):
            locate = getattr(self.model, "locate_nonfinite", None)
            where = f", first in {locate(self.runner.batch([item]))}" if locate is not None else ""
            error = NumericsError(
                f"request {request.id}: the logits after {request.length} tokens are not finite{where}; "
                "check the weights, or load with dtype='bfloat16' or 'float32' if it was 'float16'"
            )
            self.runner.scrub(self.scheduler.spoil(request))
        request.error = error
        self.scheduler.finish(request, "error")


def token_bytes(model) -> int:
    """Bytes of cache that one token takes, over all layers."""
    attentions = [layer.attn for layer in model.config.layers]
    return sum(2 * attn.kv_heads * attn.head_dim for attn in attentions) * model.dtype.itemsize
