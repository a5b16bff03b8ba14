"""Safetensors files: headers validated before anything is allocated, lazy reads, streamed sharded writes.

The format (https://github.com/huggingface/safetensors): eight bytes little-endian header length, a JSON
header `{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, then the data without holes.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taut.checkpoint.base import (
    Deferred,
    LazyTensor,
    Span,
    file_errors,
    parse_json,
    read_bytes,
    read_json,
    rows,
    some,
)
from taut.errors import CheckpointError, nearest

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000  # bytes, the format's own limit
RANK_LIMIT = 16

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
if hasattr(torch, "float8_e8m0fnu"):  # torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@dataclass(frozen=True)
class SafetensorsTensor:
    """One tensor of a safetensors file; `offset` is where its bytes begin in the file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path
    offset: int

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        start, stop = rows(self, start, stop)
        span = self.span(start, stop)
        raw = read_bytes(span.path, span.offset, span.count)
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        return raw.view(self.dtype).reshape(shape)

    def span(self, start: int, stop: int) -> Span:
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        return Span(self.path, self.offset + start * row, (stop - start) * row)


# ---------------------------------------------------------------------------------------------- reading


def open_safetensors(folder: Path) -> dict[str, LazyTensor]:
    """Lazy tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises `CheckpointError` for a header that is not exactly right, a shard name that could leave the
    folder, a missing or truncated shard, and an index that disagrees with its shards.
    """
    if (folder / SINGLE).is_file():
        return dict(read_header(folder / SINGLE))
    return _open_sharded(folder)


def _open_sharded(folder: Path) -> dict[str, LazyTensor]:
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: 'weight_map' must be an object with the shard of every tensor")
    for name, shard in weight_map.items():
        _check_shard_name(index, name, shard)
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing: {some(missing)}; "
            "download them again"
        )
    tensors: dict[str, LazyTensor] = {}
    for shard in shards:
        found = read_header(folder / shard)
        promised = {name for name, where in weight_map.items() if where == shard}
        if absent := sorted(promised - found.keys()):
            raise CheckpointError(
                f"{index}: says that {some(absent)} {'is' if len(absent) == 1 else 'are'} in {shard}, "
                f"but the file has no such tensor{nearest(absent[0], found)}"
            )
        if extra := sorted(found.keys() - promised):
            elsewhere = weight_map.get(extra[0])
            raise CheckpointError(
                f"{folder / shard}: holds {some(extra)}, which {INDEX} "
                + (f"places in {elsewhere}" if elsewhere else "does not list")
            )
        tensors.update(found)
    return {name: tensors[name] for name in weight_map}


def _check_shard_name(index: Path, name: str, shard: object) -> None:
    plain = isinstance(shard, str) and shard not in ("", ".", "..") and not set(shard) & set("/\\:\0")
    if not plain:
        raise CheckpointError(
            f"{index}: the shard of {name!r} is {shard!r}; "
            "it must be the plain name of a file in the same folder"
        )
    if not shard.endswith(".safetensors"):
        raise CheckpointError(
            f"{index}: the shard of {name!r} is {shard!r}; only .safetensors files are read"
        )


