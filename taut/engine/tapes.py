"""`Tapes`: forwards of a few tokens on the CPU, recorded once and played without Python between kernels.

A tape is for so many tokens, rows and cache pages. What a batch holds lies in tensors that the tape reads, so
it serves any batch of its size; kernels that are compiled for the CPU follow one another in one call, and
operations of PyTorch's that stand between them are called as they were recorded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from taut.batch import Batch, PagedKV
from taut.errors import TautError
from taut.kernels.attention import Call, Pages, explain, restrictions
from taut.kernels.dispatch import compiled_refuses
from taut.kernels.threads import Kernel, Tape, recording
from taut.layers.attention import Attention
from taut.layers.moe import MoeMlp

MOST_TOKENS = 32
MOST_TAPES = 32
LEAST_PAGES = 32


class Unrecordable(TautError):
    """Something in a forward depends on values that only a run has."""


def refuses(model: nn.Module) -> str | None:
    """Why forwards of a few tokens with a cache can't be tapes, or None."""
    if not isinstance(model, nn.Module):
        return "it is no module of PyTorch's"
    dtype, device = model.dtype, torch.device(model.device)
    if (why := compiled_refuses(torch.empty(0, dtype=dtype, device=device))) is not None:
        return why
    for part in model.decoder.modules():
        if isinstance(part, MoeMlp):
            return "which experts a token is given to decides what runs"
        if isinstance(part, Attention):
            c = part.config
            q = torch.empty(1, c.heads, c.head_dim, dtype=dtype, device=device)
            keys, row = q.new_empty(1, 16, c.kv_heads, c.head_dim), torch.zeros(1, dtype=torch.int32)
            with torch.inference_mode():
                offers = explain(Call(q, 1, 1, part.scoring, Pages(keys, keys, row[None], row, 1)), part.only)
            chosen = next((name for name, why in offers if why is None), "nothing")
            if chosen != "paged":
                reason = next((why for name, why in offers if name == "paged"), None)
                return f"layer {part.index}'s attention runs on {chosen} (paged: {reason})"
    return None


