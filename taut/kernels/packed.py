"""What the kernels of packed weights take beside the codes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scales:
    """Scales of 4-bit blocks: float32 `[blocks]`; or, doubly quantized, uint8 `[blocks]` into `table`
    float32 `[256]`, times `nested` plus `offset`, float32 `[blocks / 256]` each. Of 8-bit rows: float32
    `[outputs]`, the largest magnitudes."""

    absmax: Tensor
    table: Tensor | None = None
    nested: Tensor | None = None
    offset: Tensor | None = None
