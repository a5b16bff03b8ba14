"""Which implementation of an op runs: Triton's kernels where they can, otherwise the reference beside."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

# The one environment variable Taut reads: any value but "" and "0" makes every op its reference.
REFERENCE = "TAUT_REFERENCE"


@cache
def device_refuses(device: torch.device) -> str | None:
    """Why Triton kernels can't run on a device at all, or None."""
    if os.environ.get(REFERENCE, "0") not in ("", "0"):
        return f"{REFERENCE} is set"
    if device.type != "cuda":
        return f"runs on NVIDIA GPUs, not on {device.type}"
    if find_spec("triton") is None:
        return "Triton is not installed; it comes with PyTorch's CUDA builds"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0; this GPU has {capability[0]}.{capability[1]}"
    return None


def triton_refuses(x: Tensor) -> str | None:
    """Why Triton kernels can't take `x`, or None."""
    if (why := device_refuses(x.device)) is not None:
        return why
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"takes float16, bfloat16 and float32, not {str(x.dtype).removeprefix('torch.')}"
    return None


def ops(name: str, x: Tensor) -> ModuleType:
    """The module that computes the ops of `kernels.<name>` on tensors like `x`: `kernels.<name>_triton`
    where Triton runs, otherwise `kernels.<name>`, the references. Both have the same functions."""
    return _module(name if not x.is_cuda or triton_refuses(x) is not None else f"{name}_triton")


@cache
def _module(name: str) -> ModuleType:
    return import_module(f"taut.kernels.{name}")
