"""Rotary position embedding: the rotation of packed heads by per-token angles."""

from __future__ import annotations

import torch
from torch import Tensor

from taut.kernels.norm import rms_norm


def angles(
    positions: Tensor, frequencies: Tensor, magnitude: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin `[tokens, 1, dim]` in `dtype` as `rotate` takes them, computed in float32.

    `positions` `[tokens]`; `frequencies` float32 `[dim / 2]`, or `[tokens, dim / 2]` where each token has
    its own; `magnitude` multiplies both.
    """
    turned = positions.float()[:, None] * frequencies
    cos, sin = turned.cos() * magnitude, turned.sin() * magnitude
    cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    return cos.to(dtype)[:, None], sin.to(dtype)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn feature pairs `(i, i + dim / 2)` of each head by their token's angle (Su et al. 2021), or, if
    `interleaved`, pairs `(2 i, 2 i + 1)`.

    `x` `[tokens, heads, head_dim]`; `cos`, `sin` `[tokens, 1, dim]` in x's dtype with `dim <= head_dim`,
    the first half of `sin` negated. Features from `dim` on pass through.
    """
    dim = cos.shape[-1]
    if interleaved:
        a, b = x[..., :dim:2], x[..., 1:dim:2]
        cos, sin = cos[..., : dim // 2], sin[..., dim // 2 :]
        turned = torch.stack((torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)), -1)
        return torch.cat((turned.flatten(-2), x[..., dim:]), -1)
    if dim == x.shape[-1]:
        return torch.addcmul(x * cos, x.roll(dim // 2, -1), sin)
    turned, rest = x[..., :dim], x[..., dim:]
    return torch.cat((torch.addcmul(turned * cos, turned.roll(dim // 2, -1), sin), rest), -1)


def rotate_and_store(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    interleaved: bool = False,
    keep_keys: bool = False,
) -> Tensor:
    """Norm and rotate the query and key heads of a fused projection and write keys and values to the cache.

    `qkv` `[tokens, (heads + 2 * kv_heads) * head_dim]`: query, key, then value heads. `cos`, `sin` as
    `rotate` takes them, as is `interleaved`, None for no rotation. `keys`, `values` `[pages, page_size,
    kv_heads, head_dim]` are written at `slots` `[tokens]` (`page * page_size + offset`; a negative slot is
    not written). `q_weight`, `k_weight` `[head_dim]`: RMSNorm of each head before the rotation, with `eps`
    and `offset`. Gives the queries, `[tokens, heads, head_dim]`, and with `keep_keys` the keys behind them,
    `[tokens, heads + kv_heads, head_dim]`.
    """
    split = qkv.unflatten(-1, (heads + 2 * kv_heads, keys.shape[-1]))
    qk, v = split[:, : heads + kv_heads], split[:, heads + kv_heads :]
    if q_weight is not None:
        q, k = rms_norm(qk[:, :heads], q_weight, eps, offset), rms_norm(qk[:, heads:], k_weight, eps, offset)
        qk = torch.cat((q, k), 1)
    if cos is not None:
        qk = rotate(qk, cos, sin, interleaved)
    k = qk[:, heads:]
    if slots.is_cpu and min(slots.tolist(), default=0) >= 0:
        keys.flatten(0, 1).index_copy_(0, slots, k)
        values.flatten(0, 1).index_copy_(0, slots, v)
    else:
        kept = slots >= 0
        keys.flatten(0, 1).index_copy_(0, slots[kept], k[kept])
        values.flatten(0, 1).index_copy_(0, slots[kept], v[kept])
    return qk if keep_keys else qk[:, :heads]
