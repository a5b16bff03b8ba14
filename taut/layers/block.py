"""One transformer block and the stack of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from taut.batch import Batch
from taut.config import Layer, ModelConfig
from taut.config import Norm as NormConfig
from taut.layers.attention import Attention
from taut.layers.embedding import Embedding
from taut.layers.mlp import GatedMlp
from taut.layers.norm import Norm
from taut.layers.rope import Rotary


class Block(nn.Module):
    """Attention and MLP, each with the norms its `Layer` describes around it and a residual."""

    def __init__(self, layer: Layer, dim: int, index: int, *, dtype: torch.dtype | None = None):
        super().__init__()

        def norm(config: NormConfig | None) -> Norm | None:
            return Norm(config, dim, dtype=dtype) if config is not None else None

        self.config = layer
        self.input_layernorm = norm(layer.pre_attn)
        self.self_attn = Attention(layer.attn, dim, index, dtype=dtype)
        self.post_attention_layernorm = norm(layer.post_attn)
        self.pre_feedforward_layernorm = norm(layer.pre_mlp)
        self.mlp = GatedMlp(layer.mlp, dim, dtype=dtype)
        self.post_feedforward_layernorm = norm(layer.post_mlp)

    def forward(self, x: Tensor, batch: Batch, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        attend = partial(self.self_attn, batch=batch, rotation=rotation)
        x = _branch(x, self.input_layernorm, attend, self.post_attention_layernorm)
        return _branch(x, self.pre_feedforward_layernorm, self.mlp, self.post_feedforward_layernorm)


def _branch(x: Tensor, pre: Norm | None, inner: Callable[..., Tensor], post: Norm | None) -> Tensor:
    """`x + post(inner(pre(x)))`; the inner module does the norm before, and the sum where nothing stands
    between."""
    return inner(x, norm=pre, residual=x) if post is None else x + post(inner(x, norm=pre))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: one call trains, encodes, prefills and decodes."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.dim, scale=config.embed_scale, dtype=dtype)
        self.layers = nn.ModuleList(
            Block(layer, config.dim, index, dtype=dtype) for index, layer in enumerate(config.layers)
        )
        self.norm = Norm(config.norm, config.dim, dtype=dtype)
        # Layers that rotate alike share their angles, which are computed once a batch.
        self.rotaries = {r: Rotary(r) for r in dict.fromkeys(layer.attn.rope for layer in config.layers) if r}

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states `[tokens, dim]` after the final norm; new keys are written to `batch.kv`."""
        x = self.embed_tokens(batch.ids) if batch.embeds is None else batch.embeds
        rotations = {rope: rotary(batch, x.dtype) for rope, rotary in self.rotaries.items()}
        for layer in self.layers:
            x = layer(x, batch, rotations.get(layer.config.attn.rope))
        return self.norm(x)
