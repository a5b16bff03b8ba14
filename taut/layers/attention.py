"""Self-attention: fused projection, optional head norms, rotation, cache write, attention, output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from taut.batch import Batch
from taut.config import Attn
from taut.kernels.attention import Pages, Scoring, attention, write_pages
from taut.kernels.rope import rotate
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

    def forward(self, x: Tensor, batch: Batch, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        c = self.config
        qkv = self.qkv_proj(x).unflatten(-1, (-1, c.head_dim))  # [tokens, heads + 2 kv_heads, head_dim]
        qk, v = qkv[:, : c.heads + c.kv_heads], qkv[:, c.heads + c.kv_heads :]
        if self.q_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, : c.heads]), self.k_norm(qk[:, c.heads :])), 1)
        if rotation is not None:
            qk = rotate(qk, *rotation)
        q, k = qk[:, : c.heads], qk[:, c.heads :]
        pages = None
        if batch.kv is not None:
            kv = batch.kv
            pages = Pages(kv.keys[self.index], kv.values[self.index], kv.pages, kv.lengths, kv.longest)
            write_pages(k, v, pages, kv.slots)
        out = attention(q, k, v, batch.starts, batch.longest, self.scoring, pages, self.only)
        return self.o_proj(out.flatten(1))
