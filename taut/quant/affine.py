"""Group-wise 4 and 8 bit with a scale and a minimum: GGUF's Q4_0, Q4_1 and Q8_0 kept packed.

A value is `code * scale + minimum` of its group of 32 neighbours in a row.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from taut.errors import CheckpointError
from taut.quant.base import Packed

GROUP = 32
FORMATS = ("Q4_0", "Q4_1", "Q8_0")  # of GGUF, that `from_blocks` keeps

# PyTorch's 4-bit CPU product: outputs come in tiles of 64, and from this many rows on a dense product of
# the unpacked weight is faster.
_TILE = 64
_FEW_ROWS = 24


class Affine(Packed):
    """Codes with a scale, and in 4 bit a minimum, for each group of 32 inputs.

    | buffer | shape | |
    |---|---|---|
    | `codes` | uint8 `[out, in / 2]`, or int8 `[out, in]` | the first of a pair in the low half |
    | `scale` | float16 `[out, in / 32]` | |
    | `minimum` | float16 or float32, as `scale` | 4 bit alone; 8-bit codes have a sign instead |
    | `paired` | bfloat16 `[in / 32, out, 2]` | only while `prepare`d: both, as the CPU's product reads them |
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
        self.tiled = False

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
        return self.dequantize_rows(dtype, None)

    def dequantize_rows(self, dtype: torch.dtype, rows: Tensor | None) -> Tensor:
        """Rows by index (int64 `[n]`), or all: `[n, in_features]`. Exact in float32."""
        scale = self.scale if rows is None else self.scale[rows]
        if self.bits == 8:
            codes = self.codes if rows is None else self.codes[rows]
            return (codes.view(*scale.shape, GROUP) * scale.float()[..., None]).flatten(1).to(dtype)
        minimum = self.minimum if rows is None else self.minimum[rows]
        codes = self._nibbles() if rows is None else self._nibbles()[rows]
        values = codes.view(*scale.shape, GROUP).float()
        return values.mul_(scale.float()[..., None]).add_(minimum.float()[..., None]).flatten(1).to(dtype)

    def _nibbles(self) -> Tensor:
        """The 4-bit codes, uint8 `[out, in]`."""
        if self.tiled:
            return _untile(self.codes, self.out_features, self.in_features)
        return torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(1)

    def joins(self, other: Packed) -> bool:
        if not isinstance(other, Affine) or other.bits != self.bits:
            return False
        return self.bits == 8 or other.minimum.dtype is self.minimum.dtype

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.tiled and x.dtype is torch.bfloat16 and 0 < x.shape[0] < _FEW_ROWS:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), self.codes, GROUP, self.paired)
            return y if bias is None else y + bias
        return F.linear(x, self.dequantize(x.dtype), bias)

    def runs_on(self, x: Tensor) -> str:
        if x.dtype is torch.bfloat16 and 0 < x.shape[0] < _FEW_ROWS and why_not_tiled(self) is None:
            return f"{self.kind}: PyTorch's 4-bit product"
        return super().runs_on(x)

    def prepare(self) -> None:
        """On a CPU that PyTorch has a 4-bit product for: codes into its tiles, in place of the others."""
        if self.tiled or why_not_tiled(self) is not None:
            return
        self.codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(self._nibbles().int(), 1)
        scale, minimum = self.scale.float(), self.minimum.float()
        paired = torch.stack((scale, minimum + 8 * scale), -1)  # the product counts codes from -8
        self.register_buffer("paired", paired.bfloat16().transpose(0, 1).contiguous(), persistent=False)
        self.tiled = True

    def restore(self) -> None:
        if self.tiled:
            nibbles = self._nibbles()
            self.codes = nibbles[:, ::2] | (nibbles[:, 1::2] << 4)
            del self.paired
            self.tiled = False


def why_not_tiled(packed: Affine) -> str | None:
    """Why PyTorch's 4-bit CPU product can't take this matrix, or None."""
    if packed.codes.device.type != "cpu":
        return f"the product is for the CPU; the weight is on {packed.codes.device}"
    if packed.bits != 4:
        return "the product is for 4-bit codes"
    if packed.out_features % 16:
        return f"the product wants outputs divisible by 16; there are {packed.out_features}"
    if not _tiles_known():
        return "on this CPU PyTorch packs 4-bit weights in tiles of another kind"
    return None


def _untile(tiled: Tensor, out: int, inputs: int) -> Tensor:
    """The codes uint8 `[out, in]` in PyTorch's tiles: 64 outputs at a time, for each input 32 bytes, byte j
    with output j low and output j + 32 high; the outputs that are left over in pairs of neighbours."""
    flat, whole = tiled.reshape(-1), out // _TILE * _TILE
    body = flat[: whole * inputs // 2].view(-1, inputs, _TILE // 2)
    parts = [torch.stack((body & 15, body >> 4), 1).permute(0, 1, 3, 2).reshape(whole, inputs)]
    if whole < out:
        rest = flat[whole * inputs // 2 :].view(inputs, (out - whole) // 2)
        parts.append(torch.stack((rest & 15, rest >> 4), -1).flatten(1).T)
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@cache
def _tiles_known() -> bool:
    """Whether PyTorch's tiles are those that `_untile` undoes: they depend on the CPU's vector width."""
    probe = torch.randint(0, 16, (2 * _TILE + 16, GROUP), dtype=torch.int32, generator=torch.Generator())
    try:
        tiled = torch.ops.aten._convert_weight_to_int4pack_for_cpu(probe, 1)
    except (RuntimeError, AttributeError):
        return False
    return torch.equal(_untile(tiled, *probe.shape), probe.to(torch.uint8))
