"""Group-wise 4 and 8 bit with a scale and a minimum: GGUF's Q4_0, Q4_1 and Q8_0 kept packed.

A value is `code * scale + minimum` of its group of 32 neighbours in a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taut.errors import CheckpointError
from taut.kernels.gemv_llvm import Format
from taut.kernels.packed_llvm import Bytes, Nibbles
from taut.quant.base import Packed

GROUP = 32
FORMATS = ("Q4_0", "Q4_1", "Q8_0")  # of GGUF, that `from_blocks` keeps

_CODES = tuple(map(float, range(16)))


class Affine(Packed):
    """Codes with a scale, and in 4 bit a minimum, for each group of 32 inputs.

    | buffer | shape | |
    |---|---|---|
    | `codes` | uint8 `[out, in / 2]`, or int8 `[out, in]` | the first of a pair in the low half |
    | `scale` | float16 `[out, in / 32]` | |
    | `minimum` | float16 or float32, as `scale` | 4 bit alone; 8-bit codes have a sign instead |
    """

    dense_on_disk = True

    def __init__(self, codes: Tensor, scale: Tensor, minimum: Tensor | None):
        bits = 8 if minimum is None else 4
        buffers = {"codes": codes, "scale": scale}
        if minimum is not None:
            buffers["minimum"] = minimum
        super().__init__(codes.shape[0], scale.shape[1] * GROUP, buffers)
        self.kind = f"affine{bits}"
        self.bits = bits

    @classmethod
    def from_blocks(cls, name: str, kind: str, blocks: Tensor) -> Affine:
        """From GGUF blocks of the format `kind`, uint8 `[out, in / 32, bytes of a block]`."""
        if kind not in FORMATS:
            raise CheckpointError(f"{name}: {kind} can't be kept packed; known: {', '.join(FORMATS)}")
        out = blocks.shape[0]
        scale = blocks[:, :, :2].contiguous().view(torch.float16).view(out, -1)
        if kind == "Q8_0":
            return cls(blocks[:, :, 2:].contiguous().view(torch.int8).view(out, -1), scale, None)
        at = 2 if kind == "Q4_0" else 4
        # Low halves are a block's first 16 values, high ones its last 16; here neighbours share a byte.
        nibbles = blocks[:, :, at:]
        values = torch.cat((nibbles & 15, nibbles >> 4), -1).view(out, -1)
        codes = values[:, ::2] | (values[:, 1::2] << 4)
        if kind == "Q4_1":
            minimum = blocks[:, :, 2:4].contiguous().view(torch.float16).view(out, -1)
        else:
            minimum = scale * -8
        return cls(codes, scale, minimum)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        values = self.unpacked(dtype)
        return self.dequantize_rows(dtype, None) if values is None else values

    def dequantize_rows(self, dtype: torch.dtype, rows: Tensor | None) -> Tensor:
        """Rows by index (int64 `[n]`), or all: `[n, in_features]`. Exact in float32."""
        codes, scale = (t if rows is None else t[rows] for t in (self.codes, self.scale))
        if self.bits == 8:
            return (codes.view(*scale.shape, GROUP) * scale.float()[..., None]).flatten(1).to(dtype)
        minimum = self.minimum if rows is None else self.minimum[rows]
        values = torch.stack((codes & 15, codes >> 4), -1).view(*scale.shape, GROUP).float()
        return values.mul_(scale.float()[..., None]).add_(minimum.float()[..., None]).flatten(1).to(dtype)

    def rows_at(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        values = self.unpacked(dtype, index)
        return self.dequantize_rows(dtype, index) if values is None else values

    def joins(self, other: Packed) -> bool:
        if not isinstance(other, Affine) or other.bits != self.bits:
            return False
        return self.bits == 8 or other.minimum.dtype is self.minimum.dtype

    def lanes(self) -> tuple[Format, tuple[Tensor | None, ...]]:
        if self.bits == 8:
            return Bytes(self.scale.dtype, GROUP), (self.codes, self.scale)
        weight = Nibbles(_CODES, GROUP, False, self.scale.dtype, self.minimum.dtype)
        return weight, (self.codes, self.scale, self.minimum, None, None, None)
