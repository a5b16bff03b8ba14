"""NF4 and FP4: 4-bit codes of values divided by the largest of their block, in bitsandbytes' layout.

NF4 is from Dettmers et al. 2023, "QLoRA"; the 8-bit code that double quantization stores scales in is the
dynamic one of Dettmers 2015, "8-Bit Approximations for Parallelism in Deep Learning". A matrix is cut into
blocks as one run of values, row after row, so a block may span rows, and the last may be shorter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from taut.errors import CheckpointError
from taut.kernels.dispatch import device_refuses
from taut.kernels.gemv_llvm import Format
from taut.kernels.packed import Codes, Scales
from taut.kernels.packed_llvm import Nibbles
from taut.quant.base import Packed

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED = 256  # scales in a block of the second quantization
_CHUNK = 1 << 24  # values quantized at a time, which bounds the temporaries

# The 16 values of each code, in the order of the codes, not of the values.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
    *(0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, -0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)
CODES = MappingProxyType({"nf4": _NF4, "fp4": _FP4})


@cache
def code_values(kind: str, device: torch.device) -> Tensor:
    """The values of the 16 codes, largest 1: float32 `[16]`."""
    values = torch.tensor(CODES[kind], dtype=torch.float32)
    return (values / values.abs().max()).to(device)


@cache
def _host_values(kind: str) -> tuple[float, ...]:
    return tuple(code_values(kind, torch.device("cpu")).tolist())


@cache
def _boundaries(kind: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """What lies halfway between neighbouring values, and the codes in the order of their values."""
    values = code_values(kind, torch.device("cpu"))
    order = torch.argsort(values)
    middle = (values[order[:-1]] + values[order[1:]]) / 2
    return middle.to(device), order.to(torch.uint8).to(device)


@cache
def _pairs(kind: str, device: torch.device) -> Tensor:
    """Both values of every byte as one 64-bit word, so that unpacking is a single gather: int64 `[256]`."""
    values = code_values(kind, torch.device("cpu"))
    byte = torch.arange(256)
    return torch.stack((values[byte >> 4], values[byte & 15]), 1).view(torch.int64).view(256).to(device)


@cache
def scale_values(device: torch.device) -> Tensor:
    """The 256 values of the dynamic 8-bit code, ascending: float32 `[256]`.

    One sign, then as many zeros as the power of ten is below 0, a one, and the fraction in the bits that are
    left: `i` bits of fraction for values between 10^(i - 7) and 10^(i - 6).
    """
    values = [torch.zeros(1), torch.ones(1)]
    for bits in range(7):
        edges = torch.linspace(0.1, 1, 2**bits + 1, dtype=torch.float32)
        middles = 10 ** (bits - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += [middles, -middles]
    return torch.cat(values).sort().values.to(device)


_GRID = 65535


@cache
def _scale_codes(device: torch.device) -> Tensor:
    """The nearest code of each of 65536 even steps from -1 to 1: uint8 `[65536]`.

    bitsandbytes rounds to these steps first on a CPU (on a GPU it doesn't, and about one code in a thousand
    is the neighbour there); here every device does, so that the same weight gives the same bytes.
    """
    values = scale_values(torch.device("cpu"))
    steps = torch.arange(_GRID + 1, dtype=torch.float32) / _GRID * 2 - 1
    return torch.bucketize(steps, (values[:-1] + values[1:]) / 2).to(torch.uint8).to(device)


def _blocks(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Each value over the largest magnitude of its block, float32 in [-1, 1] but for the last bit, and those
    magnitudes, float32."""
    flat = values if values.dtype in (torch.bfloat16, torch.float16) else values.float()
    whole = flat.numel() // block * block
    body = flat[:whole].view(-1, block)
    absmax = body.abs().amax(1).float()
    scaled = (body * (1.0 / absmax.clamp(min=1e-38))[:, None]).view(-1)
    if whole < flat.numel():
        tail = flat[whole:].float()
        largest = tail.abs().max()
        absmax = torch.cat((absmax, largest[None]))
        scaled = torch.cat((scaled, tail / largest.clamp(min=1e-38)))
    return scaled, absmax


