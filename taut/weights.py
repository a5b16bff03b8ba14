"""How checkpoint tensors map onto parameters: rules as reversible data, a streamed load, a streamed save.

`layout(model, rules)` gives one list of `Piece`s, each tying rows of a disk tensor to rows of a parameter.
Loading reads it one way and saving the other, so a rule can't be right in one direction only.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from itertools import groupby
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from taut.checkpoint import Deferred, LazyTensor
from taut.checkpoint.ahead import ReadAhead, target_of
from taut.checkpoint.base import span_of
from taut.errors import WeightsError, nearest
from taut.layers.embedding import Embedding
from taut.layers.experts import ExpertLinear
from taut.layers.linear import Linear
from taut.quant.base import Dense, Packed, Reordered
from taut.quant.experts import PackedExperts
from taut.quant.mxfp4 import Mxfp4Experts
from taut.quant.stored import AsStored, Packer, StoredMatrix

# What may hold its weight packed.
PACKABLE = Linear | ExpertLinear | Embedding


@dataclass(frozen=True)
class Piece:
    """Rows `[start, start + rows)` of parameter `param` are as many rows of disk tensor `disk`, every
    `disk_step`th from `disk_start` on; `transposed` swaps the two dimensions of the disk tensor first.
    `index` picks an expert of a parameter that stacks them, `entry` one of a disk tensor that does."""

    disk: str
    param: str
    rows: int
    start: int = 0
    disk_start: int = 0
    disk_step: int = 1
    transposed: bool = False
    index: int | None = None
    entry: int | None = None

    def view(self, param: Tensor) -> Tensor:
        """The rows of the parameter that this piece covers."""
        whole = param if self.index is None else param[self.index]
        return whole[self.start : self.start + self.rows] if whole.dim() else whole

    def place(self, disk: Tensor) -> Tensor:
        """The rows of the disk tensor, or of its entry, that this piece covers; of a transposed one, those of
        its transpose."""
        whole = disk.mT if self.transposed else disk
        return whole[self.disk_start : self.disk_stop : self.disk_step] if whole.dim() else whole

    @property
    def disk_stop(self) -> int:
        """One past the last row on disk."""
        return self.disk_start + (self.rows - 1) * self.disk_step + 1


class Rule(Protocol):
    def apply(self, pieces: list[Piece]) -> list[Piece]: ...


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{\}", r"(\d+)"))


@dataclass(frozen=True)
class Rename:
    """The disk name `disk` is our `ours`, a tensor or a module with all inside it; `{}` in both stands for
    the same layer numbers, in order."""

    disk: str
    ours: str

    def apply(self, pieces: list[Piece]) -> list[Piece]:
        pattern = re.compile(_pattern(self.ours).pattern + r"(\..*)?")

        def rename(piece: Piece) -> Piece:
            match = pattern.fullmatch(piece.disk)
            if match is None:
                return piece
            *numbers, inside = match.groups(default="")
            return replace(piece, disk=self.disk.format(*numbers) + inside)

        return [rename(piece) for piece in pieces]


def renames(module: str, names: Mapping[str, str]) -> tuple[Rename, ...]:
    """A `Rename` for each disk name of `names` and ours, all inside `module`."""
    return tuple(Rename(f"{module}.{disk}", f"{module}.{ours}") for disk, ours in names.items())


@dataclass(frozen=True)
class Fused:
    """Disk holds our sibling `parts` stacked along dimension 0 as `disk` (a module name; its weight and
    its bias alike), in `groups` groups of equal shares: two give q0 k0 v0 q1 k1 v1."""

    disk: str
    parts: tuple[str, ...]
    groups: int = 1

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
            sizes = {p: rows.get(f"{prefix}.{p}.{kind}", 0) // self.groups for p in self.parts}
            disk, share = f"{self.disk.format(*numbers)}.{kind}", sizes[part]
            begin, step = sum(sizes[p] for p in before), sum(sizes.values())
            for g in range(self.groups):
                start, disk_start = piece.start + g * share, begin + g * step
                out.append(replace(piece, disk=disk, rows=share, start=start, disk_start=disk_start))
        return out


@dataclass(frozen=True)
class Transposed:
    """The disk tensor `disk` (template with `{}`) is our matrix with its two dimensions swapped."""

    disk: str

    def apply(self, pieces: list[Piece]) -> list[Piece]:
        pattern = _pattern(self.disk)
        return [replace(p, transposed=True) if pattern.fullmatch(p.disk) else p for p in pieces]


@dataclass(frozen=True)
class Split:
    """Our parameter `ours` `[count, rows, ...]` is `count` disk tensors; the last `{}` of `disk` counts
    them."""

    disk: str
    ours: str
    count: int
    rows: int

    def apply(self, pieces: list[Piece]) -> list[Piece]:
        pattern = _pattern(self.ours)
        out: list[Piece] = []
        for piece in pieces:
            match = pattern.fullmatch(piece.disk)
            if match is None:
                out.append(piece)
                continue
            for index in range(self.count):
                disk = self.disk.format(*match.groups(), index)
                out.append(replace(piece, disk=disk, index=index, rows=self.rows))
        return out


@dataclass(frozen=True)
class Stacked:
    """Disk holds the tensors `ours` of all experts as one, `disk` `[experts, ...]`; the `{}` of `ours` stand
    for the layer, the expert and, where there are several, one of the `parts` that lie along the rows: one
    after the other, or, in `turns`, row by row. `transposed`: each expert's matrix is the other way round."""

    disk: str
    ours: str
    parts: tuple[str, ...] = ()
    turns: bool = False
    transposed: bool = False

    def apply(self, pieces: list[Piece]) -> list[Piece]:
        names = {self._ours(part): at for at, part in enumerate(self.parts)} or {self.ours: 0}
        patterns = [(_pattern(name), at) for name, at in names.items()]
        out = []
        for piece in pieces:
            for pattern, at in patterns:
                if (match := pattern.fullmatch(piece.disk)) is not None:
                    *numbers, entry = match.groups()
                    step = len(names) if self.turns else 1
                    piece = replace(
                        piece,
                        disk=self.disk.format(*numbers),
                        entry=int(entry),
                        disk_start=at if self.turns else piece.start,
                        disk_step=step,
                        transposed=self.transposed,
                    )
                    break
            out.append(piece)
        return out

    def _ours(self, part: str) -> str:
        """The name of one part, with the numbers left open."""
        return part.join(self.ours.rsplit("{}", 1))


