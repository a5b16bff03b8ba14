"""`Linear`: a projection that may own several checkpoint matrices as one fused weight."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from taut.kernels import cublas, onednn
from taut.kernels.act import ACTIVATIONS
from taut.kernels.dispatch import ops
from taut.kernels.gemv import fuses, gemv
from taut.kernels.linear import linear
from taut.layers.norm import Norm
from taut.quant.base import Packed, join


class Linear(nn.Module):
    """`y = x W^T + b`, `[tokens, in_features] -> [tokens, out_features]`.

    `parts` names the checkpoint matrices stacked along the output, with their sizes, in order: the q, k
    and v projections are one product, and files still hold three matrices. Without parts, the module is
    the one matrix. `bias`: whether it has one, or the parts that have. The weight is dense, or, after `pack`,
    in a small format that multiplies by itself.
    """

    def __init__(
        self,
        in_features: int,
        out: int | Mapping[str, int],
        *,
        bias: bool | Collection[str] = False,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.parts = dict(out) if isinstance(out, Mapping) else None
        self.in_features = in_features
        self.out_features = out if isinstance(out, int) else sum(out.values())
        self.weight = nn.Parameter(torch.empty(self.out_features, in_features, dtype=dtype))
        self.biased = None if isinstance(bias, bool) else frozenset(bias)
        width = self.out_features
        if self.biased is not None:
            width = sum(rows for part, rows in self.parts.items() if part in self.biased)
        self.bias = nn.Parameter(torch.empty(width, dtype=dtype)) if bias else None
        self.packed: Packed | None = None

    def forward(
        self,
        x: Tensor,
        *,
        norm: Norm | None = None,
        act: str | None = None,
        residual: Tensor | None = None,
        pointwise: str | None = None,
    ) -> Tensor:
        """`residual + glu(norm(x) W^T + b)`, or `pointwise(norm(x) W^T + b)`, each part only where given:
        what stands around a product in a block is part of the call, since one kernel may do it all.
        `residual`, and an x with a norm, may be of a wider dtype than the weight; the sum then is too."""
        if pointwise is not None and not self._takes(x, pointwise):
            return ACTIVATIONS[pointwise](self(x, norm=norm))
        if norm is not None and x.dtype is not norm.weight.dtype:
            x, norm = norm(x), None
        if residual is not None and residual.dtype is not x.dtype:
            return residual + self(x, norm=norm, act=act)
        bias = self.bias if self.biased is None else self._spread()
        if self.packed is not None:
            before = None
            if norm is not None and norm.config.kind == "rms" and self.packed.streams(x) is None:
                before = norm.arguments()
            elif norm is not None:
                x = norm(x)
            return self.packed(x, bias, act, residual, before, pointwise)
        if fuses(x, self.weight):
            before = {}
            if norm is not None and norm.config.kind == "rms":
                before = norm.arguments()
            elif norm is not None:
                x = norm(x)
            return gemv(x, self.weight, bias, act=act, residual=residual, pointwise=pointwise, **before)
        x = x if norm is None else norm(x)
        if cublas.takes(x, self.weight, bias, pointwise):
            return cublas.linear(x, self.weight, bias, pointwise)
        if act is None and onednn.takes(x, self.weight, pointwise, bias, residual):
            return onednn.linear(x, self.weight, bias, pointwise, residual)
        y = linear(x, self.weight, bias)
        if pointwise is not None:  # what takes the product had no gradients, and the norm's weight wants one
            return ACTIVATIONS[pointwise](y)
        return self.after(y, act, residual)

    def _takes(self, x: Tensor, pointwise: str) -> bool:
        """Whether the product of `x` is one that an activation can follow in the same kernel."""
        if self.packed is not None:
            return self.packed.streams(x) is None
        return (
            fuses(x, self.weight)
            or cublas.takes(x, self.weight, self.bias, pointwise)
            or onednn.takes(x, self.weight, pointwise, self.bias)
        )

    def biases(self) -> dict[str, int]:
        """Where in the bias that of each part begins, of the parts that have one."""
        starts, at = {}, 0
        for part, rows in ({} if self.bias is None else self.parts).items():
            if self.biased is None or part in self.biased:
                starts[part] = at
                at += rows
        return starts

    def _spread(self) -> Tensor:
        """The bias of all parts, 0 for those that have none."""
        at, new = self.biases(), self.bias.new_zeros
        own = {part: self.bias[start : start + self.parts[part]] for part, start in at.items()}
        return torch.cat([own[part] if part in own else new(rows) for part, rows in self.parts.items()])

    @staticmethod
    def after(y: Tensor, act: str | None, residual: Tensor | None) -> Tensor:
        if act is not None:
            y = ops("act", y).glu(y, act)
        return y if residual is None else residual + y

    @property
    def shape(self) -> torch.Size:
        """Of the weight, however it is held."""
        return torch.Size((self.out_features, self.in_features))

    def joined(self, units: Sequence[Packed]) -> Packed:
        """These matrices, one below the other, as `hold` takes them."""
        return join(units)

    def hold(self, packed: Packed) -> None:
        """Hold the weight packed, and let go of the dense one."""
        self.weight, self.packed = None, packed.train(self.training)

    def pack(self, units: Sequence[Packed]) -> None:
        """Hold the weight packed, as these matrices one below the other."""
        self.hold(self.joined(units))

    def extra_repr(self) -> str:
        parts = f", parts={dict(self.parts)}" if self.parts else ""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{parts}"
