"""How checkpoint tensors map onto parameters: rules as reversible data, a streamed load, a streamed save.

`layout(model, rules)` gives one list of `Piece`s, each tying rows of a disk tensor to rows of a parameter.
Loading reads it one way and saving the other, so a rule can't be right in one direction only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Protocol

import torch
from torch import Tensor, nn

from taut.checkpoint import Deferred, LazyTensor
from taut.errors import WeightsError, nearest
from taut.layers.linear import Linear


@dataclass(frozen=True)
class Piece:
    """Rows `[disk_start, disk_start + rows)` of disk tensor `disk` are rows `[start, start + rows)` of
    parameter `param`; `transposed` swaps the two dimensions of the disk tensor first; `index` picks one
    entry of a parameter with a leading stack dimension."""

    disk: str
    param: str
    rows: int
    start: int = 0
    disk_start: int = 0
    transposed: bool = False
    index: int | None = None

    def view(self, param: Tensor) -> Tensor:
        """The rows of the parameter that this piece covers."""
        whole = param if self.index is None else param[self.index]
        return whole[self.start : self.start + self.rows] if whole.dim() else whole


class Rule(Protocol):
    def apply(self, pieces: list[Piece]) -> list[Piece]: ...


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))


@dataclass(frozen=True)
class Rename:
    """The disk name `disk` is our `ours`; `{}` in both stands for the same layer numbers, in order."""

    disk: str
    ours: str

    def apply(self, pieces: list[Piece]) -> list[Piece]:
        pattern = _pattern(self.ours)

        def rename(piece: Piece) -> Piece:
            match = pattern.fullmatch(piece.disk)
            return replace(piece, disk=self.disk.format(*match.groups())) if match else piece

        return [rename(piece) for piece in pieces]


@dataclass(frozen=True)
class Fused:
    """Disk holds our sibling `parts` stacked along dimension 0 as `disk` (a module name; its weight and
    its bias alike)."""

    disk: str
    parts: tuple[str, ...]

    def apply(self, pieces: list[Piece]) -> list[Piece]:
        parent = self.disk.rsplit(".", 1)[0]
        names = "|".join(re.escape(part) for part in self.parts)
        pattern = re.compile(rf"{_pattern(parent).pattern}\.({names})\.(weight|bias)")
        found = [pattern.fullmatch(piece.disk) for piece in pieces]
        rows = {m.group(0): p.rows for m, p in zip(found, pieces, strict=True) if m}
        out = []
        for piece, match in zip(pieces, found, strict=True):
            if match is None:
                out.append(piece)
                continue
            *numbers, part, kind = match.groups()
            before = self.parts[: self.parts.index(part)]
            prefix = parent.format(*numbers)
            offset = sum(rows.get(f"{prefix}.{sibling}.{kind}", 0) for sibling in before)
            out.append(replace(piece, disk=f"{self.disk.format(*numbers)}.{kind}", disk_start=offset))
        return out


@dataclass(frozen=True)
class Transposed:
    """The disk tensor `disk` (template with `{}`) is our matrix with its two dimensions swapped."""

    disk: str

    def apply(self, pieces: list[Piece]) -> list[Piece]:
        pattern = _pattern(self.disk)
        return [replace(p, transposed=True) if pattern.fullmatch(p.disk) else p for p in pieces]


@dataclass(frozen=True)
class Stacked:
    """Our parameter `ours` `[count, ...]` is `count` disk tensors; the last `{}` of `disk` counts them."""

    disk: str
    ours: str
    count: int

    def apply(self, pieces: list[Piece]) -> list[Piece]:
        pattern = _pattern(self.ours)
        out: list[Piece] = []
        for piece in pieces:
            match = pattern.fullmatch(piece.disk)
            if match is None:
                out.append(piece)
                continue
            for index in range(self.count):
                out.append(replace(piece, disk=self.disk.format(*match.groups(), index), index=index))
        return out


def layout(model: nn.Module, rules: Sequence[Rule] = ()) -> list[Piece]:
    """Every parameter of `model`, cut into the tensors a checkpoint of its family holds.

    A `Linear` with parts gives one piece a part, under the part's own name beside the module. The rules
    then apply in order, each to what the one before gave.
    """
    pieces: list[Piece] = []
    for path, module in model.named_modules():
        for kind, param in module.named_parameters(recurse=False):
            name = f"{path}.{kind}" if path else kind
            if not (isinstance(module, Linear) and module.parts):
                pieces.append(Piece(name, name, param.shape[0] if param.dim() else 1))
                continue
            beside, start = path[: path.rfind(".") + 1], 0
            for part, rows in module.parts.items():
                pieces.append(Piece(f"{beside}{part}.{kind}", name, rows, start))
                start += rows
    for rule in rules:
        pieces = rule.apply(pieces)
    stacked = {piece.param for piece in pieces if piece.index is not None}
    params = dict(model.named_parameters())
    return [replace(p, rows=params[p.param].shape[1]) if p.param in stacked else p for p in pieces]


def _disk_shapes(pieces: Iterable[Piece], params: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape each disk tensor should have."""
    shapes: dict[str, tuple[int, ...]] = {}
    flipped: set[str] = set()
    for piece in pieces:
        own = tuple(params[piece.param].shape)[piece.index is not None :]
        rows = max(shapes.get(piece.disk, (0,))[0], piece.disk_start + piece.rows) if own else 0
        shapes[piece.disk] = (rows, *own[1:]) if own else ()
        if piece.transposed:
            flipped.add(piece.disk)
    return {name: shape[::-1] if name in flipped else shape for name, shape in shapes.items()}