def apart(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules of files that hold the same experts one by one, under our own names: what small formats
    need, which pack each matrix by itself."""
    return tuple(rule for rule in rules if not isinstance(rule, Stacked))


def _own_shapes(module: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    """Names and shapes of a module's own parameters; a packed weight counts as the matrices it is."""
    if isinstance(module, PACKABLE) and module.packed is not None:
        yield "weight", module.shape
    for kind, param in module.named_parameters(recurse=False):
        yield kind, param.shape


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Every parameter's shape by its name."""
    modules = dict(model.named_modules()).items()
    return {
        f"{path}.{kind}" if path else kind: s for path, module in modules for kind, s in _own_shapes(module)
    }


def layout(model: nn.Module, rules: Sequence[Rule] = ()) -> list[Piece]:
    """Every parameter of `model`, cut into the tensors a checkpoint of its family holds.

    A `Linear` with parts gives one piece a part, under the part's own name beside the module; an
    `ExpertLinear` the same for each expert, behind its number. The rules then apply in order, each to what
    the one before gave.
    """
    pieces: list[Piece] = []
    for path, module in model.named_modules():
        beside = path[: path.rfind(".") + 1]
        if isinstance(module, Linear) and module.parts:  # each part's weight and bias, as if it stood alone
            biases = module.biases()
            for part, start, rows in _spans(module.parts):
                pieces.append(Piece(f"{beside}{part}.weight", f"{path}.weight", rows, start))
                if part in biases:
                    pieces.append(Piece(f"{beside}{part}.bias", f"{path}.bias", rows, biases[part]))
            continue
        for kind, shape in _own_shapes(module):
            name = f"{path}.{kind}" if path else kind
            if isinstance(module, ExpertLinear):
                parts = module.parts or {path[len(beside) :]: module.out_features}
                for expert in range(module.experts):
                    for part, start, rows in _spans(parts):
                        disk = f"{beside}{expert}.{part}.{kind}"
                        pieces.append(Piece(disk, name, rows, start, index=expert))
            else:
                pieces.append(Piece(name, name, shape[0] if shape else 1))
    for rule in rules:
        pieces = rule.apply(pieces)
    return pieces


def _spans(parts: Mapping[str, int]) -> Iterator[tuple[str, int, int]]:
    """Each part with its first row and its rows."""
    start = 0
    for part, rows in parts.items():
        yield part, start, rows
        start += rows


def prefix_of(pieces: Iterable[Piece], module: str = "model") -> str | None:
    """The first word that the disk names of all parameters inside `module` share: files saved without a head
    leave it out. None where there is no such word."""
    words = {piece.disk.split(".", 1)[0] for piece in pieces if piece.param.startswith(f"{module}.")}
    return words.pop() if len(words) == 1 else None


@dataclass(frozen=True)
class Without:
    """Disk names leave out the first word `prefix`, where they have it."""

    prefix: str

    def apply(self, pieces: list[Piece]) -> list[Piece]:
        return [replace(piece, disk=piece.disk.removeprefix(f"{self.prefix}.")) for piece in pieces]


def with_prefix(
    tensors: Mapping[str, LazyTensor], prefix: str | None, expected: Collection[str]
) -> Mapping[str, LazyTensor]:
    """`tensors` under the names `expected`, where a file saved without a head leaves out the first word of
    each: `h.0.ln_1.weight` for `transformer.h.0.ln_1.weight`."""
    if prefix is None or any(name.startswith(f"{prefix}.") for name in tensors):
        return tensors
    renamed = {n if n in expected else f"{prefix}.{n}": tensor for n, tensor in tensors.items()}
    return renamed if renamed.keys() & set(expected) else tensors


_GREEK = MappingProxyType({"gamma": "weight", "beta": "bias"})


def without_greek(tensors: Mapping[str, LazyTensor], expected: Collection[str]) -> Mapping[str, LazyTensor]:
    """`tensors` with the weights and biases of norms under the names `expected`, which files that came from
    TensorFlow call gamma and beta."""

    def today(name: str) -> str:
        module, _, kind = name.rpartition(".")
        renamed = f"{module}.{_GREEK.get(kind, kind)}"
        return renamed if name not in expected and renamed in expected else name

    return {today(name): tensor for name, tensor in tensors.items()}


def _disk_shapes(pieces: Iterable[Piece], params: Mapping[str, torch.Size]) -> dict[str, tuple[int, ...]]:
    """The shape each disk tensor should have."""
    shapes: dict[str, tuple[int, ...]] = {}
    entries: dict[str, int] = {}
    flipped: set[str] = set()
    for piece in pieces:
        own = tuple(params[piece.param])[piece.index is not None :]
        rows = max(shapes.get(piece.disk, (0,))[0], piece.disk_stop) if own else 0
        shapes[piece.disk] = (rows, *own[1:]) if own else ()
        if piece.transposed:
            flipped.add(piece.disk)
        if piece.entry is not None:
            entries[piece.disk] = max(entries.get(piece.disk, 0), piece.entry + 1)
    shapes.update({name: shapes[name][::-1] for name in flipped})
    return {name: (entries[name], *shape) if name in entries else shape for name, shape in shapes.items()}


@dataclass(frozen=True)
class Report:
    """What a load found beside what it filled: parameters that the checkpoint lacks (`fresh`, by their own
    names, to be initialised), and tensors that no parameter is for (`left_out`, a head's)."""

    fresh: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Leeway:
    """Where checkpoint and model may differ: modules or parameters that a checkpoint may lack (`fresh`, by
    our names; also those of another shape, if `reshape`), and tensors that a model may (`spare`; `*` is a
    wildcard)."""

    fresh: tuple[str, ...] = ()
    reshape: bool = False
    spare: tuple[str, ...] = ()

    def may_lack(self, param: str) -> bool:
        return any(param == name or param.startswith(f"{name}.") for name in self.fresh)


def check(
    pieces: Sequence[Piece],
    params: Mapping[str, torch.Size],
    tensors: Mapping[str, LazyTensor],
    ignored: Sequence[str] = (),
    leeway: Leeway = Leeway(),
) -> Report:
    """Match checkpoint tensors and parameters one to one, or raise one `WeightsError` with everything that
    is missing, unexpected or misshapen. `ignored` are name patterns (`*` as wildcard) a file may hold."""
    expected = _disk_shapes(pieces, params)
    owner = {piece.disk: piece.param for piece in pieces}
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected and not _matches(name, ignored)]
    misshapen = [
        name for name, shape in expected.items() if name in tensors and tuple(tensors[name].shape) != shape
    ]
    lacking = missing + misshapen if leeway.reshape else missing
    fresh = tuple(dict.fromkeys(owner[name] for name in lacking if leeway.may_lack(owner[name])))
    left_out = tuple(name for name in unexpected if _matches(name, leeway.spare))
    missing = [name for name in missing if owner[name] not in fresh]
    misshapen = [name for name in misshapen if owner[name] not in fresh]
    unexpected = [name for name in unexpected if name not in left_out]
    count = len(missing) + len(unexpected) + len(misshapen)
    if count:
        # Only what is shown looks for its nearest names: of thousands of experts that takes minutes.
        shown = [f"missing: {n} {list(expected[n])}{nearest(n, unexpected)}" for n in missing[:40]]
        others = unexpected[: 40 - len(shown)]
        shown += [f"unexpected: {n} {list(tensors[n].shape)}{nearest(n, missing)}" for n in others]
        for name in misshapen[: 40 - len(shown)]:
            anew = "; ignore_mismatched_sizes=True makes it anew" if leeway.may_lack(owner[name]) else ""
            shown.append(
                f"wrong shape: {name}: the file has {list(tensors[name].shape)}, the config asks for "
                f"{list(expected[name])}{anew}"
            )
        more = [f"... and {count - 40} more"] if count > 40 else []
        raise WeightsError(
            f"the checkpoint does not fit the model ({len(missing)} missing, {len(unexpected)} unexpected, "
            f"{len(misshapen)} of another shape); is config.json the one of these weights?\n  "
            + "\n  ".join(shown + more)
        )
    return Report(fresh, left_out)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


