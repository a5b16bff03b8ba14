"""Which implementation of an op runs: Triton's kernels on a GPU and LLVM's on a CPU where they can, otherwise
the reference beside."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from taut.kernels.threads import missing_threads

# The one environment variable Taut reads: any value but "" and "0" makes every op its reference.
REFERENCE = "TAUT_REFERENCE"


@cache
def device_refuses(device: torch.device) -> str | None:
    """Why Triton kernels can't run on a device at all, or None."""
    if (why := _forced()) is not None:
        return why
    if device.type != "cuda":
        return f"runs on NVIDIA GPUs, not on {device.type}"
    if find_spec("triton") is None:
        return "Triton is not installed; it comes with PyTorch's CUDA builds"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"needs compute capability 8.0; this GPU has {capability[0]}.{capability[1]}"
    return None


def _forced() -> str | None:
    return f"{REFERENCE} is set" if os.environ.get(REFERENCE, "0") not in ("", "0") else None


def triton_refuses(x: Tensor) -> str | None:
    """Why Triton kernels can't take `x`, or None."""
    return device_refuses(x.device) or _dtype_refuses(x)


@cache
def _cpu_refuses() -> str | None:
    return _forced() or missing_threads()


def compiled_refuses(x: Tensor) -> str | None:
    """Why kernels that are compiled for the CPU can't take `x`, or None. They have no gradients."""
    if x.device.type != "cpu":
        return f"runs on CPUs, not on {x.device.type}"
    return _cpu_refuses() or _dtype_refuses(x)


def _dtype_refuses(x: Tensor) -> str | None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"takes float16, bfloat16 and float32, not {str(x.dtype).removeprefix('torch.')}"
    return None


# The ops that have kernels for the CPU: they are for inference alone.
_COMPILED = ("norm", "rope")


def ops(name: str, x: Tensor) -> ModuleType:
    """The module that computes the ops of `kernels.<name>` on tensors like `x`: `kernels.<name>_triton`
    where Triton runs, `kernels.<name>_llvm` where there are kernels for the CPU, otherwise `kernels.<name>`,
    the references. All have the same functions."""
    if x.is_cuda:
        return _module(name if triton_refuses(x) is not None else f"{name}_triton")
    if name in _COMPILED and not torch.is_grad_enabled() and compiled_refuses(x) is None:
        return _module(f"{name}_llvm")
    return _module(name)


@cache
def _module(name: str) -> ModuleType:
    return import_module(f"taut.kernels.{name}")