def quantize(weight: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 `[ceil(n / 2)]`, the first of each pair in the high half, and float32 scales
    `[ceil(n / block)]` of the `n` values of `weight`, on its device. Equal to bitsandbytes' bytes."""
    flat = weight.detach().reshape(-1)
    middle, order = _boundaries(kind, flat.device)
    codes, scales = [], []
    for start in range(0, flat.numel(), _CHUNK):
        scaled, absmax = _blocks(flat[start : start + _CHUNK], block)
        if scaled.numel() % block:
            absmax[-1].clamp_(min=1e-38)  # as bitsandbytes keeps the scale of a last, shorter block
        if scaled.numel() % 2:
            scaled = F.pad(scaled, (0, 1))
        nibbles = order.index_select(0, torch.bucketize(scaled, middle, out_int32=True))
        codes.append((nibbles[::2] << 4) | nibbles[1::2])
        scales.append(absmax)
    return (codes[0], scales[0]) if len(codes) == 1 else (torch.cat(codes), torch.cat(scales))


def quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization of float32 scales `[blocks]`: 8-bit codes `[blocks]`, the largest deviation from
    the mean in each 256 of them `[ceil(blocks / 256)]`, and the mean `[]`."""
    offset = scales.mean()
    scaled, absmax = _blocks(scales - offset, NESTED)
    steps = ((scaled.clamp_(-1, 1) + 1) * 0.5 * _GRID + 0.5).int()
    codes = _scale_codes(scales.device)[steps]
    # A block without any deviation is all code 0 in bitsandbytes; times 0, every code means the same.
    flat = (absmax == 0).repeat_interleave(NESTED)[: codes.numel()]
    return codes.masked_fill_(flat, 0), absmax, offset


class Blockwise(Packed):
    """NF4 or FP4 codes and their scales, these float32 or themselves in 8 bits.

    | buffer | shape | |
    |---|---|---|
    | `codes` | uint8 `[n / 2]` | two a byte, the first in the high half; `n` is rows times inputs |
    | `absmax` | float32 `[n / block]`, or uint8 | the scale of each block, or its code |
    | `nested` | float32 `[n / block / 256]` | doubly quantized: what the codes' values are multiplied by |
    | `offset` | float32, as `nested` | and what is added to them then: the same throughout a unit |
    """

    def __init__(self, kind: str, block: int, shape: tuple[int, int], buffers: dict[str, Tensor]):
        super().__init__(shape[0], shape[1], buffers)
        self.kind, self.block = kind, block
        self.storage = torch.uint8

    @classmethod
    def pack(cls, weight: Tensor, kind: str, block: int, double: bool) -> Blockwise:
        """Quantize `weight` `[out, in]` where it is."""
        codes, absmax = quantize(weight, kind, block)
        buffers = {"codes": codes, "absmax": absmax}
        if double:
            buffers["absmax"], buffers["nested"], offset = quantize_scales(absmax)
            buffers["offset"] = offset.expand(buffers["nested"].shape).clone()
        return cls(kind, block, tuple(weight.shape), buffers)

    @property
    def double(self) -> bool:
        return "nested" in self.sizes

    def scales(self) -> Tensor:
        """float32 scale of every block."""
        if not self.double:
            return self.absmax
        values = scale_values(self.absmax.device)[self.absmax.int()]
        count = values.numel()
        spread = [t.repeat_interleave(NESTED)[:count] for t in (self.nested, self.offset)]
        return values.mul_(spread[0]).add_(spread[1])

    def fused(
        self, x: Tensor, bias: Tensor | None, act: str | None, residual: Tensor | None
    ) -> Tensor | None:
        if self._refused(x) is not None:
            return None
        from taut.kernels import packed_rows

        return packed_rows.product(
            x,
            self.codes,
            self._kernel_scales(),
            self.out_features,
            values=_host_values(self.kind),
            block=self.block,
            bias=bias,
            act=act,
            residual=residual,
        )

    def kernel_codes(self) -> Codes:
        return Codes(self.codes, self._kernel_scales(), _host_values(self.kind), self.block)

    def lanes(self) -> tuple[Format, tuple[Tensor | None, ...]]:
        weight = Nibbles(_host_values(self.kind), self.block, True, self.absmax.dtype, nest=NESTED)
        if not self.double:
            return weight, (self.codes, self.absmax, None, None, None, None)
        levels = scale_values(self.absmax.device)
        return weight, (self.codes, self.absmax, None, levels, self.nested, self.offset)

    def runs_on(self, x: Tensor) -> str:
        if x.device.type == "cpu":
            return super().runs_on(x)
        why = self._refused(x)
        return f"{self.kind}: {'few-row kernel' if why is None else f'unpacked, then dense ({why})'}"

    def _refused(self, x: Tensor) -> str | None:
        """Why the kernel can't take `x`, or None."""
        why = device_refuses(x.device)
        if why is None:
            from taut.kernels import packed_rows

            why = packed_rows.refuses(x, self.block)
        return why

    def _kernel_scales(self) -> Scales:
        if not self.double:
            return Scales(self.absmax)
        return Scales(self.absmax, scale_values(self.absmax.device), self.nested, self.offset)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        if device_refuses(self.codes.device) is None:
            from taut.kernels.packed_triton import unpack4

            values, shape = code_values(self.kind, self.codes.device), (self.out_features, self.in_features)
            return unpack4(self.codes, values, self._kernel_scales(), self.block, shape, dtype)
        if (found := self.unpacked(dtype)) is not None:
            return found
        n = self.out_features * self.in_features
        words = _pairs(self.kind, self.codes.device).index_select(0, self.codes.int())
        values, scales = words.view(torch.float32), self.scales()
        whole = n // self.block * self.block
        values[:whole].view(-1, self.block).mul_(scales[: whole // self.block, None])
        if whole < n:
            values[whole:n].mul_(scales[-1])
        return values[:n].view(self.out_features, self.in_features).to(dtype)

    def joins(self, other: Packed) -> bool:
        if not isinstance(other, Blockwise) or (self.kind, self.block) != (other.kind, other.block):
            return False
        if (
            self.double != other.double
            or self.storage is not other.storage
            or self.compute is not other.compute
        ):
            return False
        step = self.block * (NESTED if self.double else 1)
        return all(unit.out_features * unit.in_features % step == 0 for unit in (self, other))

    def stored(self, dtype: torch.dtype) -> dict[str, Tensor]:
        state = {
            "quant_type": self.kind,
            "blocksize": self.block,
            "dtype": str(dtype).removeprefix("torch."),
            "shape": [self.out_features, self.in_features],
        }
        tensors = {
            "weight": self.codes.view(self.storage)[:, None],
            "weight.absmax": self.absmax,
            "weight.quant_map": code_values(self.kind, torch.device("cpu")),
        }
        if self.double:
            tensors["weight.nested_absmax"] = self.nested
            tensors["weight.nested_quant_map"] = scale_values(torch.device("cpu"))
            state |= {
                "nested_blocksize": NESTED,
                "nested_dtype": "float32",
                "nested_offset": self.offset[0].item(),
            }
        raw = json.dumps(state).encode()
        tensors[f"weight.quant_state.bitsandbytes__{self.kind}"] = torch.tensor(list(raw), dtype=torch.uint8)
        return tensors


# ------------------------------------------------------------------------------- reading bitsandbytes' files

STATE = "weight.quant_state.bitsandbytes__"
NAMES = ("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")


def read(name: str, get: Mapping[str, Callable[[], Tensor]], state: Mapping[str, object]) -> Blockwise:
    """The matrix `name` from its tensors on disk (`weight`, `weight.absmax` ...), each read by calling it.

    Raises `CheckpointError` where the state (`parse_state` checked it) and the tensors don't fit together.
    """

    def fetch(key: str, dtype: torch.dtype, count: int | None) -> Tensor:
        tensor = get[key]()
        if (dtype is not None and tensor.dtype is not dtype) or (
            count is not None and tensor.numel() != count
        ):
            raise CheckpointError(
                f"{name}: {key!r} is {tensor.dtype} {list(tensor.shape)}; the quant state asks for "
                f"{dtype} with {count} values; the file is corrupt"
            )
        return tensor.reshape(-1)

    kind, block, shape = state["quant_type"], state["blocksize"], tuple(state["shape"])
    n = math.prod(shape)
    raw = get["weight"]()
    storage = raw.dtype
    codes = raw.reshape(-1).view(torch.uint8)
    if codes.numel() != -(-n // 2):
        raise CheckpointError(
            f"{name}: 'weight' holds {codes.numel()} bytes; {list(shape)} in 4 bits are {-(-n // 2)}; "
            "the file is corrupt"
        )
    count = -(-n // block)
    table = fetch("weight.quant_map", torch.float32, 16)
    if not torch.equal(table, code_values(kind, torch.device("cpu"))):
        raise CheckpointError(f"{name}: 'weight.quant_map' is not the table of {kind}; the file is corrupt")
    double = "nested_offset" in state
    buffers = {
        "codes": codes,
        "absmax": fetch("weight.absmax", torch.uint8 if double else torch.float32, count),
    }
    if double:
        if state["nested_blocksize"] != NESTED:
            raise CheckpointError(
                f"{name}: the scales are in blocks of {state['nested_blocksize']}; supported: {NESTED}"
            )
        values = fetch("weight.nested_quant_map", torch.float32, 256)
        if not torch.equal(values, scale_values(torch.device("cpu"))):
            raise CheckpointError(f"{name}: 'weight.nested_quant_map' is not the dynamic 8-bit table")
        buffers["nested"] = fetch("weight.nested_absmax", torch.float32, -(-count // NESTED))
        buffers["offset"] = torch.full_like(buffers["nested"], float(state["nested_offset"]))
    packed = Blockwise(kind, block, shape, buffers)
    packed.storage = storage
    return packed


def parse_state(name: str, kind: str, raw: Tensor) -> dict[str, object]:
    """The JSON that bitsandbytes keeps in a uint8 tensor, checked; `CheckpointError` for anything amiss."""

    def wrong(why: str) -> CheckpointError:
        return CheckpointError(f"{name}: its quant state {why}; the file is corrupt: download it again")

    if raw.dtype is not torch.uint8 or raw.dim() != 1 or raw.numel() > 4096:
        raise wrong(f"is {raw.dtype} {list(raw.shape)}, not a short run of bytes")
    try:
        state = json.loads(bytes(raw.tolist()).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise wrong(f"is not JSON ({error})") from None
    if not isinstance(state, dict):
        raise wrong("is not a JSON object")
    if state.get("quant_type") != kind:
        raise wrong(f"says 'quant_type' {state.get('quant_type')!r} under the name of {kind}")
    if state.get("blocksize") not in BLOCKS or type(state["blocksize"]) is not int:
        raise wrong(f"says 'blocksize' {state.get('blocksize')!r}; known: {', '.join(map(str, BLOCKS))}")
    shape = state.get("shape")
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(s) is int and s > 0 for s in shape):
        raise wrong(f"says 'shape' {shape!r}; expected two positive integers")
    nested = [key for key in ("nested_blocksize", "nested_offset") if key in state]
    if len(nested) == 1 or (nested and not isinstance(state["nested_offset"], (int, float))):
        raise wrong(f"has half of what double quantization needs ({nested[0]})")
    if nested and not math.isfinite(state["nested_offset"]):
        raise wrong(f"says 'nested_offset' {state['nested_offset']!r}")
    return state
