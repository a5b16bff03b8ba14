"""Where a model goes and in what dtype it computes there."""

from __future__ import annotations

from typing import Any

import torch

from taut.checkpoint import Checkpoint
from taut.config import DTYPES, ModelConfig
from taut.errors import RequestError, nearest

DEVICE = str | int | torch.device  # what names one


def pick_device(where: Any) -> torch.device:
    """The one device that `where` names: "auto" (the first GPU, otherwise the CPU), a device or its name,
    `{"": device}`, or None for the CPU. `RequestError` for one that is not there."""
    if isinstance(where, dict):
        if set(where) != {""}:
            raise RequestError(
                f"device_map is {where!r}; a dict must be {{'': device}}: one device holds it all"
            )
        where = where[""]
    if where in ("auto", "balanced", "sequential"):
        where = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(where, int) and not isinstance(where, bool):
        where = f"cuda:{where}"
    try:
        device = torch.device("cpu" if where is None else where)
    except (RuntimeError, TypeError):
        raise RequestError(f"device is {where!r}; known: auto, cpu, cuda, cuda:0 ...") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            build = "" if torch.version.cuda else f" ({torch.__version__} is built without CUDA)"
            raise RequestError(
                f"device is {str(device)!r}, but this PyTorch sees no CUDA GPU{build}; use device='cpu', or "
                "device_map='auto', which takes a GPU where there is one"
            )
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise RequestError(
                f"device is {str(device)!r}; there are {torch.cuda.device_count()} GPUs, from 0"
            )
    elif device.type not in ("cpu", "meta"):
        raise RequestError(f"device is {str(device)!r}; known: auto, cpu, cuda")
    return device


def pick_dtype(wanted: Any, config: ModelConfig, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The dtype to compute in: the one wanted, or for "auto" the checkpoint's own; what is dequantized has
    none and gets bfloat16 where the device computes in it, otherwise float32."""
    if isinstance(wanted, str) and wanted != "auto":
        name = wanted.removeprefix("torch.")
        if name not in DTYPES:
            raise RequestError(
                f"dtype is {wanted!r}; known: auto, {', '.join(DTYPES)}{nearest(name, DTYPES)}"
            )
        return DTYPES[name]
    if isinstance(wanted, torch.dtype):
        if wanted not in DTYPES.values():
            raise RequestError(f"dtype is {wanted}; known: auto, {', '.join(DTYPES)}")
        return wanted
    if config.dtype is not None:
        return config.dtype
    found = [t.dtype for t in checkpoint.tensors.values() if t.dtype in DTYPES.values()]
    if checkpoint.metadata and torch.float32 in found:  # dequantized blocks come as float32
        return torch.bfloat16 if _computes_bfloat16(device) else torch.float32
    return found[0] if found else torch.float32


def _computes_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    flags = torch.backends.cpu.get_cpu_capability()
    return flags.startswith(("AVX512", "SVE")) and torch.ops.mkldnn._is_mkldnn_bf16_supported()
