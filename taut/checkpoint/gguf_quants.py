"""Block formats of GGUF tensors, and their dequantization to float32 in plain vectorised torch.

The layouts are llama.cpp's (ggml-common.h, ggml-quants.c); every result is bit-equal to its reference
code, which multiplies and adds in float32 in the order used here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockFormat:
    """How one GGUF tensor type is stored.

    `block` values take `size` bytes. `dtype` is what a read gives. `decode(blocks, out)` fills `out`
    float32 `[n, block]` from `blocks` uint8 `[n, size]`; None: the bytes are the values.
    """

    name: str
    block: int
    size: int
    dtype: torch.dtype
    decode: Callable[[Tensor, Tensor], None] | None = None


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of every block, as float32 `[n, 1]`."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def _shifts(bits: int, device: torch.device) -> Tensor:
    """`[8 / bits, 1]`: the shifts that bring each field of a byte down."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device).unsqueeze(1)


def _planes(packed: Tensor, bits: int, span: int) -> Tensor:
    """`[n, bytes]` to `[n, bytes * 8 / bits]`: each run of `span` bytes holds 8 / bits planes of `span`
    values, the first plane in the lowest bits."""
    runs = packed.reshape(packed.shape[0], -1, 1, span)
    return ((runs >> _shifts(bits, packed.device)) & (2**bits - 1)).flatten(1)


def _bits32(packed: Tensor) -> Tensor:
    """`[n, 4]` to `[n, 32]`: the bits of a little-endian 32-bit word, lowest first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(2) >> shifts) & 1).flatten(1)


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 2:], out)
    out.sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 4:], out)
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _nibbles(packed: Tensor, out: Tensor) -> None:
    """16 bytes a block: the low nibbles are the first 16 values, the high ones the last 16."""
    out[:, :16].copy_(packed & 15)
    out[:, 16:].copy_(packed >> 4)


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_planes(blocks[:, 6:], 4, 16) | (_bits32(blocks[:, 2:6]) << 4))
    out.sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_planes(blocks[:, 8:], 4, 16) | (_bits32(blocks[:, 4:8]) << 4))
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8))
    out.mul_(_half(blocks, 0))


# The "K" formats: super-blocks of 256 values in groups of 16 or 32, each group with a small integer scale
# (and minimum) that one or two float16 of the super-block multiply.


def _q2_k(blocks: Tensor, out: Tensor) -> None:
    scales = blocks[:, :16]
    d = _half(blocks, 80) * (scales & 15).float()  # [n, 16]
    low = _half(blocks, 82) * (scales >> 4).float()
    _affine(out, _planes(blocks[:, 16:80], 2, 32), d, low)


def _q3_k(blocks: Tensor, out: Tensor) -> None:
    packed = blocks[:, 96:108]  # sixteen 6-bit scales: four low bits in 8 bytes, two high bits in 4
    scales = _planes(packed[:, :8], 4, 8) | (_planes(packed[:, 8:], 2, 4) << 4)
    d = _half(blocks, 108) * scales.float().sub_(32)
    # The third bit is stored inverted: where it is 0, four is subtracted.
    high = _planes(blocks[:, :32], 1, 32) ^ 1
    values = _planes(blocks[:, 32:96], 2, 32).to(torch.int8) - (high << 2).to(torch.int8)
    _affine(out, values, d, None)


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    d, low = _scales_and_minima(blocks)
    _affine(out, _planes(blocks[:, 16:], 4, 32), d, low)


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    d, low = _scales_and_minima(blocks)
    high = _planes(blocks[:, 16:48], 1, 32)
    _affine(out, _planes(blocks[:, 48:], 4, 32) | (high << 4), d, low)


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    d = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8).float()
    values = _planes(blocks[:, :128], 4, 64) | (_planes(blocks[:, 128:192], 2, 32) << 4)
    _affine(out, values.to(torch.int8) - 32, d, None)


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Eight 6-bit scales and eight 6-bit minima from bytes 4..16, times the two float16: `[n, 8]` each.

    The first four of each are the low six bits of a byte; the last four take their low bits from a shared
    byte and their high bits from the two bits left over in the first four's bytes.
    """
    scale, minimum, shared = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([scale & 63, (shared & 15) | ((scale >> 2) & 48)], dim=1)
    minima = torch.cat([minimum & 63, (shared >> 4) | ((minimum >> 2) & 48)], dim=1)
    return _half(blocks, 0) * scales.float(), _half(blocks, 2) * minima.float()


def _affine(out: Tensor, values: Tensor, scales: Tensor, minima: Tensor | None) -> None:
    """`out = scales * values - minima`, with `[n, groups]` scales and minima, each for an equal run."""
    groups = out.view(out.shape[0], scales.shape[1], -1)
    groups.copy_(values.view_as(groups))
    groups.mul_(scales.unsqueeze(2))
    if minima is not None:
        groups.sub_(minima.unsqueeze(2))


# By the type numbers of the GGUF format.
FORMATS = {
    0: BlockFormat("F32", 1, 4, torch.float32),
    1: BlockFormat("F16", 1, 2, torch.float16),
    2: BlockFormat("Q4_0", 32, 18, torch.float32, _q4_0),
    3: BlockFormat("Q4_1", 32, 20, torch.float32, _q4_1),
    6: BlockFormat("Q5_0", 32, 22, torch.float32, _q5_0),
    7: BlockFormat("Q5_1", 32, 24, torch.float32, _q5_1),
    8: BlockFormat("Q8_0", 32, 34, torch.float32, _q8_0),
    10: BlockFormat("Q2_K", 256, 84, torch.float32, _q2_k),
    11: BlockFormat("Q3_K", 256, 110, torch.float32, _q3_k),
    12: BlockFormat("Q4_K", 256, 144, torch.float32, _q4_k),
    13: BlockFormat("Q5_K", 256, 176, torch.float32, _q5_k),
    14: BlockFormat("Q6_K", 256, 210, torch.float32, _q6_k),
    30: BlockFormat("BF16", 1, 2, torch.bfloat16),
}

# Types of the format that Taut does not read yet, so that an error can call them by name.
OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S",
    22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip
