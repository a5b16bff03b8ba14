"""Many fields of integers in one buffer, so that one copy sends them all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Fields begin at 16 bytes: Triton compiles a kernel again for a pointer that it finds aligned otherwise.
_BOUNDARY = 4


def room(sizes: Sequence[int]) -> int:
    """32-bit integers that a buffer for fields of so many needs."""
    return sum(map(_up, sizes))


def fields(buffer: Tensor, sizes: Sequence[int], wide: int) -> list[Tensor]:
    """The fields of a buffer, views of `sizes` 32-bit integers each; the first `wide` hold 64-bit ones."""
    found, at = [], 0
    for size in sizes:
        field = buffer[at : at + size]
        found.append(field.view(torch.int64) if len(found) < wide else field)
        at += _up(size)
    return found


def _up(size: int) -> int:
    return -(-size // _BOUNDARY) * _BOUNDARY
