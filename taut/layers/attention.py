"""Attention of a row to itself, and of a decoder's row to what an encoder gave."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from taut.batch import Batch, PagedKV
from taut.config import Attn
from taut.errors import ConfigError, RequestError
from taut.kernels.attention import KeyRows, Pages, Scoring, attention
from taut.kernels.dispatch import ops
from taut.layers.embedding import DistanceGate, GridBias
from taut.layers.linear import Linear
from taut.layers.norm import HeadNorm, Norm


class Attention(nn.Module):
    """What attention to oneself and to an encoder share: how scores become weights.

    `index` is the place of its layer in the cache; `only`, if set, names the implementations allowed.
    """

    def __init__(self, config: Attn, index: int, dtype: torch.dtype | None):
        super().__init__()
        self.config, self.index = config, index
        slopes = None if config.slopes is None else torch.tensor(config.slopes, device="cpu")
        # The tables come with each call; that there are some decides what can run.
        relative = None if config.relative is None else torch.zeros(config.heads, 1, device="cpu")
        self._scoring = Scoring(
            config.scale,
            config.causal,
            config.window,
            config.softcap,
            slopes,
            relative,
            gate=torch.zeros(1, config.heads, device="cpu") if config.gated else None,
            bias=None if config.grid is None else torch.zeros(config.heads, 1, 1, device="cpu"),
        )
        self.sinks = nn.Parameter(torch.empty(config.heads, dtype=dtype)) if config.sinks else None
        self.only: tuple[str, ...] | None = None

    @property
    def scoring(self) -> Scoring:
        """How this layer's scores become weights."""
        return self._scoring if self.sinks is None else replace(self._scoring, sinks=self.sinks)


