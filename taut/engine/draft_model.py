"""`DraftModel`: guesses by a smaller model, which has a cache of its own."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from taut.engine.choose import choose
from taut.engine.graph import DecodeGraph, refuses
from taut.engine.pages import PagePool
from taut.engine.request import Ahead, Request, Row
from taut.engine.runner import Runner
from taut.engine.sampler import Sampler
from taut.engine.scheduler import Work

CHUNK = 2048  # tokens of rows it has not seen yet, computed at a time


class DraftModel:
    """A model that guesses how rows of another one go on, by those rows' own options and random numbers.

    A row gets guesses of 5 tokens at first, 2 more after a guess that was right to its end and 1 less after
    any other. A row that the cache has no room for gets none. The source of an encoder-decoder's row is read
    once by the draft model too. Methods may be called from any thread.
    """

    def __init__(self, model: Any, *, num_pages: int, page_size: int = 16):
        self.pages = PagePool(num_pages, page_size)
        self.runner = Runner(model, page_size, num_pages)
        self.graphs = DecodeGraph(self.runner) if refuses(model) is None else None
        self.sampler = Sampler()
        self._context, self._boundary = model.config.context, model.config.rope_boundary
        self._encoder = model.config.encoder
        self._rows: dict[Request, _Draft] = {}
        self._lock = threading.Lock()

    @property
    def has_work(self) -> bool:
        """Whether it guesses for any request that has not finished."""
        return bool(self._rows)

    def propose(self, requests: Sequence[Request], most: int) -> Mapping[Row, Sequence[int]]:
        """At most `most` next tokens of each request that there is room for."""
        with self._lock, torch.inference_mode():
            drafts = [self._rows.setdefault(request, _Draft(request)) for request in requests]
            drafts = [draft for draft in drafts if self._begin(draft, most)]
            if drafts:
                self._encode(drafts)
                self._catch_up(drafts)
                if not self._chain(drafts):
                    self._draw(drafts)
            return {draft.request: draft.guess for draft in drafts if draft.guess}

    def learn(self, request: Request, offered: int, right: int) -> None:
        """So many of the guesses offered for a request were right."""
        draft = self._rows[request]
        draft.size = draft.size + 2 if right == offered else max(draft.size - 1, 1)

    def forget(self, request: Request) -> None:
        """The request has finished: its pages are free."""
        with self._lock:
            draft = self._rows.pop(request, None)
            if draft is not None:
                self.pages.release(draft.pages)
                self.pages.release(draft.source_pages)

    def _begin(self, draft: _Draft, most: int) -> bool:
        """Make a row ready for its next guess; False where there can be none."""
        request, length = draft.request, draft.request.length
        # Keys of guesses that were right stay; after them comes a token that was not guessed.
        draft.guess, draft.computed = [], min(draft.computed, length - 1)
        most = min(draft.size, most, request.params.max_new_tokens - len(request.output) - 1)
        most = min(most, self._context - length)
        if self._boundary is not None:  # past it, all keys turn by other angles
            if length <= self._boundary:
                most = min(most, self._boundary - length)
            elif not draft.long:
                draft.long, draft.computed = True, 0
        draft.count = most
        return most > 0 and self._reserve_source(draft) and self._reserve(draft, most)

    def _reserve(self, draft: _Draft, count: int) -> bool:
        """Pages for the keys of so many guesses, but for the last."""
        need = self.pages.needed(draft.request.length + count - 1) - len(draft.pages)
        if need > self.pages.free:
            return False
        if need > 0:
            self.pages.extend(draft.pages, need)
        return True

    def _reserve_source(self, draft: _Draft) -> bool:
        """Pages for the keys of what the draft model's encoder reads."""
        if draft.source is None or draft.source_pages:
            return True
        need = self.pages.needed(len(draft.source))
        if need > self.pages.free or len(draft.source) > self._encoder.context:
            return False
        self.pages.extend(draft.source_pages, need)
        return True

    def _encode(self, drafts: list[_Draft]) -> None:
        """Read the sources that were not read yet, as many at a time as make a chunk."""
        unread = [draft for draft in drafts if draft.source is not None and not draft.read]
        while unread:
            some, left = [], CHUNK
            while unread and (not some or len(unread[0].source) <= left):
                left -= len(unread[0].source)
                some.append(unread.pop(0))
            self.runner.encode(some)
            for draft in some:
                draft.read = True

    def _catch_up(self, drafts: list[_Draft]) -> None:
        """Compute what rows have got since, but for their last tokens."""
        while behind := [draft for draft in drafts if draft.pending > 1]:
            work, left = [], CHUNK
            for draft in behind:
                count = min(draft.pending - 1, left)
                if count > 0:
                    work.append(Work(draft, draft.computed, count, False))
                    left -= count
            self.runner(work)
            for item in work:
                item.row.computed += item.count

    def _draw(self, drafts: list[_Draft]) -> None:
        """Guess token by token."""
        while drafts:
            logits = self.runner([Work(draft, draft.computed, 1, True) for draft in drafts])
            for draft, token in zip(drafts, self._sample(logits, drafts), strict=True):
                draft.take(token)
            drafts = [draft for draft in drafts if draft.open]

    def _chain(self, drafts: list[_Draft]) -> bool:
        """Guess by steps that follow one another on the device, if they can."""
        steps = max(draft.count for draft in drafts)
        work = [Work(draft, draft.computed, 1, True) for draft in drafts]
        if self.graphs is None or len(self.graphs.takes(work)) < len(work):
            return False
        if any(d.request.length + steps > self._context or not self._reserve(d, steps) for d in drafts):
            return False
        pending = self.graphs.start(work)
        for step in range(1, steps + 1):
            ahead = [item._replace(start=item.start + step) for item in work]
            following = self.graphs.follow(pending, ahead) if step < steps else None
            for draft, token in zip(drafts, pending.tokens(), strict=True):
                if draft.open:
                    draft.take(token if token >= 0 else None)
            if following is None:
                break
            pending = following
        return True

    def _sample(self, logits: Tensor, drafts: list[_Draft]) -> list[int | None]:
        """The rows' next tokens; None where there is none. What is wrong with a row's options or processors
        is found again when its guess is checked."""
        views = [Ahead(draft.request, draft.guess) for draft in drafts]
        chosen = choose(self.sampler, logits, views)
        return [None if isinstance(choice, Exception) else choice[0] for choice in chosen]


