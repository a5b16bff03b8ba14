"""Self-attention: fused projection, optional head norms, rotation, cache write, attention, output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from taut.batch import Batch
from taut.config import Attn
from taut.kernels.attention import Pages, Scoring, attention
from taut.kernels.dispatch import ops
from taut.layers.linear import Linear
from taut.layers.norm import Norm


class Attention(nn.Module):
    """Grouped-query attention of layer `index` (its place in the cache)."""

    def __init__(self, config: Attn, dim: int, index: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.config, self.index = config, index
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.qkv_proj = Linear(
            dim, {"q_proj": q, "k_proj": kv, "v_proj": kv}, bias=config.qkv_bias, dtype=dtype
        )
        self.o_proj = Linear(q, dim, bias=config.out_bias, dtype=dtype)
        self.q_norm = Norm(config.qk_norm, config.head_dim, dtype=dtype) if config.qk_norm else None
        self.k_norm = Norm(config.qk_norm, config.head_dim, dtype=dtype) if config.qk_norm else None
        self.scoring = Scoring(config.scale, config.causal, config.window, config.softcap)
        self.only: tuple[str, ...] | None = None

    def forward(
        self,
        x: Tensor,
        batch: Batch,
        rotation: tuple[Tensor, Tensor] | None,
        norm: Norm | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """`residual + o(attention(norm(x)))`, norm and residual where given."""
        c = self.config
        qkv = self.qkv_proj(x, norm=norm)  # [tokens, (heads + 2 kv_heads) * head_dim]
        k = v = pages = None
        if batch.kv is None:
            q, k, v = self._heads(qkv, rotation)
        else:
            kv, own = batch.kv, c.qk_norm
            heads = {} if own is None else {"eps": own.eps, "offset": own.offset}
            if own is not None:
                heads |= {"q_weight": self.q_norm.weight, "k_weight": self.k_norm.weight}
            pages = Pages(kv.keys[self.index], kv.values[self.index], kv.pages, kv.lengths, kv.longest)
            cos, sin = rotation if rotation is not None else (None, None)
            q = ops("rope", qkv).rotate_and_store(
                qkv, c.heads, c.kv_heads, cos, sin, pages.keys, pages.values, kv.slots, **heads
            )
        out = attention(q, k, v, batch.starts, batch.longest, self.scoring, pages, self.only)
        return self.o_proj(out.flatten(1), residual=residual)

    def _heads(self, qkv: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """q `[tokens, heads, head_dim]`, and k and v `[tokens, kv_heads, head_dim]`, normed and turned."""
        c = self.config
        split = qkv.unflatten(-1, (-1, c.head_dim))
        qk, v = split[:, : c.heads + c.kv_heads], split[:, c.heads + c.kv_heads :]
        if self.q_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, : c.heads]), self.k_norm(qk[:, c.heads :])), 1)
        if rotation is not None:
            qk = ops("rope", qk).rotate(qk, *rotation)
        return qk[:, : c.heads], qk[:, c.heads :], v
