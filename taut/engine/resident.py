"""`Resident`: the engine and the draft cache that stay with their model from call to call."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from taut.engine.draft_model import DraftModel
from taut.engine.engine import Engine, token_bytes
from taut.engine.request import Request
from taut.engine.runner import turns_by_length
from taut.engine.scheduler import check_width, pages_needed
from taut.errors import RequestError
from taut.layers.linear import Linear

# Rows that run at a time at most: each needs a row of logits.
MAX_ROWS = 256
PAGE_SIZE = 16

# Part of the memory that the cache may take; the rest is for activations and logits.
CACHE_SHARE = 0.8


class Resident:
    """Holds an engine for a model, and a `DraftModel` where it guesses for another: made by the first call,
    grown by a call that needs more pages, made anew where the model is not what it was, and given up by
    `free`. Calls of several threads share them.

    They do not keep the model alive, and a copy of the model starts without them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._drafts: DraftModel | None = None
        self._state: State | None = None

    @staticmethod
    def of(model: Any) -> Resident:
        """The model's own."""
        return model.__dict__.setdefault("_resident", Resident())

    def engine(self, model: Any, requests: Sequence[Request]) -> Engine:
        """An engine that can serve these requests, with as many pages for them as memory has room.

        Raises `RequestError` where there is not even room for the longest, or a request has too many rows.
        """
        for request in requests:
            check_width(request, MAX_ROWS)
        with self._lock:
            self._look(model)
            if self._engine is not None and self._engine.stepping:
                # A hook calls from inside a step, which can't wait for another step of the same engine.
                return _make(weakref.proxy(model), _pages(model, requests, None))
            kept = self._engine
            count = _pages(model, requests, kept)
            if kept is None or count > kept.pages.count:
                if kept is not None and not kept.has_work:
                    kept = self._engine = None  # gone before the next is made: there may be no room for both
                self._engine = _make(weakref.proxy(model), count)
            return self._engine

    def draft_model(self, model: Any, requests: Sequence[Request]) -> DraftModel:
        """What guesses with the model for these requests, which another one serves."""
        with self._lock:
            self._look(model)
            count = _pages(model, requests, self._drafts)
            if self._drafts is None or count > self._drafts.pages.count:
                if self._drafts is not None and not self._drafts.has_work:
                    self._drafts = None
                self._drafts = DraftModel(weakref.proxy(model), num_pages=count, page_size=PAGE_SIZE)
            return self._drafts

    def free(self) -> None:
        """Let go of all: memory is free once the requests of other threads are done with it."""
        with self._lock:
            self._engine = self._drafts = self._state = None

    def _look(self, model: Any) -> None:
        """Drop what a model that has changed makes wrong."""
        before, self._state = self._state, State(model)
        if before is not None and before.program != self._state.program:
            self._engine = self._drafts = None
        if self._engine is not None and before.values != self._state.values:
            self._engine.reset_prefix_cache()

    def __deepcopy__(self, memo: Any) -> Resident:
        return Resident()

    def __reduce__(self) -> Any:
        return Resident, ()


class State:
    """What a model is now, to compare with what it was when an engine was made for it.

    `program`: its modules, their hooks, and where its tensors lie: what a CUDA graph has in it. `values`: the
    versions of the tensors' values, which cached keys depend on. Values that are written through `.data` get
    no new version: after that, `Resident.free`.
    """

    def __init__(self, model: Any):
        self.program: list[Any] = []
        self.values: list[Any] = []
        for module in model.modules() if isinstance(model, nn.Module) else ():
            only = module.__dict__.get("only")  # attention restricted to some kernels
            hooks = (*module._forward_hooks, None, *module._forward_pre_hooks)
            self.program.append((weakref.ref(module), hooks, only))
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    # While a storage is held weakly, no other gets the same identity.
                    place = StorageWeakRef(tensor.untyped_storage())
                    self.program.append((id(tensor), tensor.dtype, tensor.device, place))
                    self.values.append(None if tensor.is_inference() else tensor._version)


def _make(model: Any, pages: int) -> Engine:
    return Engine(model, max_rows=MAX_ROWS, num_pages=pages, page_size=PAGE_SIZE)


def _pages(model: Any, requests: Sequence[Request], kept: Engine | DraftModel | None) -> int:
    """Pages that a cache for these requests should have, where it may take the place of `kept`: those of
    `kept` if they suffice, else all that the requests need, or what memory holds."""
    share = not turns_by_length(model.config)
    needs = [pages_needed(request, PAGE_SIZE, share) for request in requests]
    at_once = max(MAX_ROWS // max(request.width for request in requests), 1)
    wanted = sum(sorted(needs)[-at_once:])
    if kept is not None and kept.pages.count >= (max(needs) if kept.has_work else wanted):
        return kept.pages.count
    wanted = _rounded(wanted)
    device = torch.device(model.device)
    page = token_bytes(model) * PAGE_SIZE
    room = int((_memory(device) - _unpacking(model, device)) * CACHE_SHARE) // page
    if device.type == "cuda" and kept is not None and not kept.has_work:
        room += kept.pages.count
    if room < max(needs):
        row = needs.index(max(needs))
        raise RequestError(
            f"row {row} needs a cache of {max(needs) * PAGE_SIZE} tokens "
            f"({max(needs) * page / 2**20:.0f} MiB; prompt {len(requests[row].prompt)}, new "
            f"{requests[row].params.max_new_tokens}, rows {requests[row].width}), but {device} has room "
            f"for {room * PAGE_SIZE} ({room * page / 2**20:.0f} MiB). Next step: lower max_new_tokens, "
            "shorten the prompt, ask for fewer beams, or load the model in fewer bits"
        )
    if kept is not None and max(needs) <= kept.pages.count and room < 1.25 * kept.pages.count:
        return kept.pages.count  # memory is full: hardly more room is not worth a new engine
    return min(wanted, room)


def _memory(device: torch.device) -> int:
    """Bytes that can be had there. A CPU's cache takes memory only where it is written, so that all there is
    counts, also what is in use now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if not hasattr(os, "sysconf"):
        return sys.maxsize
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _unpacking(model: Any, device: torch.device) -> int:
    """Bytes on a GPU that products of many rows unpack weights into: as the largest needs, of the pool of the
    allocator, of that of the graphs of short forwards, and of that of decode graphs."""
    if device.type != "cuda" or not isinstance(model, nn.Module):
        return 0
    packed = (m.packed for m in model.modules() if isinstance(m, Linear) and m.packed is not None)
    return 3 * max((p.out_features * p.in_features for p in packed), default=0) * model.dtype.itemsize


def _rounded(pages: int) -> int:
    """`pages` or up to a quarter more, so that calls that need a little more each find room."""
    step = 1 << max(pages.bit_length() - 3, 0)
    return -(-pages // step) * step