@dataclass(eq=False)
class _Draft(Row):
    """A request as the draft model sees it: its tokens, and behind them what is guessed."""

    request: Request
    guess: list[int] = field(default_factory=list)
    count: int = 0  # tokens that are to be guessed
    size: int = 5
    long: bool = False
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    source_pages: list[int] = field(default_factory=list)
    read: bool = False  # the source, whose keys then lie in these pages

    @property
    def source(self) -> tuple[int, ...] | Tensor | None:
        own = self.request.draft_source
        return self.request.source if own is None else own

    @property
    def prompt(self) -> list[int]:
        return self.request.prompt

    @property
    def output(self) -> list[int]:
        return self.request.output + self.guess

    @property
    def length(self) -> int:
        return self.request.length + len(self.guess)

    @property
    def pending(self) -> int:
        return self.length - self.computed

    @property
    def open(self) -> bool:
        """Whether there is more to guess."""
        return len(self.guess) < self.count

    def token(self, index: int) -> int:
        known = self.request.length
        return self.request.token(index) if index < known else self.guess[index - known]

    def take(self, token: int | None) -> None:
        """The next guess; nothing is guessed behind an end."""
        self.computed += 1
        if token is None:
            self.count = len(self.guess)
            return
        self.guess.append(token)
        if token in self.request.params.eos_token_ids:
            self.count = len(self.guess)


@dataclass(frozen=True)
class Assistant:
    """The guesses of one call: at most `most` tokens at a time."""

    drafts: DraftModel
    model: Any  # which `drafts` doesn't keep alive
    most: int

    def propose(self, requests: Sequence[Request]) -> Mapping[Row, Sequence[int]]:
        return self.drafts.propose(requests, self.most)

    def learn(self, request: Request, offered: int, right: int) -> None:
        self.drafts.learn(request, offered, right)

    def rests(self, request: Request) -> bool:
        return False

    def forget(self, request: Request) -> None:
        self.drafts.forget(request)
