"""What every checkpoint format gives: lazy tensors read straight into fresh memory, and `Checkpoint`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from taut.errors import CheckpointError

JSON_LIMIT = 64 * 2**20  # bytes; the largest shard indexes known are a few megabytes


@runtime_checkable
class LazyTensor(Protocol):
    """A tensor that stays in its file until it is read."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what `read` gives."""
        ...

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `[start, stop)` along dim 0 on the CPU, in memory of their own. A 0-d tensor has no rows:
        it is read whole, without arguments."""
        ...


@dataclass(frozen=True)
class Span:
    """`count` bytes of a file, from `offset` on."""

    path: Path
    offset: int
    count: int


def span_of(tensor: LazyTensor, start: int, stop: int) -> Span | None:
    """Where the bytes of rows `[start, stop)` lie in a file, if they lie there as `read` gives them: None for
    a tensor that is computed, or in memory."""
    find = getattr(tensor, "span", None)
    return None if find is None else find(start, stop)


@dataclass(frozen=True)
class Deferred:
    """A `LazyTensor` that a function makes when it is read, for `write_safetensors`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        start, stop = rows(self, start, stop)
        whole = self.make()
        return whole if not self.shape or (start, stop) == (0, self.shape[0]) else whole[start:stop]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: everything but the weights themselves.

    | field | meaning |
    |---|---|
    | `path` | the folder, or the `.gguf` file |
    | `config` | `config.json`, or the same keys made from GGUF metadata |
    | `generation` | `generation_config.json`, or `{}` |
    | `tensors` | lazy tensors by their Hugging Face names |
    | `metadata` | GGUF key-values, or `{}` |
    """

    path: Path
    config: dict[str, Any]
    generation: dict[str, Any]
    tensors: dict[str, LazyTensor]
    metadata: dict[str, Any] = field(default_factory=dict)


def rows(tensor: LazyTensor, start: int, stop: int | None) -> tuple[int, int]:
    """The checked row range of a read; a 0-d tensor counts as one row."""
    count = tensor.shape[0] if tensor.shape else 1
    stop = count if stop is None else stop
    if not 0 <= start <= stop <= count:
        raise CheckpointError(f"{tensor.name}: rows {start}:{stop} asked for, but it has {count} rows")
    if not tensor.shape and (start, stop) != (0, 1):
        raise CheckpointError(f"{tensor.name} is 0-dimensional and can only be read whole")
    return start, stop


def read_bytes(path: Path, offset: int, count: int) -> Tensor:
    """`count` bytes of a file from `offset`, as uint8 `[count]` in fresh memory."""
    out = torch.empty(count, dtype=torch.uint8)
    read_into(out, path, offset)
    return out


def read_into(out: Tensor, path: Path, offset: int) -> None:
    """Fill `out`, uint8 `[count]` in host memory, with the bytes of a file from `offset`.

    Ordinary reads and not a memory map, so that resident memory is what was asked for and nothing else.
    """
    view = memoryview(out.numpy())
    done, count = 0, len(view)
    with file_errors(path), open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while done < count:
            got = file.readinto(view[done:])
            if not got:
                raise CheckpointError(
                    f"{path}: ended at byte {offset + done}, {count - done} bytes short of what its header "
                    "promised; the file changed or is truncated: download it again"
                )
            done += got


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or a `CheckpointError` that says what is wrong with it."""
    with file_errors(path):
        size = path.stat().st_size
        if size > JSON_LIMIT:
            raise CheckpointError(f"{path}: {size} bytes of JSON; at most {JSON_LIMIT} are read")
        raw = path.read_bytes()
    return parse_json(raw, str(path))


def parse_json(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object from bytes; a repeated key is an error, since readers differ in which one they take."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise CheckpointError(f"{what}: JSON nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError too
        raise CheckpointError(f"{what}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}: a JSON object was expected, found {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} occurs twice")
    return result


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system says about a file into a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error


def listing(folder: Path, limit: int = 12) -> str:
    """What a folder holds, for error messages."""
    with file_errors(folder):
        names = sorted(entry.name for entry in folder.iterdir())
    return some(names, limit) if names else "nothing"


def some(names: Iterable[str], limit: int = 5) -> str:
    """`a, b, c and 7 more`."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