# A slice is at most this many bytes as read, so that loading needs the model and little more.
_SLICE_BYTES = 2 << 20
_SLICE_BYTES_AHEAD = 32 << 20  # of the device's memory, where it is read ahead


def load(
    model: nn.Module,
    tensors: Mapping[str, LazyTensor],
    rules: Sequence[Rule] = (),
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    ignored: Sequence[str] = (),
    leeway: Leeway = Leeway(),
    packers: Mapping[str, Packer] = MappingProxyType({}),
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Fill a model built on the meta device, in `dtype` on `device`, one slice at a time; for a GPU, threads
    read ahead what lies in files as it is.

    `packers` names the checkpoint's matrices (or stacks of experts' matrices) that are to be held packed,
    and how; each becomes so, and those of one weight are joined, before the next is read. All or nothing:
    names and shapes are checked before anything is allocated, and parameters replace the meta ones only once
    every slice has been read. Peak memory is the model, one slice, and of a packed one what packing a matrix
    and joining the matrices of a weight take; reading ahead takes 128 MB of the host. `progress(done, total)`
    is called with bytes of the finished model. What the report calls fresh is allocated, and left to the
    caller to initialise.
    """
    device, shapes = torch.device(device), _shapes(model)
    # A stored packed matrix is upright whatever way its dense one would lie.
    upright = {name for name, packer in packers.items() if isinstance(packer, AsStored)}
    pieces = [replace(p, transposed=p.transposed and p.disk not in upright) for p in layout(model, rules)]
    report = check(pieces, shapes, tensors, ignored, leeway)
    pieces = [piece for piece in pieces if piece.param not in report.fresh]
    runs = _runs(pieces, _matrix_pieces(model, pieces), packers)
    dense_pieces = [piece for piece in pieces if piece.param not in runs]

    def size(disk: str, rows: int, param: str) -> int:
        whole = (rows, shapes[param][-1])
        return packers[disk].nbytes(whole) if disk in packers else torch.Size(whole).numel() * dtype.itemsize

    sizes = {
        name: [size(run[0].disk, sum(p.rows for p in run), name) for run in found]
        for name, found in runs.items()
    }
    total = sum(map(sum, sizes.values()))
    total += (
        sum(s.numel() for n, s in shapes.items() if n not in runs and n not in report.fresh) * dtype.itemsize
    )
    done = 0

    def loaded(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(done, total)

    in_order = [*dense_pieces, *(p for found in runs.values() for run in found for p in run)]
    params = dict(model.named_parameters())
    packed: dict[str, Packed | PackedExperts] = {}
    with _Reads(in_order, {**tensors, **{n: tensors[n].codes for n in upright}}, upright, device) as reads:
        filled = {n: torch.empty(s, dtype=dtype, device=device) for n, s in shapes.items() if n not in runs}
        for piece in dense_pieces:
            target = piece.view(filled[piece.param])
            reads.fill(target, piece)
            loaded(target.numel() * dtype.itemsize)
        for name, found in runs.items():
            units = []
            for run, count in zip(found, sizes[name], strict=True):
                source, packer = tensors[run[0].disk], packers.get(run[0].disk)
                units.append(_pack(run, source, packer, shapes[name][-1], dtype, reads))
                loaded(count)
            # Joined here, so that the next matrices take the memory of these.
            packed[name] = model.get_submodule(name.removesuffix(".weight")).joined(units)
    if device.type == "cuda":  # whichever stream or thread the model runs in next
        torch.cuda.current_stream(device).synchronize()
    for name, tensor in filled.items():
        path, _, kind = name.rpartition(".")
        setattr(
            model.get_submodule(path), kind, nn.Parameter(tensor, requires_grad=params[name].requires_grad)
        )
    for name, held in packed.items():
        model.get_submodule(name.removesuffix(".weight")).hold(held)
    return report


class _Reads:
    """What a load reads, in the order of `pieces`: on the device where it is read ahead, otherwise where the
    source gives it. What is asked for again at once, as a stack's entry is for each part, is read once; so is
    each tensor of `whole`, for all its pieces."""

    def __init__(
        self,
        pieces: Iterable[Piece],
        tensors: Mapping[str, LazyTensor],
        whole: Collection[str],
        device: torch.device,
    ):
        self.device, self._tensors, self._whole = device, tensors, whole
        target = target_of(device)
        self._slice_bytes = _SLICE_BYTES if target is None else _SLICE_BYTES_AHEAD
        asked = groupby((piece.disk, *rows) for piece in pieces for rows in self._rows(piece))
        self._asked = deque((ask, 1 if ask[0] in whole else len(list(times))) for ask, times in asked)
        self._kept: Tensor | None = None
        self._ahead: ReadAhead | None = None
        if target is not None:
            parts = (part for (n, *at), _ in self._asked for part in _parts(tensors[n], *at))
            spans = (span_of(*part) for part in parts)
            self._ahead = ReadAhead([span for span in spans if span is not None], target)

    def __enter__(self) -> _Reads:
        return self

    def __exit__(self, *error: object) -> None:
        if self._ahead is not None:
            self._ahead.close()

    def fill(self, target: Tensor, piece: Piece) -> None:
        """Copy a piece's rows into `target`, a slice at a time."""
        for start, stop in self._rows(piece):
            rows = self._read(piece.disk, start, stop)
            if piece.entry is not None:
                target.copy_(piece.place(rows[0]))
            elif piece.transposed or not target.dim():
                target.copy_(piece.place(rows))
            else:
                target[start - piece.disk_start : stop - piece.disk_start].copy_(rows)
            del rows  # before the next are read

    def whole(self, name: str) -> Tensor:
        """One of the tensors that are read whole, as it is."""
        return self._read(name, 0, self._tensors[name].shape[0])

    def _read(self, name: str, start: int, stop: int) -> Tensor:
        asked, times = self._asked.popleft()
        if asked != (name, start, stop):
            raise RuntimeError(f"{name}[{start}:{stop}] is asked for, but {asked} was to be next")
        found = self._source(self._tensors[name], start, stop) if self._kept is None else self._kept
        self._kept = None
        if times > 1:
            self._asked.appendleft((asked, times - 1))
            self._kept = found
        return found

    def _source(self, source: LazyTensor, start: int, stop: int) -> Tensor:
        if isinstance(source, Mxfp4Experts):
            parts = (self._source(*part).to(self.device) for part in _parts(source, start, stop))
            return source.values(*parts)
        if self._ahead is None or (span := span_of(source, start, stop)) is None:
            return source.read(start, stop)
        raw = self._ahead.read(span).view(source.dtype)
        return raw.view(stop - start, *source.shape[1:]) if source.shape else raw.view(())

    def _rows(self, piece: Piece) -> Iterator[tuple[int, int]]:
        """The rows of the disk tensor that are read for a piece."""
        source = self._tensors[piece.disk]
        if piece.entry is not None:
            yield piece.entry, piece.entry + 1
        elif piece.transposed or not source.shape or piece.disk in self._whole:
            yield 0, source.shape[0] if source.shape else 1
        else:
            row_bytes = max(1, source.dtype.itemsize * torch.Size(source.shape[1:]).numel())
            step = max(1, self._slice_bytes // row_bytes)
            for start in range(piece.disk_start, piece.disk_stop, step):
                yield start, min(piece.disk_stop, start + step)


def _parts(source: LazyTensor, start: int, stop: int) -> list[tuple[LazyTensor, int, int]]:
    """The tensors of files, and the rows of each, that rows of `source` are made of."""
    if isinstance(source, Mxfp4Experts):
        return [(part, start, stop) for part in (source.blocks, source.scales)]
    return [(source, start, stop)]


def _pack(
    run: list[Piece],
    source: LazyTensor,
    packer: Packer | None,
    inputs: int,
    dtype: torch.dtype,
    reads: _Reads,
) -> Packed:
    """The matrix of one run of pieces, as its packer makes it from the file's order, or dense where it has
    none. What a file stacks is packed part by part, since no other reader knows it packed."""
    rows = sum(p.rows for p in run)
    stacked = run[0].entry is not None
    order = torch.empty(rows, dtype=torch.int64)  # of each row of ours, its place in the file
    for piece in run:
        order[piece.start - run[0].start :][: piece.rows] = torch.arange(piece.rows) + piece.disk_start
    order -= order.min()

    def read() -> Tensor:
        whole = torch.empty(rows, inputs, dtype=dtype, device=reads.device)
        first = min(p.disk_start for p in run)
        for piece in run:
            at = 0 if stacked else piece.disk_start - first
            reads.fill(whole[at:][: piece.rows], piece)
        return whole

    if isinstance(source, StoredMatrix) and packer is not None:
        read = partial(reads.whole, run[0].disk)
    packed = Dense(read()) if packer is None else packer(source, read, reads.device)
    in_order = bool((order.diff() > 0).all())
    return packed if in_order else Reordered(packed, order.to(reads.device))


def linears(model: nn.Module, rules: Sequence[Rule] = ()) -> list[str]:
    """Names that checkpoints give to the matrices of every `Linear` and `ExpertLinear`, in the model's
    order."""
    return _disk_names(model, rules, Linear | ExpertLinear)


def embeddings(model: nn.Module, rules: Sequence[Rule] = ()) -> list[str]:
    """Names that checkpoints give to the matrices of every `Embedding`."""
    return _disk_names(model, rules, Embedding)


def _disk_names(model: nn.Module, rules: Sequence[Rule], kinds: Any) -> list[str]:
    found = _matrix_pieces(model, layout(model, rules), kinds)
    return list(dict.fromkeys(piece.disk for pieces in found.values() for piece in pieces))


def _matrix_pieces(
    model: nn.Module, pieces: Sequence[Piece], kinds: Any = PACKABLE
) -> dict[str, list[Piece]]:
    """The pieces of the weight of each module of these kinds, from its first row to its last."""
    names = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, kinds)}
    found: dict[str, list[Piece]] = {}
    for piece in pieces:
        if piece.param in names:
            found.setdefault(piece.param, []).append(piece)
    return {name: sorted(own, key=lambda p: (p.index or 0, p.start)) for name, own in found.items()}