class Tapes:
    """The tapes of something that `model` computes: `compute(batch)`, a tensor.

    They are not used while something watches the model's modules (hooks) or gradients are wanted. A model
    whose modules or tensors are replaced needs new ones, as it needs a new engine (see `Resident`).
    """

    def __init__(self, model: nn.Module, compute: Callable[[Batch], Tensor]):
        self.model, self.compute = model, compute
        modules = model.modules() if isinstance(model, nn.Module) else ()
        self._hooks = [h for m in modules for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._tapes: OrderedDict[tuple[object, ...], _Recorded | None] = OrderedDict()
        self._refused: dict[object, str | None] = {}

    def __call__(self, batch: Batch) -> Tensor:
        """`compute(batch)`; from a tape where there can be one, and then only valid until the next call."""
        key = None if torch.is_grad_enabled() or any(self._hooks) else _size_of(batch)
        tape = None if key is None else self._tape(key, batch)
        return self.compute(batch) if tape is None else tape.run(batch)

    def _tape(self, key: tuple[object, ...], batch: Batch) -> _Recorded | None:
        where = restrictions()
        if where not in self._refused:
            self._refused[where] = refuses(self.model)
        if self._refused[where] is not None:
            return None
        key = (*key, where, torch.get_num_threads())
        if key not in self._tapes:
            if len(self._tapes) >= MOST_TAPES:
                self._tapes.popitem(last=False)
            try:
                self._tapes[key] = _Recorded(self.compute, batch)
            except Unrecordable:
                self._tapes[key] = None
        self._tapes.move_to_end(key)
        return self._tapes[key]


def _size_of(batch: Batch) -> tuple[object, ...] | None:
    """What a tape for this batch is made for; None if it is none for a tape."""
    if batch.kv is None or batch.kv.fresh or not 0 < batch.tokens <= MOST_TOKENS:
        return None
    given: list[object] = []
    for name, value in _parts(batch):
        if isinstance(value, Tensor):
            given.append((name, value.dtype, value.shape[1:]))
        elif isinstance(value, PagedKV):
            given.append((name, _width(value), id(value.keys), value.slots is None))
        elif name != "longest" and value is not None:
            return None
    return batch.tokens, batch.rows, batch.longest, tuple(given)


def _parts(batch: Batch) -> list[tuple[str, Any]]:
    return [(field.name, getattr(batch, field.name)) for field in fields(Batch)]


def _width(kv: PagedKV) -> int:
    """Pages a row that a tape for such a cache has room for."""
    return 1 << max(kv.pages.shape[1] - 1, LEAST_PAGES - 1).bit_length()


class _Input(Tensor):
    """A tensor that may have other values the next time: reading them on the host can't be recorded. So is
    all that is made of it."""

    def tolist(self) -> Any:
        raise Unrecordable("values of the batch are read on the host")

    numpy = item = __bool__ = __int__ = __float__ = __index__ = tolist


class _Recorded:
    """One recorded size."""

    def __init__(self, compute: Callable[[Batch], Tensor], batch: Batch):
        self._inputs: dict[tuple[str, ...], Tensor] = {}
        inside: dict[str, Any] = {}
        for name, value in _parts(batch):
            if isinstance(value, Tensor):
                inside[name] = self._input(torch.empty_like(value), name)
            elif isinstance(value, PagedKV):
                pages = value.pages.new_zeros(batch.rows, _width(value))
                given = {"pages": self._input(pages, name, "pages")}
                for part in ("lengths", "slots"):
                    if (tensor := getattr(value, part)) is not None:
                        given[part] = self._input(torch.empty_like(tensor), name, part)
                longest = pages.shape[1] * value.page_size
                inside[name] = replace(value, longest=longest, first=None, **given)
        self._fill(batch)
        with _Recorder() as recorder, recording(recorder):
            self._out = compute(replace(batch, **inside)).as_subclass(Tensor)
        self._steps = recorder.steps
        self._new = True

    def _input(self, tensor: Tensor, *name: str) -> Tensor:
        """What the tape reads where the batch has `name`; sealed while it is recorded."""
        self._inputs[name] = tensor
        return tensor.as_subclass(_Input)

    def run(self, batch: Batch) -> Tensor:
        """The output for a batch of this size; it stays until the next run."""
        if self._new:  # the recording was a run too
            self._new = False
            return self._out
        self._fill(batch)
        for step in self._steps:
            step()
        return self._out

    def _fill(self, batch: Batch) -> None:
        for name, tensor in self._inputs.items():
            value = batch
            for part in name:
                value = getattr(value, part)
            if name[-1] == "pages":
                tensor = tensor[:, : value.shape[1]]
            tensor.copy_(value)


# Operations whose results are numbers on the host, or have shapes that depend on values.
_HOST = {"_local_scalar_dense", "item", "is_nonzero", "equal"}
_HOST |= {"nonzero", "masked_select", "unique", "_unique2"}
_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class _Recorder(TorchDispatchMode):
    """Takes down what runs: kernels, in one tape as long as nothing comes between them, and PyTorch's
    operations, to be called again and their results put where they were."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Callable[[], None]] = []
        self._tape: Tape | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """What PyTorch asks of modes: True would import its compiler, which takes a second and 120 MB."""
        return False

    def add(self, kernel: Kernel, arguments: Any, values: tuple[Any, ...]) -> None:
        if self._tape is None:
            self._tape = Tape()
            self.steps.append(self._tape.play)
        self._tape.add(kernel, arguments, values)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _plain(args), _plain(kwargs or {})
        name = func.overloadpacket.__name__
        if name in _HOST:
            raise Unrecordable(f"{name} gives the host a value")
        out = func(*args, **kwargs)
        if name in _EMPTY:
            return out
        inputs = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        results = list(_tensors(out))
        changes = func._schema.is_mutable
        if not changes and all(t.untyped_storage().data_ptr() in inputs for t in results):
            return out  # views see what their tensors hold then
        self._tape = None
        if changes:
            self.steps.append(lambda: func(*args, **kwargs))
        elif name == "_to_copy" and len(results) == 1:
            self.steps.append(partial(results[0].copy_, args[0]))
        else:
            self.steps.append(lambda: _again(func, args, kwargs, results))
        return out


def _again(func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
    for before, now in zip(results, _tensors(func(*args, **kwargs)), strict=True):
        before.copy_(now)


def _plain(values: Any) -> Any:
    """Arguments without `_Input` among them, which costs a call more each time."""
    if isinstance(values, Tensor):
        return values.as_subclass(Tensor) if isinstance(values, _Input) else values
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()}
    return type(values)(map(_plain, values)) if isinstance(values, (list, tuple)) else values


def _tensors(values: Any) -> Any:
    """The tensors among arguments or results."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
