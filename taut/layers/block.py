"""One transformer block, the stack of them, and the stack of a language model."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from taut.batch import Batch
from taut.config import Layer, Mlp, ModelConfig, Moe
from taut.config import LayerScale as LayerScaleConfig
from taut.config import Norm as NormConfig
from taut.errors import RequestError
from taut.layers.attention import CrossAttention, SelfAttention
from taut.layers.embedding import Embedding, GridBias, PositionEmbedding, RelativeBias
from taut.layers.linear import Linear
from taut.layers.mlp import GatedMlp, PlainMlp
from taut.layers.moe import MoeMlp
from taut.layers.norm import LayerScale, Norm
from taut.layers.rope import Rotary


class Block(nn.Module):
    """Attention, to oneself and perhaps to a source of `source_dim`, and MLP, each with the norms its `Layer`
    describes around it and a residual."""

    def __init__(
        self,
        layer: Layer,
        dim: int,
        index: int,
        *,
        source_dim: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()

        def norm(config: NormConfig | LayerScaleConfig | None) -> Norm | LayerScale | None:
            if isinstance(config, LayerScaleConfig):
                return LayerScale(config, dim, dtype=dtype)
            return Norm(config, dim, dtype=dtype) if config is not None else None

        self.config = layer
        self.input_layernorm = norm(layer.pre_attn)
        self.self_attn = SelfAttention(layer.attn, dim, index, dtype=dtype)
        self.post_attention_layernorm = norm(layer.post_attn)
        self.after_attention_layernorm = norm(layer.after_attn)
        self.encoder_attn = None
        if layer.cross is not None:
            self.pre_encoder_attention_layernorm = norm(layer.pre_cross)
            self.encoder_attn = CrossAttention(layer.cross, dim, index, source_dim or dim, dtype=dtype)
            self.after_encoder_attention_layernorm = norm(layer.after_cross)
        self.pre_feedforward_layernorm = norm(layer.pre_mlp)
        self.mlp = _mlp_of(layer.mlp)(layer.mlp, dim, dtype=dtype)
        self.post_feedforward_layernorm = norm(layer.post_mlp)
        self.after_feedforward_layernorm = norm(layer.after_mlp)

    def forward(
        self,
        x: Tensor,
        batch: Batch,
        rotation: tuple[Tensor, Tensor] | None,
        relative: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        attend = partial(self.self_attn, batch=batch, rotation=rotation, relative=relative, bias=bias)
        if self.config.parallel:
            return self._parallel(x, attend)
        x = self._add(
            x,
            self.input_layernorm,
            attend,
            self.post_attention_layernorm,
            self.after_attention_layernorm,
        )
        if self.encoder_attn is not None:
            source = partial(self.encoder_attn, batch=batch)
            x = self._add(
                x,
                self.pre_encoder_attention_layernorm,
                source,
                None,
                self.after_encoder_attention_layernorm,
            )
        return self._add(
            x,
            self.pre_feedforward_layernorm,
            self.mlp,
            self.post_feedforward_layernorm,
            self.after_feedforward_layernorm,
        )

    def _add(
        self,
        x: Tensor,
        pre: Norm | None,
        inner: Callable[..., Tensor],
        post: Norm | None,
        after: Norm | None,
    ) -> Tensor:
        """`after(x + scale * post(inner(pre(x))))`; the inner module does the norm before, and where nothing
        stands between it and the sum, it or the norm after does that."""
        if post is not None or self.config.scale is not None:
            y = inner(x, norm=pre)
            y = y if post is None else post(y)
            x = x + y if self.config.scale is None else torch.add(x, y, alpha=self.config.scale)
        elif after is not None and after.sums(x):
            return after(inner(x, norm=pre), residual=x)
        else:
            x = inner(x, norm=pre, residual=x)
        return x if after is None else after(x)

    def _parallel(self, x: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """`x + attend(pre(x)) + mlp(pre(x))`, under one norm or one each."""
        if self.pre_feedforward_layernorm is None:
            n = self.input_layernorm(x)
            return self.mlp(n, residual=attend(n, residual=x))
        attended = attend(x, norm=self.input_layernorm, residual=x)
        return self.mlp(x, norm=self.pre_feedforward_layernorm, residual=attended)


def _mlp_of(config: Mlp | Moe) -> type[nn.Module]:
    if isinstance(config, Moe):
        return MoeMlp
    return GatedMlp if config.gated else PlainMlp


class Stack(nn.Module):
    """Blocks over packed tokens and the norm behind them: one call trains, encodes, prefills and decodes.

    By itself it takes embeddings (`Batch.embeds`); what makes these of something else is a subclass, with
    modules of its own, made in `make_embedding`, and its `embed`.

    With `gradient_checkpointing`, of what is computed for a gradient only the input of each block is kept,
    and the backward pass computes the rest again (Chen et al. 2016). With `input_requires_grad`, what enters
    the first block requires a gradient, whatever it is made of.
    """

    gradient_checkpointing = False
    input_requires_grad = False

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.make_embedding(config, dtype)
        self.relative_bias = self.grid_bias = None
        if (biased := next((layer.attn for layer in config.layers if layer.attn.relative), None)) is not None:
            self.relative_bias = RelativeBias(biased.relative, biased.heads, dtype=dtype)
        if (
            shared := next((a.attn for a in config.layers if a.attn.grid and a.attn.grid.shared), None)
        ) is not None:
            self.grid_bias = GridBias(shared.grid, shared.heads, dtype=dtype)
        source_dim = None if config.encoder is None else config.encoder.dim
        made: dict[int, Block] = {}
        for index, first in enumerate(config.weights_of or range(len(config.layers))):
            if first not in made:
                made[first] = Block(
                    config.layers[index], config.dim, index, source_dim=source_dim, dtype=dtype
                )
        self.layers = nn.ModuleList(made[i] for i in config.weights_of or made)
        self.norm = Norm(config.norm, config.dim, dtype=dtype) if config.norm else None
        # Layers that rotate alike share their angles, which are computed once a batch.
        self.rotaries = {r: Rotary(r) for r in dict.fromkeys(layer.attn.rope for layer in config.layers) if r}

    def make_embedding(self, config: ModelConfig, dtype: torch.dtype | None) -> None:
        """The modules that `embed` needs, before all others in the order of files."""

    def embed(self, batch: Batch) -> Tensor:
        """What enters the first block, `[tokens, dim]`."""
        if batch.embeds is None:
            raise RequestError(f"a {self.config.model_type} takes embeddings, and this batch has token ids")
        return batch.embeds

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states `[tokens, dim]` after the final norm; new keys are written to `batch.kv`."""
        x = self.embed(batch)
        if self.input_requires_grad and torch.is_grad_enabled() and not x.requires_grad:
            x = x.detach().requires_grad_()  # not what the caller gave, which may be the same tensor
        rotations = {rope: rotary(batch, x.dtype) for rope, rotary in self.rotaries.items()}
        relative = None if self.relative_bias is None else self.relative_bias()
        bias = None if self.grid_bias is None else self.grid_bias(batch)
        if self.config.wide and x.dtype is torch.float16:
            x = x.float()
        again = self.gradient_checkpointing and batch.kv is None and torch.is_grad_enabled()
        for layer in self.layers:
            run = _recomputed(layer) if again else layer
            x = run(x, batch, rotations.get(layer.config.attn.rope), relative, bias)
        return x if self.norm is None else self.norm(x)


