"""MXFP4: 4-bit values in blocks of 32 that share a power of two (OCP Microscaling Formats 1.0), as GPT-OSS's
checkpoints hold their experts. Read, and never kept packed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from taut.checkpoint import LazyTensor
from taut.checkpoint.base import rows
from taut.errors import CheckpointError

BLOCK = 32
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127  # of the exponents


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """The values, bfloat16 `[..., 32 * groups]`, of codes uint8 `[..., groups, 16]`, the first of a pair in
    the low half, and exponents uint8 `[..., groups]`. Exact."""
    values = torch.tensor([*_VALUES, *(-v for v in _VALUES)], device=blocks.device)
    byte = torch.arange(256, device=blocks.device)
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), 1)  # both values of every byte
    found = pairs.index_select(0, blocks.flatten().int()).view(*blocks.shape, 2)
    return torch.ldexp(found, scales.int()[..., None, None] - _BIAS).flatten(-3).bfloat16()


@dataclass(frozen=True)
class Mxfp4Experts:
    """The matrices of all experts, `[experts, inputs, outputs]`, under the name that they have where they are
    not in blocks; read from `blocks` and `scales` of the same entries."""

    name: str
    blocks: LazyTensor  # uint8 [experts, outputs, groups, 16]
    scales: LazyTensor  # uint8 [experts, outputs, groups]
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self) -> tuple[int, ...]:
        experts, outputs, groups, _ = self.blocks.shape
        return experts, groups * BLOCK, outputs

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        start, stop = rows(self, start, stop)
        return self.values(self.blocks.read(start, stop), self.scales.read(start, stop))

    def values(self, blocks: Tensor, scales: Tensor) -> Tensor:
        """What was read of both, as matrices, where it is."""
        return dequantize(blocks, scales).mT


def open_mxfp4(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """A checkpoint's tensors with each pair of blocks and scales as one `Mxfp4Experts`.

    Raises `CheckpointError` where one of a pair is missing or they don't fit together.
    """
    out = dict(tensors)
    names = [n.removesuffix(end) for end in ("_blocks", "_scales") for n in tensors if n.endswith(end)]
    for name in dict.fromkeys(names):
        blocks, scales = out.pop(f"{name}_blocks", None), out.pop(f"{name}_scales", None)
        if blocks is None or scales is None:
            there, lacking = ("blocks", "scales") if scales is None else ("scales", "blocks")
            raise CheckpointError(
                f"{name}_{lacking} is missing beside {name}_{there}; the checkpoint is incomplete: download "
                "it again"
            )
        if len(blocks.shape) != 4 or blocks.shape[3] != BLOCK // 2 or scales.shape != blocks.shape[:3]:
            raise CheckpointError(
                f"{name}: blocks {list(blocks.shape)} and scales {list(scales.shape)} are not MXFP4's: "
                f"[experts, outputs, groups, {BLOCK // 2}] and [experts, outputs, groups]"
            )
        if {blocks.dtype, scales.dtype} != {torch.uint8}:
            raise CheckpointError(f"{name}: blocks are {blocks.dtype}, scales {scales.dtype}; expected uint8")
        out[name] = Mxfp4Experts(name, blocks, scales)
    return out
