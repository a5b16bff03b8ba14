"""Rotary position embedding: the rotation of packed heads by per-token angles."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn feature pairs `(i, i + dim / 2)` of each head by their token's angle (Su et al. 2021).

    `x` `[tokens, heads, head_dim]`; `cos`, `sin` `[tokens, 1, dim]` in x's dtype with `dim <= head_dim`,
    the first half of `sin` negated. Features from `dim` on pass through.
    """
    dim = cos.shape[-1]
    if dim == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(dim // 2, -1), sin)
    turned, rest = x[..., :dim], x[..., dim:]
    return torch.cat((torch.addcmul(turned * cos, turned.roll(dim // 2, -1), sin), rest), -1)
