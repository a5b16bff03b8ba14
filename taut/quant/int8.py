"""LLM.int8(): 8-bit weights and activations by row, with outlier columns in 16 bit (Dettmers et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from taut.errors import CheckpointError
from taut.kernels.dispatch import device_refuses
from taut.kernels.gemv_llvm import Format
from taut.kernels.packed import Codes, Scales
from taut.kernels.packed_llvm import Bytes
from taut.quant.base import Packed

NAMES = ("SCB", "weight_format")
_ROW_FORMAT = 0  # bitsandbytes' "row"; its others are layouts of older GPUs that newer versions don't write

_CHUNK = 1 << 24  # values quantized at a time, which bounds the temporaries


def quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """int8 `[rows, n]` and each row's largest magnitude, float32 `[rows]`: `values = q * largest / 127`."""
    values = values.float()
    largest = values.abs().amax(1)
    steps = torch.where(largest > 0, 127.0 / largest, 0.0)
    return (values * steps[:, None]).round_().to(torch.int8), largest


class Int8(Packed):
    """Weights as int8 rows and a float32 scale a row.

    A product of many rows quantizes each token's activations by its largest magnitude too, after taking
    out every column in which one of them reaches `threshold` (0: none); those columns are multiplied in the
    activations' own dtype and added. A single row is multiplied as it is by the int8 weights, which reads the
    same bytes and is at least as exact. So are several where there is a kernel for few rows: up to 64 on a
    GPU, up to 16 on a CPU.

    | buffer | shape |
    |---|---|
    | `values` | int8 `[out_features, in_features]` |
    | `scale` | float32 `[out_features]`, the largest magnitude of each row |
    """

    kind = "int8"

    def __init__(self, values: Tensor, scale: Tensor, threshold: float):
        super().__init__(values.shape[0], values.shape[1], {"values": values, "scale": scale})
        self.threshold = threshold

    @classmethod
    def pack(cls, weight: Tensor, threshold: float) -> Int8:
        """Quantize `weight` `[out, in]`, through float16 as bitsandbytes does, where it is."""
        some = weight.detach().split(max(1, _CHUNK // weight.shape[1]))
        values, scales = zip(*(quantize_rows(rows.half()) for rows in some), strict=True)
        return cls(torch.cat(values), torch.cat(scales), threshold)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        if device_refuses(self.values.device) is None:
            from taut.kernels.packed_triton import unpack8

            return unpack8(self.values, self.scale, dtype)
        if (values := self.unpacked(dtype)) is not None:
            return values
        # 1 / 127 in float32 first, as bitsandbytes has it.
        return (self.values.float() * (self.scale * (1 / 127))[:, None]).to(dtype)

    def joins(self, other: Packed) -> bool:
        return isinstance(other, Int8) and (other.threshold, other.compute) == (self.threshold, self.compute)

    def stored(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {
            "weight": self.values,
            "SCB": self.scale,
            "weight_format": torch.tensor(_ROW_FORMAT, dtype=torch.uint8),
        }

    def fused(
        self, x: Tensor, bias: Tensor | None, act: str | None, residual: Tensor | None
    ) -> Tensor | None:
        if device_refuses(x.device) is not None:
            return None
        from taut.kernels import int8_triton, packed_rows

        if packed_rows.refuses(x) is None:
            return packed_rows.product(
                x, self.values, Scales(self.scale), self.out_features, bias=bias, act=act, residual=residual
            )
        if x.shape[0] > packed_rows.MAX_ROWS and int8_triton.refuses(x) is None:
            return int8_triton.product(x, self.values, self.scale, self.threshold, bias, act, residual)
        return None

    def kernel_codes(self) -> Codes:
        return Codes(self.values, Scales(self.scale))

    def lanes(self) -> tuple[Format, tuple[Tensor | None, ...]]:
        return Bytes(torch.float32, factor=1 / 127), (self.values, self.scale)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if device_refuses(x.device) is None:
            y = self.fused(x, bias, None, None)
            return super().product(x, bias) if y is None else y
        if x.shape[0] <= 1:
            return super().product(x, bias)
        outliers = self._outliers(x)
        inside = x if outliers is None else x.index_fill(1, outliers, 0)
        quantized, largest = quantize_rows(inside)
        y = _int_product(quantized, self.values)
        y = y * (largest[:, None] * (self.scale * (1 / 127**2)))
        if outliers is not None:
            columns = self.values[:, outliers].float() * (self.scale * (1 / 127))[:, None]
            y += F.linear(x[:, outliers], columns.to(x.dtype)).float()
        return (y if bias is None else y + bias).to(x.dtype)

    def runs_on(self, x: Tensor) -> str:
        if device_refuses(x.device) is None:
            from taut.kernels import int8_triton, packed_rows

            few, many = packed_rows.refuses(x), int8_triton.refuses(x)
            if few is None:
                return "int8: few-row kernel"
            if x.shape[0] > packed_rows.MAX_ROWS and many is None:
                return "int8: LLM.int8() kernel"
            return f"int8: unpacked, then dense ({many or few})"
        return super().runs_on(x) if x.shape[0] <= 1 or self.streams(x) is None else "int8: LLM.int8()"

    def _outliers(self, x: Tensor) -> Tensor | None:
        """Columns of `x` that reach the threshold, or None."""
        if self.threshold <= 0:
            return None
        columns = (x.abs() >= self.threshold).any(0).nonzero().view(-1)
        return columns if columns.numel() else None


def _int_product(x: Tensor, values: Tensor) -> Tensor:
    """`x values^T` of int8 matrices in int32, as float32."""
    return torch._int_mm(x, values.T).float()


def read(name: str, get: Mapping[str, Callable[[], Tensor]], threshold: float) -> Int8:
    """The matrix `name` from its tensors on disk; `CheckpointError` where they don't fit together."""
    values, scale = get["weight"](), get["SCB"]()
    if "weight_format" in get and (form := int(get["weight_format"]())) != _ROW_FORMAT:
        raise CheckpointError(
            f"{name}: 'weight_format' is {form}, a layout of older GPUs; only 0 (by row) is supported. "
            "Save it again with a current bitsandbytes"
        )
    if scale.dtype is not torch.float32 or scale.numel() != values.shape[0]:
        raise CheckpointError(
            f"{name}: 'SCB' is {scale.dtype} {list(scale.shape)}; expected float32 [{values.shape[0]}]"
        )
    return Int8(values, scale.reshape(-1), threshold)
