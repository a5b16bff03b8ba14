"""`Siblings`: the matrices of a fused `Linear` as modules of their own, under the names that files have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from taut.layers.linear import Linear
from taut.layers.norm import Norm


class Siblings:
    """What a module calls in the place of a fused `Linear` once its parts are the module's own children. Not
    a module itself: the children, and so their parameters, lie where files have them."""

    def __init__(self, parts: Mapping[str, Linear]):
        self.parts = dict(parts)

    def __call__(
        self,
        x: Tensor,
        *,
        norm: Norm | None = None,
        act: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """As `Linear.forward`, by a product for each part."""
        x = x if norm is None else norm(x)
        return Linear.after(torch.cat([part(x) for part in self.parts.values()], -1), act, residual)


def separate(model: nn.Module) -> None:
    """Take every fused `Linear` apart: its parts become children of the module that holds it, in its place,
    over the same memory."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear) and child.parts:
                parts = _parts(child)
                _replace(parent, (name,), parts)
                parent.__dict__[name] = Siblings(parts)


def rejoin(model: nn.Module) -> None:
    """Undo `separate`."""
    for parent in list(model.modules()):
        for name, value in list(parent.__dict__.items()):
            if isinstance(value, Siblings):
                del parent.__dict__[name]
                _replace(parent, tuple(value.parts), {name: _fused(value.parts)})


def _replace(parent: nn.Module, old: Sequence[str], new: Mapping[str, nn.Module]) -> None:
    """Put children in the place of others, so that the order of parameters stays that of the file."""
    children, parent._modules = parent._modules, {}
    for name, child in children.items():
        if name == old[0]:
            parent._modules.update(new)
        if name not in old:
            parent._modules[name] = child


def _parts(fused: Linear) -> dict[str, Linear]:
    units = iter(() if fused.packed is None else fused.packed.units())
    biases, parts, start = fused.biases(), {}, 0
    for name, rows in fused.parts.items():
        with torch.device("meta"):
            part = Linear(fused.in_features, rows)
        if fused.packed is None:
            part.weight = _rows(fused.weight, start, rows)
        else:
            part.pack(_covering(units, rows))
        part.bias = None if name not in biases else _rows(fused.bias, biases[name], rows)
        parts[name] = part.train(fused.training)
        start += rows
    return parts


def _covering(units, rows: int) -> list:
    """The next units, as many as have so many rows."""
    found = []
    while sum(unit.out_features for unit in found) < rows:
        found.append(next(units))
    return found


def _fused(parts: Mapping[str, Linear]) -> Linear:
    own = list(parts.values())
    biased = [name for name, part in parts.items() if part.bias is not None]
    with torch.device("meta"):
        sizes = {name: part.out_features for name, part in parts.items()}
        some = biased if 0 < len(biased) < len(parts) else bool(biased)
        fused = Linear(own[0].in_features, sizes, bias=some)
    if own[0].packed is None:
        fused.weight = _joined([part.weight for part in own])
    else:
        fused.pack([unit for part in own for unit in part.packed.units()])
    fused.bias = _joined([parts[name].bias for name in biased]) if biased else None
    return fused.train(own[0].training)


def _rows(param: nn.Parameter, start: int, count: int) -> nn.Parameter:
    """Some rows of a parameter, and of its gradient, as a parameter over the same memory."""
    own = nn.Parameter(param.data[start : start + count], requires_grad=param.requires_grad)
    if param.grad is not None:
        own.grad = param.grad[start : start + count]
    return own


def _joined(params: Sequence[nn.Parameter]) -> nn.Parameter:
    """Parameters one below the other; over the same memory if they lie there so already."""
    whole = nn.Parameter(_one([p.data for p in params]), requires_grad=params[0].requires_grad)
    if all(p.grad is not None for p in params):
        whole.grad = _one([p.grad for p in params])
    return whole


def _one(pieces: Sequence[Tensor]) -> Tensor:
    at, first = pieces[0].data_ptr(), pieces[0]
    for piece in pieces:
        if piece.data_ptr() != at or not piece.is_contiguous():
            return torch.cat(list(pieces))
        at += piece.nbytes
    inside = first.untyped_storage().data_ptr() + first.untyped_storage().nbytes()
    if at > inside:
        return torch.cat(list(pieces))
    rows = sum(len(piece) for piece in pieces)
    return first.as_strided((rows, *first.shape[1:]), first.stride())
