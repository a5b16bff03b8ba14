"""Matrices that a checkpoint holds packed, as one lazy tensor each; and what packs the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from taut.checkpoint import Deferred, LazyTensor
from taut.errors import CheckpointError
from taut.quant import affine, blockwise, int8
from taut.quant.base import Packed
from taut.quant.config import BitsAndBytesConfig


class Packer(Protocol):
    """Makes one matrix of a checkpoint `Packed`."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """What the result takes."""
        ...

    def __call__(self, source: LazyTensor, read: Callable[[], Tensor], device: torch.device) -> Packed:
        """`source` is the tensor in the file; `read()` gives it dense, on `device` in the model's dtype, but
        the codes of a `StoredMatrix`."""
        ...


@dataclass(frozen=True)
class Quantize:
    """Packs a dense matrix as a config asks."""

    config: BitsAndBytesConfig

    def nbytes(self, shape: tuple[int, ...]) -> int:
        n = math.prod(shape)
        if self.config.load_in_8bit:
            return n + 4 * shape[0]
        blocks = -(-n // self.config.bnb_4bit_blocksize)
        scales = (
            blocks + 8 * -(-blocks // blockwise.NESTED)
            if self.config.bnb_4bit_use_double_quant
            else 4 * blocks
        )
        return -(-n // 2) + scales

    def __call__(self, source: LazyTensor, read: Callable[[], Tensor], device: torch.device) -> Packed:
        c = self.config
        if c.load_in_8bit:
            return int8.Int8.pack(read(), c.llm_int8_threshold)
        packed = blockwise.Blockwise.pack(
            read(), c.bnb_4bit_quant_type, c.bnb_4bit_blocksize, c.bnb_4bit_use_double_quant
        )
        packed.storage, packed.compute = c.bnb_4bit_quant_storage, c.compute
        return packed


@dataclass(frozen=True)
class AsStored:
    """Keeps a `StoredMatrix` as the file has it."""

    compute: torch.dtype | None = None

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape)  # before the file is read; a bound

    def __call__(self, source: StoredMatrix, read: Callable[[], Tensor], device: torch.device) -> Packed:
        packed = source.packed(read).to(device)
        packed.compute = self.compute
        return packed


@dataclass(frozen=True)
class StoredMatrix:
    """A packed matrix under its own name and shape; reading it gives its values. `packed` makes it, given
    what reads `codes`, which is most of its bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    codes: LazyTensor
    packed: Callable[[Callable[[], Tensor]], Packed]

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self.packed(self.codes.read).dequantize(self.dtype)[start:stop]


def open_bitsandbytes(
    tensors: Mapping[str, LazyTensor], config: BitsAndBytesConfig, dtype: torch.dtype
) -> dict[str, LazyTensor]:
    """A checkpoint's tensors with every matrix that bitsandbytes packed as one `StoredMatrix`.

    Raises `CheckpointError` naming what is missing where a matrix is packed and its state is not there.
    """
    out = dict(tensors)
    four = {n.rpartition(f".{blockwise.STATE}")[0] for n in tensors if f".{blockwise.STATE}" in n}
    eight = {n.removesuffix(".SCB") for n in tensors if n.endswith(".SCB")}
    for module in four:
        out[f"{module}.weight"] = _four_bit(module, tensors, dtype)
    for module in eight:
        out[f"{module}.weight"] = _eight_bit(module, tensors, config, dtype)
    for module in four:
        for name in (*blockwise.NAMES, *(blockwise.STATE + kind for kind in blockwise.CODES)):
            out.pop(f"{module}.{name}", None)
    for module in eight:
        for name in int8.NAMES:
            out.pop(f"{module}.{name}", None)
    for name, tensor in out.items():
        if name.endswith(".weight") and not tensor.dtype.is_floating_point:
            state = "SCB" if tensor.dtype is torch.int8 else f"{blockwise.STATE}nf4 (or fp4)"
            raise CheckpointError(
                f"{name} is {tensor.dtype}, but its {name.removesuffix('weight')}{state} is missing; "
                "the checkpoint is incomplete: download or save it again"
            )
    return out


def _getters(
    module: str, tensors: Mapping[str, LazyTensor], names: tuple[str, ...]
) -> dict[str, Callable[[], Tensor]]:
    return {name: tensors[key].read for name in names if (key := f"{module}.{name}") in tensors}


def _need(module: str, get: Mapping[str, object], *names: str) -> None:
    for name in names:
        if name not in get:
            raise CheckpointError(
                f"{module}.{name} is missing, which the quantized {module}.weight needs; "
                "the checkpoint is incomplete: download or save it again"
            )


def _four_bit(module: str, tensors: Mapping[str, LazyTensor], dtype: torch.dtype) -> StoredMatrix:
    kinds = [kind for kind in blockwise.CODES if f"{module}.{blockwise.STATE}{kind}" in tensors]
    if len(kinds) != 1:
        raise CheckpointError(
            f"{module}.weight has the quant states of {' and '.join(kinds) or 'no known type'}"
        )
    state = blockwise.parse_state(
        f"{module}.weight", kinds[0], tensors[f"{module}.{blockwise.STATE}{kinds[0]}"].read()
    )
    get = _getters(module, tensors, ("weight", *blockwise.NAMES))
    _need(module, get, "weight", "weight.absmax", "weight.quant_map")
    if "nested_offset" in state:
        _need(module, get, "weight.nested_absmax", "weight.nested_quant_map")
    name = f"{module}.weight"
    make = lambda read: blockwise.read(name, {**get, "weight": read}, state)  # noqa: E731
    return StoredMatrix(name, tuple(state["shape"]), dtype, tensors[name], make)


def _eight_bit(
    module: str, tensors: Mapping[str, LazyTensor], config: BitsAndBytesConfig, dtype: torch.dtype
) -> StoredMatrix:
    name, get = f"{module}.weight", _getters(module, tensors, ("weight", *int8.NAMES))
    _need(module, get, "weight")
    source = tensors[name]
    if source.dtype is not torch.int8 or len(source.shape) != 2:
        raise CheckpointError(
            f"{name} is {source.dtype} {list(source.shape)} beside an SCB; expected int8 [out, in]"
        )
    make = lambda read: int8.read(name, {**get, "weight": read}, config.llm_int8_threshold)  # noqa: E731
    return StoredMatrix(name, tuple(source.shape), dtype, source, make)


def open_gguf_blocks(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """A GGUF file's tensors with every matrix in a format of `affine` as one `StoredMatrix`."""

    def view(name: str, tensor: LazyTensor) -> LazyTensor:
        kind = getattr(tensor, "block_format", None)
        if kind not in affine.FORMATS or len(tensor.shape) != 2:
            return tensor
        blocks = Deferred(name, tensor.blocks_shape, torch.uint8, tensor.read_blocks)
        make = lambda read: affine.Affine.from_blocks(name, kind, read())  # noqa: E731
        return StoredMatrix(name, tensor.shape, tensor.dtype, blocks, make)

    return {name: view(name, tensor) for name, tensor in tensors.items()}
