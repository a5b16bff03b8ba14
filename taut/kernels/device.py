"""What launches need of a device: its size, early starts, and memory for their programs to meet in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 132 (an H100's) elsewhere, so that the interpreter runs
    the grids that a GPU would."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def dependent_launch(device: torch.device) -> bool:
    """Whether kernels may start before the one ahead of them has ended (programmatic dependent launch):
    from compute capability 9.0 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(device: torch.device) -> dict[str, bool]:
    """Keywords of a kernel that calls `griddepcontrol` under its constexpr `PDL`.

    Every program of such a kernel waits for the kernel ahead of it before it touches what that one writes,
    and in any case before it ends; only then does it let the next one start. So whatever runs before the
    wait sees all writes but those of the kernel just ahead; weights, slots, lengths, page tables and angles
    are read there, and a kernel that writes these must not let the next one start early.
    """
    return {"PDL": True, "launch_pdl": True} if dependent_launch(device) else {"PDL": False}


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may take."""
    if device.type != "cuda":
        return 232448
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@dataclass(frozen=True)
class Workspace:
    """Memory that the programs of a launch meet in: `parts` float32 for partial results, `counters` int32
    that every launch finds and leaves at zero. One serves all launches of a stream, one after the other."""

    parts: Tensor
    counters: Tensor

    @staticmethod
    def of(device: torch.device, floats: int = 1 << 22, counters: int = 1 << 14) -> Workspace:
        return Workspace(
            torch.empty(floats, dtype=torch.float32, device=device),
            torch.zeros(counters, dtype=torch.int32, device=device),
        )

    def fits(self, device: torch.device, floats: int, counters: int) -> bool:
        return (
            self.parts.device == device and self.parts.numel() >= floats and self.counters.numel() >= counters
        )


_given: ContextVar[Workspace | None] = ContextVar("taut_workspace", default=None)


@contextmanager
def using(workspace: Workspace) -> Iterator[None]:
    """Let launches inside the block meet in `workspace`: for the capture of a CUDA graph, which then needs no
    memory of its own, as long as no other graph that was captured with it runs at the same time."""
    token = _given.set(workspace)
    try:
        yield
    finally:
        _given.reset(token)


@cache
def _held(device: torch.device, stream: int) -> dict[str, Workspace]:
    """The workspace of a stream, which grows with the launches that ask for it."""
    return {}


def workspace(device: torch.device, floats: int, counters: int) -> Workspace:
    """A workspace of at least this size: the one given with `using`, else the current stream's own; while a
    graph is captured, one that the graph clears each time."""
    given = _given.get()
    if given is not None and given.fits(device, floats, counters):
        return given
    cuda = device.type == "cuda"
    if cuda and torch.cuda.is_current_stream_capturing():
        return Workspace.of(device, floats, counters)
    held = _held(device, torch.cuda.current_stream(device).cuda_stream if cuda else 0)
    if "own" not in held or not held["own"].fits(device, floats, counters):
        held["own"] = Workspace.of(device, max(floats, 1 << 20), max(counters, 1 << 12))
    return held["own"]