def _recomputed(layer: Block) -> Callable[..., Tensor]:
    """A call of the block that the backward pass makes once more, in the context (which attention may run) of
    this one, whatever its thread."""
    run = partial(copy_context().run, layer)
    return partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)


class Decoder(Stack):
    """The stack of a language model, from token ids."""

    def make_embedding(self, config: ModelConfig, dtype: torch.dtype | None) -> None:
        dim, inner = config.dim, config.embed_dim or config.dim
        self.embed_tokens = embedding(config, dtype)
        self.project_in = Linear(inner, dim, dtype=dtype) if inner != dim else None
        self.embed_positions = (
            PositionEmbedding(config.positions, dim, dtype=dtype) if config.positions is not None else None
        )
        self.embed_layernorm = Norm(config.embed_norm, dim, dtype=dtype) if config.embed_norm else None
        self.project_out = Linear(dim, inner, dtype=dtype) if inner != dim else None

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states `[tokens, embed_dim]`; new keys are written to `batch.kv`."""
        x = super().forward(batch)
        return x if self.project_out is None else self.project_out(x)

    def embed(self, batch: Batch) -> Tensor:
        x = self.embed_tokens(batch.ids) if batch.embeds is None else batch.embeds
        if self.config.input_scale is not None:
            x = x * self.config.input_scale
        if self.project_in is not None:
            x = self.project_in(x)
        if self.embed_positions is not None:
            x = x + self.embed_positions(batch)
        return x if self.embed_layernorm is None else self.embed_layernorm(x)


def embedding(config: ModelConfig, dtype: torch.dtype | None) -> Embedding:
    """The table of a model's tokens."""
    width, scale = config.embed_dim or config.dim, config.embed_scale
    return Embedding(config.vocab_size, width, scale=scale, padding=config.padding, dtype=dtype)
