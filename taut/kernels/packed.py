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


@dataclass(frozen=True)
class Codes:
    """Matrices one below the other: 4-bit `codes` uint8 `[outputs * inputs / 2]` into 16 `values`, the first
    of a pair in the high half, with a scale for each `block` of them; or, without `values`, int8 `[outputs,
    inputs]`, each row times its scale / 127."""

    codes: Tensor
    scales: Scales
    values: tuple[float, ...] | None = None
    block: int = 64
