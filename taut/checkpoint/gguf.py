"""GGUF files: a validated header (versions 2 and 3), and lazy tensors dequantized as they are read.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Files are little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taut.checkpoint.base import file_errors, read_bytes, rows
from taut.checkpoint.gguf_quants import FORMATS, OTHER_TYPES, BlockFormat
from taut.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)

# Bounds that no real file comes near; they keep a corrupt count from costing time or memory.
HEADER_LIMIT = 256 * 2**20  # bytes of header
ENTRY_LIMIT = 2**16  # key-values
TENSOR_LIMIT = 2**18
ELEMENT_LIMIT = 2**24  # elements of all arrays together
KEY_LIMIT = 2**16 - 1  # bytes of a key
RANK_LIMIT = 4
DEPTH_LIMIT = 4  # arrays within arrays

CHUNK = 2**18  # values dequantized at a time: 1 MB of float32, which stays in cache

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a GGUF file; `offset` is where its bytes begin in the file."""

    name: str
    shape: tuple[int, ...]
    format: BlockFormat
    path: Path
    offset: int

    @property
    def dtype(self) -> torch.dtype:
        return self.format.dtype

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        start, stop = rows(self, start, stop)
        width = math.prod(self.shape[1:])  # values in a row
        if self.format.block == 1:
            row = width * self.format.size
            raw = read_bytes(self.path, self.offset + start * row, (stop - start) * row)
            return raw.view(self.dtype).reshape((stop - start, *self.shape[1:]) if self.shape else ())
        if len(self.shape) == 1:  # rows are single values: read the blocks around them
            first = start // self.format.block * self.format.block
            last = -(-stop // self.format.block) * self.format.block
            return self._dequantize(first, last)[start - first : stop - first].clone()
        return self._dequantize(start * width, stop * width).view(stop - start, *self.shape[1:])

    @property
    def block_format(self) -> str | None:
        """Name of the block format, None for plain values."""
        return self.format.name if self.format.block > 1 else None

    @property
    def blocks_shape(self) -> tuple[int, int, int]:
        """Of a matrix as in the file: rows, blocks, bytes of a block."""
        return self.shape[0], self.shape[1] // self.format.block, self.format.size

    def read_blocks(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `[start, stop)` of a matrix as in the file: uint8 `[rows, blocks, bytes of a block]`."""
        start, stop = rows(self, start, stop)
        _, blocks, size = self.blocks_shape
        raw = read_bytes(self.path, self.offset + start * blocks * size, (stop - start) * blocks * size)
        return raw.view(stop - start, blocks, size)

    def _dequantize(self, begin: int, end: int) -> Tensor:
        """Values `[begin, end)`, whole blocks, read and dequantized a chunk at a time."""
        block, size = self.format.block, self.format.size
        out = torch.empty(end - begin, dtype=torch.float32)
        step = CHUNK // block * block
        for at in range(begin, end, step):
            count = min(step, end - at) // block
            raw = read_bytes(self.path, self.offset + at // block * size, count * size)
            part = out[at - begin : at - begin + count * block].view(count, block)
            self.format.decode(raw.view(count, size), part)
        return out


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """The key-values and the tensors of a GGUF file, by their names in the file.

    Everything is checked before it is believed: counts, lengths, UTF-8, alignment, that every tensor lies
    inside the file and none overlaps another. Raises `CheckpointError`, also for unknown tensor types.
    """
    header = _Header(path)
    magic = header.take(4)
    if magic != MAGIC:
        raise CheckpointError(f"{path}: begins with {magic!r}, not {MAGIC!r}: not a GGUF file, or corrupt")
    version = header.scalar("I")
    if version not in VERSIONS:
        big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        raise CheckpointError(
            f"{path}: GGUF version {version}"
            + (" (a big-endian file)" if big_endian else "")
            + f" is not supported; known: little-endian versions {', '.join(map(str, VERSIONS))}"
        )
    tensor_count = header.count("tensors", TENSOR_LIMIT, 24)
    entry_count = header.count("key-values", ENTRY_LIMIT, 13)
    metadata: dict[str, Any] = {}
    for _ in range(entry_count):
        key = header.string("a key", KEY_LIMIT)
        if key in metadata:
            raise CheckpointError(f"{path}: the key {key!r} occurs twice; the file is corrupt")
        metadata[key] = header.value(key, header.scalar("I"))
    infos = [_tensor_info(header) for _ in range(tensor_count)]

    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment % 8:
        raise CheckpointError(f"{path}: 'general.alignment' is {alignment!r}; expected a multiple of 8")
    data = -(-header.position // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    end, before = 0, ""
    for name, shape, kind, offset in sorted(infos, key=lambda info: info[3]):
        if name in tensors:
            raise CheckpointError(f"{path}: the tensor {name!r} occurs twice; the file is corrupt")
        if offset % alignment:
            raise CheckpointError(f"{path}: {name!r} begins at {offset}, not a multiple of {alignment}")
        if offset < end:
            raise CheckpointError(f"{path}: {name!r} overlaps {before!r}; the file is corrupt")
        end, before = offset + _nbytes(path, name, shape, kind), name
        if data + end > header.size:
            raise CheckpointError(
                f"{path}: truncated: {name!r} ends at byte {data + end}, the file has {header.size}; "
                "download it again"
            )
        tensors[name] = GGUFTensor(name, shape, kind, path, data + offset)
    return metadata, {info[0]: tensors[info[0]] for info in infos}


def _tensor_info(header: _Header) -> tuple[str, tuple[int, ...], BlockFormat, int]:
    name = header.string("a tensor name", KEY_LIMIT)
    rank = header.scalar("I")
    if rank > RANK_LIMIT:
        raise CheckpointError(
            f"{header.path}: {name!r} has {rank} dimensions; at most {RANK_LIMIT} are allowed"
        )
    # The fastest dimension comes first in the file.
    shape = tuple(header.scalar("Q") for _ in range(rank))[::-1]
    kind = header.scalar("I")
    offset = header.scalar("Q")
    if kind not in FORMATS:
        known = ", ".join(known.name for known in FORMATS.values())
        raise CheckpointError(
            f"{header.path}: {name!r} has the type {OTHER_TYPES.get(kind, kind)}, which Taut can't read; "
            f"known: {known}. Use a file quantized to one of these"
        )
    return name, shape, FORMATS[kind], offset


def _nbytes(path: Path, name: str, shape: tuple[int, ...], kind: BlockFormat) -> int:
    values = math.prod(shape)
    if values >= 2**63:
        raise CheckpointError(f"{path}: {name!r} has the impossible shape {list(shape)}; the file is corrupt")
    if values and (shape[-1] if shape else 1) % kind.block:
        raise CheckpointError(
            f"{path}: {name!r} is {kind.name} with rows of {shape[-1] if shape else 1} values, "
            f"not a multiple of the block of {kind.block}"
        )
    return values // kind.block * kind.size


class _Header:
    """A cursor over the beginning of a file, which reads more of it only as parsing gets there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        with file_errors(path):
            self.size = path.stat().st_size
        self._buffer = b""
        self._elements = 0

    def take(self, count: int) -> bytes:
        begin = self._need(count)
        return self._buffer[begin : begin + count]

    def scalar(self, code: str) -> Any:
        code = "<" + code
        begin = self._need(struct.calcsize(code))
        return struct.unpack_from(code, self._buffer, begin)[0]

    def count(self, what: str, limit: int, least: int) -> int:
        """A 64-bit count of things of at least `least` bytes each, which must be able to fit the file."""
        count = self.scalar("Q")
        if count > limit or count * least > self.size - self.position:
            raise CheckpointError(
                f"{self.path}: promises {count} {what}, more than fit the file ({self.size} bytes) "
                f"or the limit of {limit}; it is truncated or corrupt: download it again"
            )
        return count

    def string(self, what: str, limit: int = HEADER_LIMIT) -> str:
        length = self.scalar("Q")
        if length > limit:
            raise CheckpointError(f"{self.path}: {what} of {length} bytes; the file is corrupt")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what} is not valid UTF-8: {error}") from None

    def value(self, key: str, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string(f"the value of {key!r}")
        if kind == _ARRAY:
            return self._array(key, depth + 1)
        if kind not in _SCALARS:
            raise CheckpointError(
                f"{self.path}: {key!r} has the unknown value type {kind}; the file is corrupt"
            )
        return self.scalar(_SCALARS[kind])

    def _array(self, key: str, depth: int) -> list[Any]:
        if depth > DEPTH_LIMIT:
            raise CheckpointError(f"{self.path}: {key!r} nests arrays more than {DEPTH_LIMIT} deep")
        kind = self.scalar("I")
        least = 12 if kind == _ARRAY else 8 if kind == _STRING else struct.calcsize(_SCALARS.get(kind, "B"))
        count = self.count(f"elements of {key!r}", ELEMENT_LIMIT - self._elements, least)
        self._elements += count
        if kind == _STRING:
            return self._strings(key, count)
        if kind in _SCALARS:
            code = f"<{count}{_SCALARS[kind]}"
            begin = self._need(count * least)
            return list(struct.unpack_from(code, self._buffer, begin))
        return [self.value(key, kind, depth) for _ in range(count)]

    def _strings(self, key: str, count: int) -> list[str]:
        """The hot loop of opening a file: a vocabulary and its merges are some 100,000 strings."""
        length_of: Callable[..., tuple[int]] = struct.Struct("<Q").unpack_from
        result = []
        append = result.append
        for _ in range(count):
            begin = self.position
            end = begin + 8
            if end > len(self._buffer):
                self._load(end)
            end += length_of(self._buffer, begin)[0]
            if end > len(self._buffer):
                self._load(end)
            raw = self._buffer[begin + 8 : end]
            self.position = end
            try:
                append(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise CheckpointError(
                    f"{self.path}: element {len(result)} of {key!r} is not valid UTF-8: {error}"
                ) from None
        return result

    def _need(self, count: int) -> int:
        """Brings the next `count` bytes into the buffer, moves past them, and says where they begin."""
        begin = self.position
        if begin + count > len(self._buffer):
            self._load(begin + count)
        self.position = begin + count
        return begin

    def _load(self, end: int) -> None:
        if end > self.size:
            raise CheckpointError(
                f"{self.path}: truncated or corrupt: the header goes on to byte {end} or further, "
                f"the file has {self.size}; download it again"
            )
        if end > HEADER_LIMIT:
            raise CheckpointError(
                f"{self.path}: a header of more than {HEADER_LIMIT} bytes; the file is corrupt"
            )
        goal = min(self.size, max(end, 2 * len(self._buffer), 2**20))
        have = len(self._buffer)
        self._buffer += bytes(read_bytes(self.path, have, goal - have).numpy())
