"""Mixture of experts: the choice of experts for each token, and their weighted sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from taut.kernels.act import glu
from taut.kernels.gemv import fuses, gemv

Product = Callable[[int, Tensor], Tensor]  # of an expert's number and its rows


def scores_of(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b` `[tokens, experts]` in float32 at least: rounded to 16 bits, experts would tie, and which
    of them a token gets would depend on the tokens beside it."""
    if fuses(x, weight):
        return gemv(x, weight, bias, out_dtype=torch.float32)
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))


def route(scores: Tensor, chosen: int, normalised: bool) -> tuple[Tensor, Tensor]:
    """Weights, in float32 at least, and numbers of the experts with the best of `scores` `[tokens, experts]`,
    both `[tokens, chosen]`: the softmax over all, or, `normalised`, over the chosen alone."""
    shares = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    weights, experts = shares.topk(chosen, -1)
    return weights / weights.sum(-1, keepdim=True) if normalised else weights, experts


def mixture(
    x: Tensor,
    weights: Tensor,
    chosen: Tensor,
    experts: int,
    gate_up: Product,
    down: Product,
    act: str,
    limit: float | None = None,
) -> Tensor:
    """`sum over c of weights[:, c] * down(glu(gate_up(x)))` by the experts `chosen[:, c]`, always added up
    in that order: `x` `[tokens, dim]`, `weights` and `chosen` `[tokens, chosen]`; `act` and `limit` as `glu`
    takes them.

    Tokens are sorted by expert, so that each expert in use runs once and no other is read. How many tokens
    each has decides shapes: the host waits for it.
    """
    count = chosen.shape[1]
    order = chosen.flatten().argsort(stable=True)  # of the tokens' choices: those of expert 0 first
    rows = order.split(chosen.flatten().bincount(minlength=experts).tolist())
    made = [
        down(expert, glu(gate_up(expert, x[own // count]), act, limit))
        for expert, own in enumerate(rows)
        if len(own)
    ]
    if not made:
        return torch.zeros_like(x)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    each = torch.cat(made)[back].unflatten(0, (-1, count))  # [tokens, chosen, dim]
    return (each.to(weights.dtype) * weights.unsqueeze(-1)).sum(1).to(x.dtype)