def check(
    pieces: Sequence[Piece],
    params: Mapping[str, Tensor],
    tensors: Mapping[str, LazyTensor],
    ignored: Sequence[str] = (),
) -> None:
    """Match checkpoint tensors and parameters one to one, or raise one `WeightsError` with everything that
    is missing, unexpected or misshapen. `ignored` are name patterns (`*` as wildcard) a file may hold."""
    expected = _disk_shapes(pieces, params)
    missing = [name for name in expected if name not in tensors]
    unexpected = [
        name for name in tensors if name not in expected and not any(fnmatch(name, p) for p in ignored)
    ]
    misshapen = [
        f"{name}: the file has {list(tensors[name].shape)}, the config asks for {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    lines = [f"missing: {name} {list(expected[name])}{nearest(name, unexpected)}" for name in missing]
    lines += [
        f"unexpected: {name} {list(tensors[name].shape)}{nearest(name, missing)}" for name in unexpected
    ]
    lines += [f"wrong shape: {line}" for line in misshapen]
    if lines:
        shown, hidden = lines[:40], len(lines) - 40
        more = [f"... and {hidden} more"] if hidden > 0 else []
        raise WeightsError(
            f"the checkpoint does not fit the model ({len(missing)} missing, {len(unexpected)} unexpected, "
            f"{len(misshapen)} of another shape); is config.json the one of these weights?\n  "
            + "\n  ".join(shown + more)
        )


# A slice is at most this many bytes as read, so that loading needs the model and little more.
_SLICE_BYTES = 8 << 20


def load(
    model: nn.Module,
    tensors: Mapping[str, LazyTensor],
    rules: Sequence[Rule] = (),
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    ignored: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill a model built on the meta device, in `dtype` on `device`, one slice at a time.

    All or nothing: names and shapes are checked before anything is allocated, and parameters replace the
    meta ones only once every slice has been read. Peak host memory is the model (if it lives on the host)
    plus one slice. `progress(done, total)` is called with bytes of the finished model.
    """
    params = dict(model.named_parameters())
    pieces = layout(model, rules)
    check(pieces, params, tensors, ignored)
    total = sum(p.numel() for p in params.values()) * dtype.itemsize
    filled = {name: torch.empty(p.shape, dtype=dtype, device=device) for name, p in params.items()}
    done = 0
    for piece in pieces:
        source, target = tensors[piece.disk], piece.view(filled[piece.param])
        for begin, end in _slices(piece, source):
            if piece.transposed:
                target.copy_(source.read().T[piece.disk_start : piece.disk_start + piece.rows])
            elif target.dim():
                target[begin:end].copy_(source.read(piece.disk_start + begin, piece.disk_start + end))
            else:
                target.copy_(source.read())
        done += target.numel() * dtype.itemsize
        if progress is not None:
            progress(done, total)
    for name, tensor in filled.items():
        path, _, kind = name.rpartition(".")
        old = params[name]
        setattr(model.get_submodule(path), kind, nn.Parameter(tensor, requires_grad=old.requires_grad))


def _slices(piece: Piece, source: LazyTensor) -> Iterator[tuple[int, int]]:
    if piece.transposed or not source.shape:
        yield 0, piece.rows
        return
    row_bytes = max(1, source.dtype.itemsize * torch.Size(source.shape[1:]).numel())
    step = max(1, _SLICE_BYTES // row_bytes)
    for begin in range(0, piece.rows, step):
        yield begin, min(piece.rows, begin + step)


def dense(param: Tensor) -> Tensor:
    """The parameter's values as an ordinary tensor, whatever layout inference keeps them in."""
    return param.detach().to_dense() if param.is_mkldnn else param.detach()


def store(model: nn.Module, rules: Sequence[Rule] = ()) -> list[Deferred]:
    """The tensors of `model` under their canonical names, in the model's order; the reverse of `load`."""
    params = dict(model.named_parameters())
    pieces = layout(model, rules)
    shapes = _disk_shapes(pieces, params)
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.disk, []).append(piece)

    def assemble(group: list[Piece]) -> Tensor:
        parts = [p.view(dense(params[p.param])).cpu() for p in sorted(group, key=lambda p: p.disk_start)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return (whole.T if group[0].transposed else whole).contiguous()

    return [
        Deferred(name, shapes[name], params[group[0].param].dtype, lambda group=group: assemble(group))
        for name, group in groups.items()
    ]