def _runs(
    pieces: Sequence[Piece], linear: Mapping[str, list[Piece]], packers: Collection[str]
) -> dict[str, list[list[Piece]]]:
    """For each weight that has a packed matrix: its pieces, those of one disk tensor together.

    A format packs a disk tensor as a whole, so it must lie in one weight; but a part of an expert by itself
    where the disk tensor stacks experts.
    """
    rows: dict[str, int] = {}
    for piece in pieces:
        rows[piece.disk] = rows.get(piece.disk, 0) + piece.rows
    out = {}
    for name, own in linear.items():
        if not any(piece.disk in packers for piece in own):
            continue
        runs: list[list[Piece]] = []
        for piece in own:
            if piece.entry is None and runs and runs[-1][0].disk == piece.disk:
                runs[-1].append(piece)
            else:
                runs.append([piece])
        for run in runs:
            whole = sum(piece.rows for piece in run) == rows[run[0].disk]
            if run[0].disk in packers and run[0].entry is None and not whole:
                raise WeightsError(
                    f"{run[0].disk} can't be packed: the model keeps its rows in more than one place "
                    f"({name}); name the module in llm_int8_skip_modules to leave it in 16 bit"
                )
        out[name] = runs
    return out


def store(model: nn.Module, rules: Sequence[Rule] = ()) -> list[Deferred]:
    """The tensors of `model` under their canonical names, in the model's order; the reverse of `load`. A
    packed matrix gives the tensors its format has on disk."""
    params, shapes = dict(model.named_parameters()), _shapes(model)
    dtype = next((p.dtype for p in params.values() if p.is_floating_point()), torch.float32)
    pieces = layout(model, rules)
    disk_shapes = _disk_shapes(pieces, shapes)
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.disk, []).append(piece)
    packed = units(model, pieces)

    def assemble(name: str, group: list[Piece]) -> Tensor:
        parts = [p.view(params[p.param].detach()) for p in group]
        if len(parts) == 1 and group[0].entry is None:
            return _flipped(parts[0].cpu(), group[0].transposed)
        whole = torch.empty(disk_shapes[name], dtype=parts[0].dtype)
        for piece, part in zip(group, parts, strict=True):
            piece.place(whole if piece.entry is None else whole[piece.entry]).copy_(part)
        return whole

    out = []
    for name, group in groups.items():
        shape, unit = disk_shapes[name], packed.get(name)
        if unit is None:
            make = lambda name=name, group=group: assemble(name, group)  # noqa: E731
            out.append(Deferred(name, shape, params[group[0].param].dtype, make))
        elif unit.dense_on_disk:
            flip = group[0].transposed
            make = lambda unit=unit, flip=flip: _flipped(unit.dequantize(dtype).cpu(), flip)  # noqa: E731
            out.append(Deferred(name, shape, dtype, make))
        else:
            module = name.removesuffix(".weight")
            for suffix, tensor in unit.stored(dtype).items():
                make = lambda tensor=tensor: tensor.cpu().contiguous()  # noqa: E731
                out.append(Deferred(f"{module}.{suffix}", tuple(tensor.shape), tensor.dtype, make))
    return out


