"""What launches need to know of a device."""

from __future__ import annotations

from functools import cache

import torch


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
