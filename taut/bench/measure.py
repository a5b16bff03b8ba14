"""Clocks, peak memory, and one case measured on several subjects in turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from taut.bench.cases import KINDS, UNCOUNTED, Case, Inputs
from taut.errors import TautError


class DoesNotFit(TautError):
    """The device has no room for a case."""


class Subject(Protocol):
    """Taut, or a peer. `weights_bytes`: what its weights take."""

    name: str
    weights_bytes: int

    def forward(self, inputs: Inputs) -> Any: ...

    def generate(self, inputs: Inputs, new_tokens: int) -> Any: ...

    def decode(self, inputs: Inputs, new_tokens: int, uncounted: int) -> float:
        """Seconds from token `uncounted` of every row to token `new_tokens` of every row."""


@dataclass
class Point:
    """One figure: a case on a subject.

    `samples` are in the kind's unit, and `median`, `low` and `high` theirs. `peak_bytes`: weights, cache and
    activations at their peak, or None where the device does not tell. `failed`: why there are no samples.
    """

    subject: str
    what: str
    batch: int
    length: int
    new_tokens: int
    real_tokens: int
    unit: str
    samples: list[float] = field(default_factory=list)
    median: float | None = None
    low: float | None = None
    high: float | None = None
    peak_bytes: int | None = None
    failed: str | None = None
    out_of_memory: bool = False

    def close(self) -> None:
        """Fill in what follows from the samples."""
        if self.samples:
            self.median = statistics.median(self.samples)
            self.low, self.high = min(self.samples), max(self.samples)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds that `call` takes, from an idle device to an idle device."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def peak(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes at the peak of `call` above those held before: allocated by torch on a CUDA device, otherwise
    resident in this process. None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
        before = _resident("VmRSS")
    except OSError:
        call()
        return None
    call()
    return max(0, _resident("VmHWM") - before)


def _resident(key: str) -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(key))
    return int(line.split()[1]) * 1024


def _call(subject: Subject, case: Case, inputs: Inputs) -> Callable[[], Any]:
    if case.what == "decode":
        return lambda: subject.decode(inputs, case.new_tokens, UNCOUNTED)
    if case.what == "generate":
        return lambda: subject.generate(inputs, case.new_tokens)
    return lambda: subject.forward(inputs)


def _sample(case: Case, call: Callable[[], Any], device: torch.device) -> float:
    """One figure in the kind's unit."""
    if case.what == "decode":
        return case.batch * (case.new_tokens - UNCOUNTED) / call()
    return seconds(call, device) * 1e3


@contextmanager
def frozen() -> Iterator[None]:
    """Inside the block, collecting garbage passes over everything that is there now: modules of libraries and
    models, which take a second each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def release(device: torch.device) -> None:
    """Give back memory that nothing uses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@torch.inference_mode()
def measure(
    case: Case, subjects: Sequence[Subject], *, unit: str, vocab: int, device: torch.device, repeats: int
) -> list[Point]:
    """The case on each subject. Each runs twice uncounted, the second time under watch of its memory; then
    all run in turns, `repeats` times, so that a device that slows down slows all of them.

    Where they can't all keep their memory, each runs uncounted before every counted run. A subject that runs
    out of memory, or fails in any other way, says so in its point, and the others go on.
    """
    release(device)
    inputs = Inputs.of(case, vocab, device)
    points = [
        Point(s.name, case.what, case.batch, case.length, case.new_tokens, sum(case.rows), unit)
        for s in subjects
    ]
    running = list(zip(subjects, points, strict=True))

    def attempt(step: Callable[[Subject, Point], None]) -> None:
        for subject, point in list(running):
            try:
                step(subject, point)
            except Exception as error:
                point.out_of_memory = _is_memory(error)
                point.failed = _reason(error)
                point.samples.clear()
                running.remove((subject, point))
            if point.failed is not None:  # out here the traceback, and the tensors it held, are gone
                release(device)

    def warm(subject: Subject, point: Point) -> None:
        _call(subject, case, inputs)()
        above = peak(_call(subject, case, inputs), device)
        if above is not None:
            point.peak_bytes = subject.weights_bytes + above

    def count(subject: Subject, point: Point) -> None:
        if crowded:  # the allocator would take back what another holds, and wait for it, under the clock
            release(device)
            _call(subject, case, inputs)()
        if KINDS[case.what].generates:
            gc.collect()  # caches of the run before
        point.samples.append(_sample(case, _call(subject, case, inputs), device))

    attempt(warm)
    crowded = _crowded(running, device)
    if case.what == "memory":
        for _, point in running:
            if point.peak_bytes is None:
                point.failed = "this system does not tell the peak memory of a process"
            else:
                point.samples.append(point.peak_bytes / 1e9)
    else:
        for _ in range(repeats):
            attempt(count)
    for point in points:
        point.close()
    return points


def _crowded(running: Sequence[tuple[Subject, Point]], device: torch.device) -> bool:
    """Whether a GPU has no room for what each subject took at its peak, all of it kept for its next run."""
    if device.type != "cuda":
        return False
    kept = sum(point.peak_bytes - subject.weights_bytes for subject, point in running)
    return torch.cuda.memory_allocated(device) + kept > 0.8 * torch.cuda.mem_get_info(device)[1]


def _is_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError, DoesNotFit)) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error)
    )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