def _flipped(whole: Tensor, flip: bool) -> Tensor:
    return (whole.T if flip else whole).contiguous()


def units(model: nn.Module, pieces: Sequence[Piece]) -> dict[str, Packed]:
    """The matrices that a model holds packed, by their disk names; not those that lie in a stack on disk,
    which has no name for each."""
    found = {}
    for name, own in _matrix_pieces(model, pieces).items():
        packed = model.get_submodule(name.removesuffix(".weight")).packed
        if packed is not None and own[0].entry is None:
            names = dict.fromkeys(piece.disk for piece in own)
            found.update(zip(names, packed.units(), strict=True))
    return found


def fitting(model: nn.Module, layouts: Sequence[Sequence[Rule]], tensors: Collection[str]) -> Sequence[Rule]:
    """Of the layouts that a family's files may have, the one whose names `tensors` lacks the fewest of, the
    first of equals."""
    if len(layouts) == 1:
        return layouts[0]
    return min(layouts, key=lambda rules: len({p.disk for p in layout(model, rules)}.difference(tensors)))


def storable(model: nn.Module, layouts: Sequence[Sequence[Rule]]) -> Sequence[Rule]:
    """The first of the layouts that has a name for each matrix that the model holds packed."""
    experts = {f"{path}.weight": m for path, m in model.named_modules() if isinstance(m, ExpertLinear)}
    packed = {name for name, module in experts.items() if module.packed is not None}

    def names_all(rules: Sequence[Rule]) -> bool:
        return not any(p.param in packed and p.entry is not None for p in layout(model, rules))

    return next(rules for rules in layouts if not packed or names_all(rules))
