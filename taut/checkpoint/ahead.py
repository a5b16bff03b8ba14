"""`ReadAhead`: threads that read the bytes of a load before they are asked for, into buffers from which a GPU
copies on its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from taut.checkpoint.base import Span, read_into

THREADS = 8
CHUNK = 8 << 20  # bytes of a buffer
BUFFERS = 16  # more than threads: some are read into while others are copied from


class Target(Protocol):
    """A device that copies while the host goes on."""

    def buffer(self, size: int) -> Tensor:
        """Host memory that the device copies from, uint8 `[size]`."""
        ...

    def empty(self, size: int) -> Tensor:
        """Memory of the device, uint8 `[size]`."""
        ...

    def copy(self, to: Tensor, buffer: Tensor) -> Callable[[], None]:
        """Begin to copy; what is returned waits until `buffer` has been read."""
        ...


class Cuda:
    """A GPU, whose copies are in the order of its current stream: what is computed of them needs no waiting,
    and memory that they free is taken again by what follows."""

    def __init__(self, device: torch.device):
        torch.cuda.init()  # here, and not in several threads at once
        self.device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device

    def buffer(self, size: int) -> Tensor:
        # A thread's own GPU is the first, which would give memory to a context.
        with torch.cuda.device(self.device):
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def copy(self, to: Tensor, buffer: Tensor) -> Callable[[], None]:
        to.copy_(buffer, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)  # a thread that waits leaves its core to others
        copied.record(torch.cuda.current_stream(self.device))

        def wait() -> None:
            with torch.cuda.device(self.device):
                copied.synchronize()

        return wait


def target_of(device: torch.device) -> Target | None:
    """The device as one that `ReadAhead` serves; None for a CPU, which has what is read at once."""
    return Cuda(device) if device.type == "cuda" else None


class ReadAhead:
    """Reads spans of files in the order in which `read` will be asked for them.

    A few buffers go round: a thread fills one, the device copies it out, and it is given to the next chunk,
    whose thread waits for that copy first. A read that fails raises where its span is asked for, as if it had
    been read there. `close` ends the threads, whatever has been read.
    """

    def __init__(self, spans: Sequence[Span], target: Target):
        self._target = target
        self._chunks = (chunk for span in spans for chunk in _chunks(span))
        self._size = min(CHUNK, max((span.count for span in spans), default=0))
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="taut-read")
        self._coming: deque[tuple[Span, Future[Tensor]]] = deque()
        for _ in range(BUFFERS):
            self._begin(None, None)

    def close(self) -> None:
        """End the threads, and wait until they have."""
        self._pool.shutdown(cancel_futures=True)

    def read(self, span: Span) -> Tensor:
        """The bytes of the next span, uint8 `[count]` on the device, where they are when all that was begun
        there before is done."""
        out = self._target.empty(span.count)
        for chunk in _chunks(span):
            planned, filled = self._coming.popleft()
            if planned != chunk:
                raise RuntimeError(f"{chunk} is asked for, but {planned} was to be next")
            buffer = filled.result()
            at = chunk.offset - span.offset
            copied = self._target.copy(out[at : at + chunk.count], buffer[: chunk.count])
            self._begin(buffer, copied)
        return out

    def _begin(self, buffer: Tensor | None, copied: Callable[[], None] | None) -> None:
        """Have the next chunk read, if there is one, into a new buffer or into `buffer` once it is free."""

        def fill(chunk: Span) -> Tensor:
            own = self._target.buffer(self._size) if buffer is None else buffer
            if copied is not None:
                copied()
            read_into(own[: chunk.count], chunk.path, chunk.offset)
            return own

        if (chunk := next(self._chunks, None)) is not None:
            self._coming.append((chunk, self._pool.submit(fill, chunk)))


def _chunks(span: Span) -> Iterator[Span]:
    for at in range(0, span.count, CHUNK):
        yield Span(span.path, span.offset + at, min(CHUNK, span.count - at))
