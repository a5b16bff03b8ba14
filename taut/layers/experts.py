"""`ExpertLinear`: one projection of every expert of a layer, as one stacked weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from taut.kernels.linear import linear
from taut.quant.base import Packed
from taut.quant.experts import PackedExperts

if TYPE_CHECKING:
    from taut.kernels.moe_triton import Matrices


class ExpertLinear(nn.Module):
    """`y = x W_e^T + b_e` of expert e, `[rows, in_features] -> [rows, out_features]`.

    The weight is `[experts, out_features, in_features]`; `parts` as in `Linear`, for each expert. After
    `pack` it is held in a small format. `chosen`: how many experts a token is given to.
    """

    def __init__(
        self,
        experts: int,
        chosen: int,
        in_features: int,
        out: int | Mapping[str, int],
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.parts = dict(out) if isinstance(out, Mapping) else None
        self.experts, self.chosen, self.in_features = experts, chosen, in_features
        self.out_features = out if isinstance(out, int) else sum(out.values())
        self.weight = nn.Parameter(torch.empty(experts, self.out_features, in_features, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(experts, self.out_features, dtype=dtype)) if bias else None
        self.packed: PackedExperts | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the weight, however it is held."""
        return torch.Size((self.experts, self.out_features, self.in_features))

    @property
    def compute(self) -> torch.dtype | None:
        """The dtype that packed weights are multiplied in, None for their input's."""
        return None if self.packed is None else self.packed.whole.compute

    def matrices(self, dtype: torch.dtype) -> Matrices:
        """The projection as Triton's kernels take it for rows of `dtype`: in its codes where there is a
        kernel for them, otherwise unpacked."""
        from taut.kernels import moe_packed, moe_products

        if self.packed is None:
            return moe_products.DenseMatrices(self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(dtype)
        codes = self.packed.codes()
        if codes is None or moe_packed.refuses(codes, self.in_features, dtype) is not None:
            return moe_products.DenseMatrices(self.packed.dequantize(dtype), bias)
        return moe_packed.PackedMatrices(codes, bias, tuple(self.shape), self.packed.dequantize)

    def products(self) -> Callable[[int, Tensor], Tensor]:
        """The projection as a function of an expert's number and its rows."""
        # Taken apart once a call: a gradient of `weight[e]` would be as large as the whole weight.
        biases = [None] * self.experts if self.bias is None else self.bias.unbind()
        if self.packed is not None:
            packed = self.packed
            return lambda expert, rows: packed.expert(expert)(rows, biases[expert])
        weights = self.weight.unbind()
        return lambda expert, rows: linear(rows, weights[expert], biases[expert])

    def joined(self, units: Sequence[Packed]) -> PackedExperts:
        """These matrices, expert after expert, as `hold` takes them."""
        return PackedExperts(units, self.experts)

    def hold(self, packed: PackedExperts) -> None:
        """Hold the weight packed, and let go of the dense one."""
        self.weight, self.packed = None, packed.train(self.training)

    def pack(self, units: Sequence[Packed]) -> None:
        """Hold the weight packed, as these matrices, expert after expert."""
        self.hold(self.joined(units))

    def extra_repr(self) -> str:
        parts = f", parts={dict(self.parts)}" if self.parts else ""
        shape = f"{self.chosen} of {self.experts} x [{self.in_features}, {self.out_features}]"
        return f"{shape}, bias={self.bias is not None}{parts}"