class SelfAttention(Attention):
    """Grouped-query attention of a row to itself."""

    def __init__(self, config: Attn, dim: int, index: int, *, dtype: torch.dtype | None = None):
        super().__init__(config, index, dtype)
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        biased = config.qkv_bias if config.k_bias else ("q_proj", "v_proj") * config.qkv_bias
        self.qkv_proj = Linear(dim, {"q_proj": q, "k_proj": kv, "v_proj": kv}, bias=biased, dtype=dtype)
        self.o_proj = Linear(q, dim, bias=config.out_bias, dtype=dtype)
        self.q_norm = _norm_of(config, config.heads, dtype)
        self.k_norm = _norm_of(config, config.kv_heads, dtype)
        self.gate = DistanceGate(config.heads, config.head_dim, dtype=dtype) if config.gated else None
        self.grid_bias = None
        if config.grid is not None and not config.grid.shared:
            self.grid_bias = GridBias(config.grid, config.heads, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        batch: Batch,
        rotation: tuple[Tensor, Tensor] | None,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        relative: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """`residual + o(attention(norm(x)))`, norm and residual where given; `relative`
        `[heads, 2 * reach + 1]`: what distances add to the scores; `bias` `[heads, queries, keys]`: what
        every pair adds."""
        c, gate = self.config, None
        if self.gate is not None:
            x, norm = (x if norm is None else norm(x)), None
            gate = self.gate(x)
        qkv = self.qkv_proj(x, norm=norm)  # [tokens, (heads + 2 kv_heads) * head_dim]
        if c.clip is not None:
            qkv = qkv.clamp(-c.clip, c.clip)
        pages = None
        if batch.kv is None:
            q, k, v = self._heads(qkv, rotation)
        else:
            pages = batch.kv.layer(self.index)
            q, k, v = self._store(qkv, rotation, pages, batch.kv.slots, batch.kv.fresh)
            pages = None if batch.kv.fresh else pages
        if self._scoring.slopes is not None and self._scoring.slopes.device != q.device:
            self._scoring = replace(self._scoring, slopes=self._scoring.slopes.to(q.device))
        scoring = self.scoring
        if relative is not None:
            scoring = replace(scoring, relative=relative, gate=gate)
        if c.grid is not None:
            scoring = replace(scoring, bias=bias if self.grid_bias is None else self.grid_bias(batch))
        out = attention(q, k, v, batch.starts, batch.longest, scoring, pages, self.only)
        return self.o_proj(out.flatten(1), residual=residual)

    def _heads(self, qkv: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """q `[tokens, heads, head_dim]`, and k and v `[tokens, kv_heads, head_dim]`, normed and turned."""
        c = self.config
        split = qkv.unflatten(-1, (-1, c.head_dim))
        qk, v = split[:, : c.heads + c.kv_heads], split[:, c.heads + c.kv_heads :]
        if self.q_norm is not None:
            q, k = qk[:, : c.heads], qk[:, c.heads :]
            qk = torch.cat((self._normed(self.q_norm, q), self._normed(self.k_norm, k)), 1)
        if rotation is not None:
            qk = ops("rope", qk).rotate(qk, *rotation, c.rope.interleaved)
        return qk[:, : c.heads], qk[:, c.heads :], v

    def _store(
        self, qkv: Tensor, rotation: tuple[Tensor, Tensor] | None, pages: Pages, slots: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What `_heads` gives, keys and values only if asked to `keep` them; they go to their slots in the
        cache."""
        c, norms = self.config, {}
        if c.qk_norm is not None and c.qk_norm.kind == "rms" and c.qk_norm_of == "head":
            norms = {"q_weight": self.q_norm.weight, "k_weight": self.k_norm.weight}
            norms |= {"eps": c.qk_norm.eps, "offset": c.qk_norm.offset}
        elif c.qk_norm is not None:  # a norm that the kernel hasn't
            qkv = torch.cat(self._heads(qkv, None), 1).flatten(1)
        cos, sin = rotation if rotation is not None else (None, None)
        qk = ops("rope", qkv).rotate_and_store(
            qkv,
            c.heads,
            c.kv_heads,
            cos,
            sin,
            pages.keys,
            pages.values,
            slots,
            interleaved=c.rope is not None and c.rope.interleaved,
            keep_keys=keep,
            **norms,
        )
        if not keep:
            return qk, None, None
        return qk[:, : c.heads], qk[:, c.heads :], qkv.unflatten(-1, (-1, c.head_dim))[:, -c.kv_heads :]

    def _normed(self, norm: nn.Module, heads: Tensor) -> Tensor:
        """`heads` `[tokens, heads, head_dim]` under a query or key norm."""
        return norm(heads.flatten(1)).view_as(heads) if self.config.qk_norm_of == "all" else norm(heads)


class CrossAttention(Attention):
    """Grouped-query attention of a decoder's row to the hidden states of its source, of `source_dim`."""

    def __init__(
        self, config: Attn, dim: int, index: int, source_dim: int, *, dtype: torch.dtype | None = None
    ):
        super().__init__(config, index, dtype)
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = Linear(dim, q, bias=config.qkv_bias, dtype=dtype)
        biased = config.qkv_bias if config.k_bias else ("v_proj",) * config.qkv_bias
        self.kv_proj = Linear(source_dim, {"k_proj": kv, "v_proj": kv}, bias=biased, dtype=dtype)
        self.o_proj = Linear(q, dim, bias=config.out_bias, dtype=dtype)

    def forward(
        self, x: Tensor, batch: Batch, norm: Norm | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """`residual + o(attention(norm(x)))`, norm and residual where given."""
        q = self.q_proj(x, norm=norm).unflatten(-1, (-1, self.config.head_dim))
        k, v, pages, rows, source = None, None, None, None, batch.source
        if source is None:
            raise RequestError("a decoder with cross-attention needs a batch with a source")
        if isinstance(source, PagedKV):
            pages = source.layer(self.index)
        else:
            k, v = self.keys(source.hidden)
            rows = KeyRows(source.starts, source.longest)
        out = attention(q, k, v, batch.starts, batch.longest, self.scoring, pages, self.only, rows)
        return self.o_proj(out.flatten(1), residual=residual)

    def keys(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[tokens, kv_heads, head_dim]` of a source's hidden states `[tokens, dim]`."""
        kv = self.kv_proj(hidden).unflatten(-1, (-1, self.config.head_dim))
        return kv[:, : self.config.kv_heads], kv[:, self.config.kv_heads :]


def _norm_of(config: Attn, heads: int, dtype: torch.dtype | None) -> Norm | HeadNorm | None:
    """The norm of so many query or key heads."""
    if config.qk_norm is None:
        return None
    match config.qk_norm_of:
        case "head":
            return Norm(config.qk_norm, config.head_dim, dtype=dtype)
        case "own head":
            return HeadNorm(config.qk_norm, heads, config.head_dim, dtype=dtype)
        case "all":
            return Norm(config.qk_norm, heads * config.head_dim, dtype=dtype)
    raise ConfigError(f"qk_norm_of is {config.qk_norm_of!r}; known: head, own head, all")