def read_header(path: Path) -> dict[str, SafetensorsTensor]:
    """The tensors of one file in file order, after checking everything the header says: size, dtypes,
    shapes, and that the data of all tensors covers the file exactly, without overlap and without holes."""
    with file_errors(path):
        size = path.stat().st_size
    if size < 8:
        raise CheckpointError(f"{path}: {size} bytes is too short for a safetensors file; download it again")
    length = int.from_bytes(bytes(read_bytes(path, 0, 8).numpy()), "little")
    if length > HEADER_LIMIT:
        raise CheckpointError(
            f"{path}: a header of {length} bytes, more than the {HEADER_LIMIT} the format allows: "
            "not a safetensors file, or corrupt"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{path}: truncated: its header alone needs {8 + length} bytes, the file has {size}; "
            "download it again"
        )
    raw = bytes(read_bytes(path, 8, length).numpy())
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{path}: the header is not a JSON object: not a safetensors file, or corrupt")
    header = parse_json(raw, f"{path}: header")
    _check_metadata(path, header.pop("__metadata__", {}))

    spans = sorted((_span(path, name, entry) for name, entry in header.items()), key=lambda span: span[2:4])
    data = size - 8 - length
    expected = 0
    tensors = {}
    for name, dtype, begin, end, shape in spans:
        if begin != expected:
            what = "overlaps the tensor before it" if begin < expected else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: {name!r} begins at byte {begin} of the data and {what} (expected {expected})"
            )
        expected = end
        tensors[name] = SafetensorsTensor(name, shape, dtype, path, 8 + length + begin)
    if expected > data:
        raise CheckpointError(
            f"{path}: truncated: {8 + length + expected} bytes expected, the file has {size}; "
            "download it again"
        )
    if expected < data:
        raise CheckpointError(
            f"{path}: {8 + length + expected} bytes expected, the file has {size}, more than its tensors"
        )
    return tensors


def _check_metadata(path: Path, metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: '__metadata__' must map strings to strings")


def _span(path: Path, name: str, entry: object) -> tuple[str, torch.dtype, int, int, tuple[int, ...]]:
    """One checked header entry: (name, dtype, begin, end, shape)."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{path}: {name!r} must have exactly 'dtype', 'shape' and 'data_offsets'")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{path}: {name!r} has the dtype {entry['dtype']!r}; known: {', '.join(sorted(DTYPES))}"
        )
    shape = _naturals(entry["shape"])
    if shape is None or len(shape) > RANK_LIMIT:
        raise CheckpointError(
            f"{path}: {name!r} has the shape {_short(entry['shape'])}; "
            f"expected a list of at most {RANK_LIMIT} sizes"
        )
    offsets = _naturals(entry["data_offsets"])
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{path}: {name!r} has the data_offsets {_short(entry['data_offsets'])}; expected [begin, end]"
        )
    begin, end = offsets
    needed = math.prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise CheckpointError(
            f"{path}: {name!r} is {entry['dtype']} {list(shape)}, {needed} bytes, "
            f"but its data_offsets span {end - begin}"
        )
    return name, dtype, begin, end, shape


def _naturals(value: object) -> tuple[int, ...] | None:
    """A list of integers in [0, 2^63) as a tuple; None for anything else (a JSON bool is not a size)."""
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 2**63 for item in value):
        return None
    return tuple(value)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---------------------------------------------------------------------------------------------- writing


def write_safetensors(
    folder: Path | str,
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor] | LazyTensor],
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes tensors in the order given and returns the weight files, all in `folder`.

    One file `model.safetensors` if all fits `max_shard_size` (bytes, or `"5GB"`, `"500MB"`, `"2GiB"`),
    otherwise `model-00001-of-0000N.safetensors` and an index. A tensor is read only when its bytes are due
    and dropped right after, so the memory needed is one tensor: pass lazy tensors (any `LazyTensor`; or
    `Deferred`, whose function makes the tensor) for what is not in memory yet. Names that share memory are
    each written in full. The same input gives the same bytes. Files appear only when all of them are
    written; weight files of an earlier save are replaced. `metadata` is the header's; default
    `{"format": "pt"}`, which transformers requires.
    """
    folder = Path(folder)
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    sources = _sources(tensors)
    shards = _shards(sources, parse_size(max_shard_size))
    if len(shards) == 1:
        names = [SINGLE]
    else:
        names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    with file_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)

    temporary = [folder / f".{name}.{os.getpid()}.tmp" for name in [*names, INDEX]]
    try:
        for path, shard in zip(temporary, shards, strict=False):
            _write_file(path, shard, metadata)
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(_nbytes(source) for source in sources)},
                "weight_map": {
                    source.name: name
                    for name, shard in zip(names, shards, strict=True)
                    for source in sorted(shard, key=lambda source: source.name)
                },
            }
            with file_errors(temporary[-1]):
                temporary[-1].write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            names = [*names, INDEX]
        _publish(folder, dict(zip(temporary, names, strict=False)))
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    return [folder / name for name in names if name != INDEX]


