"""A mixture of experts on Triton's kernels, forward and backward: nothing in it waits for the device, and no
expert is read that no token has chosen."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from taut.errors import RequestError
from taut.kernels.act import ACTIVATIONS
from taut.kernels.act_triton import glu
from taut.kernels.moe_products import block_of
from taut.kernels.moe_routing import Combine, Plan, arrange, combine, route

__all__ = ["Matrices", "mixture", "route"]


class Matrices(Protocol):
    """The matrices of all experts, `shape` `[experts, outputs, inputs]`, and their biases; `learned`: what of
    that may want gradients."""

    shape: tuple[int, int, int]

    @property
    def learned(self) -> tuple[Tensor | None, ...]: ...

    def product(self, x: Tensor, plan: Plan, gather: int, scatter: bool, **act: str | float | None) -> Tensor:
        """As `moe_products.product`, without gradients."""
        ...

    def differentiable(self, x: Tensor, plan: Plan, gather: int, scatter: bool) -> Tensor:
        """The same with gradients."""
        ...


def mixture(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    gate_up: Matrices,
    down: Matrices,
    act: str,
    limit: float | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`residual` and what `kernels.moe.mixture` gives: `gate_up` are `[experts, 2 * hidden, dim]`, the gate
    half first, and `down` `[experts, dim, hidden]`. Gradients flow to everything but `chosen`; all sums have
    a fixed order, so that equal input gives equal bits."""
    if act not in ACTIVATIONS:
        raise RequestError(f"activation {act!r} is unknown; known: {', '.join(ACTIVATIONS)}")
    experts, count = gate_up.shape[0], chosen.shape[1]
    plan = arrange(chosen, experts, block_of(chosen.numel(), experts, x.dtype))
    given = (x, weights, *gate_up.learned, *down.learned, residual)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        hidden = glu(gate_up.differentiable(x, plan, count, False), act, limit)
        each = down.differentiable(hidden, plan, 0, True)
        return Combine.apply(each.unflatten(0, (-1, count)), weights, residual)
    hidden = gate_up.product(x, plan, count, False, act=act, limit=limit)
    each = down.product(hidden, plan, 0, True)
    return combine(each.unflatten(0, (-1, count)), weights, residual)
