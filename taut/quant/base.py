"""`Packed`: what every format gives `Linear` in place of a dense weight; and the kinds that hold others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taut.kernels import gemv_llvm, packed_llvm
from taut.kernels.dispatch import ops
from taut.kernels.packed import Codes


class Packed(nn.Module):
    """A weight `[out_features, in_features]` in some small format, or several stacked along the output.

    The buffers are the format's own, each with `sizes[unit]` entries a unit along dimension 0; a unit is one
    matrix of the checkpoint. Moving the module moves buffers and never changes their dtypes: a product comes
    in its input's dtype, and is computed in `compute` if that is set.
    """

    kind = "packed"
    dense_on_disk = False  # whether saving keeps the values, since files have no name for the format

    def __init__(self, rows: int, in_features: int, buffers: dict[str, Tensor]):
        super().__init__()
        self.rows: tuple[int, ...] = (rows,)
        self.in_features = in_features
        self.compute: torch.dtype | None = None
        self.sizes: dict[str, tuple[int, ...]] = {}
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)
            self.sizes[name] = (tensor.shape[0],)

    @property
    def out_features(self) -> int:
        return sum(self.rows)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    # Each format says these.

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The values, `[out_features, in_features]`."""
        raise NotImplementedError

    def stored(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors of a single unit on disk, by what follows the module's name (`weight`, `weight.absmax`
        ...). `dtype` is the model's."""
        raise NotImplementedError

    def joins(self, other: Packed) -> bool:
        """Whether `other` can be stacked under this one in the same buffers."""
        return False

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x W^T + bias` for `x` `[tokens, in_features]`, without gradients."""
        return F.linear(x, self.dequantize(x.dtype), bias)

    def fused(
        self, x: Tensor, bias: Tensor | None, act: str | None, residual: Tensor | None
    ) -> Tensor | None:
        """`residual + glu(x W^T + bias)` as `forward` gives it, by a kernel for GPUs that does it all,
        without gradients; None where there is none for this input."""
        return None

    def lanes(self) -> tuple[gemv_llvm.Format, tuple[Tensor | None, ...]] | None:
        """How kernels for the CPU read the weight, and the tensors that they read; None for a format that
        they don't know."""
        return None

    def kernel_codes(self) -> Codes | None:
        """The codes as kernels take them, None for a format that has no kernel."""
        return None

    def runs_on(self, x: Tensor) -> str:
        """What computes the product of an input like `x`, for people to read."""
        why = self.streams(x)
        return f"{self.kind}: {'few-row kernel' if why is None else f'unpacked, then dense ({why})'}"

    # The rest follows from them.

    def streams(self, x: Tensor) -> str | None:
        """Why `forward` of an input like `x` can't be a single kernel of the CPU's, or None."""
        found = self.lanes()
        if found is None:
            return f"no kernel for the CPU reads {self.kind}"
        if self.compute not in (None, x.dtype):
            return f"the weight is to be multiplied in {self.compute}"
        if torch.is_grad_enabled():
            return "the kernel has no gradients"
        return gemv_llvm.refuses(x, found[0])

    def unpacked(self, dtype: torch.dtype, rows: Tensor | None = None) -> Tensor | None:
        """The values by a kernel of the CPU's, those of all rows or of some, None where there is none."""
        found = self.lanes()
        if found is None or packed_llvm.refuses(*found, self.in_features, dtype) is not None:
            return None
        return packed_llvm.unpack(*found, (self.out_features, self.in_features), dtype, rows)

    def rows_at(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The values of rows by their index, int64 `[n]`: `[n, in_features]`."""
        values = self.unpacked(dtype, index)
        return self.dequantize(dtype)[index] if values is None else values

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        act: str | None = None,
        residual: Tensor | None = None,
        norm: Mapping[str, Any] | None = None,
        pointwise: str | None = None,
    ) -> Tensor:
        """`residual + glu(norm(x) W^T + bias)`, `[..., in_features] -> [..., out_features]` (half as many
        with `act`), each part only where given; gradients flow to `x`, `bias` and `residual`. Only where
        `streams` has no objection: `norm`, the arguments of an RMSNorm, and `pointwise`, an activation."""
        dtype = x.dtype
        if x.ndim == 2 and self.streams(x) is None:
            weight, tensors = self.lanes()
            around = {"bias": bias, "act": act, "pointwise": pointwise, "residual": residual, **(norm or {})}
            return gemv_llvm.run(x, weight, tensors, self.out_features, **around)
        flat = x.reshape(-1, self.in_features)
        compute = self.compute or dtype
        grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, residual))
        if not grad and compute is dtype:
            rest = None if residual is None else residual.reshape(flat.shape[0], -1)
            y = self.fused(flat, bias, act, rest)
            if y is not None:
                return y.view(*x.shape[:-1], y.shape[-1])
        if compute is not dtype:
            flat, bias = flat.to(compute), None if bias is None else bias.to(compute)
        y = _Product.apply(flat, bias, self) if grad else self.product(flat, bias)
        y = y.to(dtype)
        if act is not None:
            y = ops("act", y).glu(y, act)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if residual is None else residual + y

    def input_gradient(self, grad: Tensor) -> Tensor:
        """`grad W` for `grad` `[tokens, out_features]`."""
        return grad @ self.dequantize(grad.dtype)

    def units(self) -> list[Packed]:
        """The matrices that were joined, as modules over views of the buffers."""
        return [self] if len(self.rows) == 1 else self.split(1)

    def split(self, count: int) -> list[Packed]:
        """The matrices that were joined, `count` at a time, as modules over views of the buffers."""
        groups = range(0, len(self.rows), count)
        sizes = {name: [own[i : i + count] for i in groups] for name, own in self.sizes.items()}
        pieces = {name: getattr(self, name).split([sum(s) for s in own]) for name, own in sizes.items()}
        parts = []
        for at, first in enumerate(groups):
            part = self._like(self.rows[first : first + count], {n: p[at] for n, p in pieces.items()})
            part.sizes = {name: own[at] for name, own in sizes.items()}
            parts.append(part)
        return parts

    def _like(self, rows: Sequence[int], buffers: dict[str, Tensor]) -> Packed:
        """A module of the same format and settings over other buffers."""
        new = self.__class__.__new__(self.__class__)
        nn.Module.__init__(new)
        new.__dict__.update({k: v for k, v in self.__dict__.items() if k not in nn.Module().__dict__})
        new.rows, new.sizes = tuple(rows), {}
        for name, tensor in buffers.items():
            new.register_buffer(name, tensor)
            new.sizes[name] = (tensor.shape[0],)
        return new

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype is tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.in_features}, {self.out_features}, {self.nbytes} bytes"


class Dense(Packed):
    """A matrix that stays as it is, beside packed ones in the same fused weight."""

    kind = "dense"
    dense_on_disk = True

    def __init__(self, weight: Tensor):
        super().__init__(weight.shape[0], weight.shape[1], {"weight": weight})

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)

    def joins(self, other: Packed) -> bool:
        return isinstance(other, Dense) and other.weight.dtype is self.weight.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        return nn.Module._apply(self, fn, recurse)  # follows the model's dtype, as a parameter would


class Stack(Packed):
    """Matrices stacked along the output that don't join: other formats, or blocks that end between them."""

    kind = "stack"

    def __init__(self, parts: Sequence[Packed]):
        super().__init__(0, parts[0].in_features, {})
        self.rows = tuple(part.out_features for part in parts)
        self.parts = nn.ModuleList(parts)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([part.dequantize(dtype) for part in self.parts])

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        pieces = [None] * len(self.rows) if bias is None else bias.split(self.rows)
        return torch.cat([part(x, b) for part, b in zip(self.parts, pieces, strict=True)], -1)

    def input_gradient(self, grad: Tensor) -> Tensor:
        pieces = zip(self.parts, grad.split(self.rows, -1), strict=True)
        return sum(part.input_gradient(piece) for part, piece in pieces)

    def runs_on(self, x: Tensor) -> str:
        return "; ".join(dict.fromkeys(part.runs_on(x) for part in self.parts))

    def units(self) -> list[Packed]:
        return [unit for part in self.parts for unit in part.units()]


class Reordered(Stack):
    """A matrix in the order that its file has, whose outputs the model takes in another: output i is row
    `order[i]`, int64 `[out_features]`."""

    kind = "reordered"

    def __init__(self, whole: Packed, order: Tensor):
        super().__init__([whole])
        self.compute = whole.compute
        self.register_buffer("order", order)
        self.register_buffer("inverse", order.argsort())

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return super().dequantize(dtype)[self.order]

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = super().product(x, None).index_select(-1, self.order)
        return y if bias is None else y + bias

    def input_gradient(self, grad: Tensor) -> Tensor:
        return super().input_gradient(grad.index_select(-1, self.inverse))


def join(units: Sequence[Packed]) -> Packed:
    """One module for matrices stacked along the output, in as few buffers as their formats allow."""
    groups: list[list[Packed]] = []
    for unit in units:
        if groups and groups[-1][0].joins(unit):
            groups[-1].append(unit)
        else:
            groups.append([unit])
    parts = [_cat(group) for group in groups]
    if len(parts) == 1:
        return parts[0]
    stack = Stack(parts)
    stack.compute = parts[0].compute
    return stack


def _cat(group: list[Packed]) -> Packed:
    if len(group) == 1:
        return group[0]
    first = group[0]
    buffers = {name: torch.cat([getattr(unit, name) for unit in group]) for name in first.sizes}
    whole = first._like([unit.out_features for unit in group], buffers)
    whole.sizes = {name: tuple(getattr(unit, name).shape[0] for unit in group) for name in first.sizes}
    return whole


class _Product(torch.autograd.Function):
    """A product whose backward unpacks the weight again, so that no dense copy outlives the forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, packed: Packed) -> Tensor:
        ctx.packed, ctx.biased = packed, bias is not None
        return packed.product(x, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        to_x = ctx.packed.input_gradient(grad) if ctx.needs_input_grad[0] else None
        to_bias = grad.sum(0) if ctx.biased and ctx.needs_input_grad[1] else None
        return to_x, to_bias, None