def _publish(folder: Path, files: Mapping[Path, str]) -> None:
    """Moves finished temporary files to their names and removes the weight files of an earlier save.

    In an order that never leaves a readable mixture of old and new: a single file replaces in one step and
    wins over any index; for shards, whatever was readable goes first and the index comes last.
    """
    with file_errors(folder):
        stale = [
            path
            for path in folder.iterdir()
            if _WEIGHT_FILE.fullmatch(path.name) and path.name not in files.values()
        ]
        if SINGLE not in files.values():
            for path in (folder / SINGLE, folder / INDEX):
                path.unlink(missing_ok=True)
        for temporary, name in files.items():  # the index is the last of them
            os.replace(temporary, folder / name)
        for path in stale:
            path.unlink(missing_ok=True)


def _sources(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor] | LazyTensor]) -> list[LazyTensor]:
    items = tensors.items() if isinstance(tensors, Mapping) else tensors
    sources = [_in_memory(*item) if isinstance(item, tuple) else item for item in items]
    seen: set[str] = set()
    for source in sources:
        if source.name in seen or source.name == "__metadata__":
            raise CheckpointError(f"can't save two tensors named {source.name!r}, or '__metadata__'")
        if source.dtype not in _NAMES:
            raise CheckpointError(f"{source.name}: safetensors has no dtype for {source.dtype}")
        seen.add(source.name)
    return sources


def _in_memory(name: str, tensor: Tensor) -> Deferred:
    return Deferred(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)


def _shards(sources: list[LazyTensor], limit: int) -> list[list[LazyTensor]]:
    """Consecutive groups of at most `limit` bytes; a larger tensor has a group of its own. Never empty."""
    shards: list[list[LazyTensor]] = [[]]
    filled = 0
    for source in sources:
        size = _nbytes(source)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(source)
        filled += size
    return shards


def _write_file(path: Path, sources: list[LazyTensor], metadata: Mapping[str, str]) -> None:
    # Wide dtypes first, as the header is padded to 8 bytes: every tensor then lies aligned.
    ordered = sorted(sources, key=lambda source: -source.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for source in ordered:
        end = offset + _nbytes(source)
        header[source.name] = {
            "dtype": _NAMES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    raw += b" " * (-len(raw) % 8)
    with file_errors(path), open(path, "wb", buffering=0) as file:
        _write_all(file, memoryview(len(raw).to_bytes(8, "little") + raw))
        for source in ordered:
            tensor = source.read()
            if tuple(tensor.shape) != tuple(source.shape) or tensor.dtype != source.dtype:
                raise CheckpointError(
                    f"{source.name}: announced as {source.dtype} {list(source.shape)}, "
                    f"but its value is {tensor.dtype} {list(tensor.shape)}"
                )
            if tensor.is_meta:
                raise CheckpointError(f"{source.name}: has no values (it is on the meta device)")
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            _write_all(file, memoryview(flat.view(torch.uint8).numpy()))
            del tensor, flat  # before the next one is made


def _write_all(file: Any, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _nbytes(source: LazyTensor) -> int:
    return math.prod(source.shape) * source.dtype.itemsize


def parse_size(size: int | str) -> int:
    """Bytes from `5368709120`, `"5GB"` (10^9), `"500MB"` or `"2GiB"` (2^30)."""
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", size, re.IGNORECASE)
        if not match or (match[3] and not match[2]):
            raise CheckpointError(f"size {size!r} not understood; write it like '5GB', '500MB' or '2GiB'")
        base = 1024 if match[3] else 1000
        size = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
    if size <= 0:
        raise CheckpointError(f"a size of {size} bytes holds nothing; it must be positive")
    return size
