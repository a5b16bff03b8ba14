"""The stack of a text encoder, from token ids with their positions and features; what heads are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from taut.batch import Batch
from taut.config import ModelConfig
from taut.config import Transform as TransformConfig
from taut.kernels.act import ACTIVATIONS
from taut.kernels.dispatch import ops
from taut.kernels.lookup import Lookup, fuses
from taut.layers.block import Stack, embedding
from taut.layers.embedding import Embedding, PositionEmbedding
from taut.layers.linear import Linear
from taut.layers.norm import Norm


class Encoder(Stack):
    """The stack of a text encoder: `norm(word + position + features)`, projected to `dim`, and blocks.

    With `pooler`, `pooled` gives a vector for each row as well.
    """

    def __init__(self, config: ModelConfig, *, pooler: bool = False, dtype: torch.dtype | None = None):
        super().__init__(config, dtype=dtype)
        self.pooler = None
        if pooler and config.heads.pooler is not None:
            self.pooler = Transform(config.heads.pooler, config.dim, config.dim, dtype=dtype)

    def make_embedding(self, config: ModelConfig, dtype: torch.dtype | None) -> None:
        inner = config.embed_dim or config.dim
        self.embed_tokens = embedding(config, dtype)
        self.embed_positions = (
            PositionEmbedding(config.positions, inner, dtype=dtype) if config.positions is not None else None
        )
        columns = [table for features in config.features for table in features.tables]
        self.embed_features = nn.ModuleDict(
            {name: Embedding(count, inner, dtype=dtype) for name, count in dict(columns).items()}
        )
        self._columns = [name for name, _ in columns]
        self.embed_layernorm = Norm(config.embed_norm, inner, dtype=dtype) if config.embed_norm else None
        self.project_in = Linear(inner, config.dim, bias=True, dtype=dtype) if config.embed_dim else None

    def embed(self, batch: Batch) -> Tensor:
        norm, lookups = self.embed_layernorm, self._lookups(batch)
        if lookups and norm.config.kind == "layer" and fuses(lookups, norm.weight, norm.bias):
            x = ops("lookup", norm.weight).summed_norm(lookups, norm.weight, norm.bias, norm.config.eps)
        else:
            x = self._embed(batch)
        return x if self.project_in is None else self.project_in(x)

    def _lookups(self, batch: Batch) -> list[Lookup]:
        """What `_embed` sums and normalises, if that is rows of dense tables, by modules that nobody has
        replaced and no hook watches; otherwise none."""
        tables, positions = [self.embed_tokens, *self.embed_features.values()], self.embed_positions
        if batch.embeds is not None or self.embed_layernorm is None:
            return []
        for module in (*tables, self.embed_layernorm, *(() if positions is None else (positions,))):
            if type(module) not in (Embedding, PositionEmbedding, Norm):
                return []
            if module._forward_hooks or module._forward_pre_hooks:
                return []
        if any(table.packed is not None or table.scale is not None for table in tables):
            return []
        found = [Lookup(self.embed_tokens.weight, batch.ids)]
        if positions is not None:
            positions.check(batch)
            found.append(Lookup(positions.weight, batch.positions, positions.config.offset))
        for column, name in enumerate(self._columns):
            index = None if batch.features is None else batch.features[:, column]
            found.append(Lookup(self.embed_features[name].weight, index))
        return found

    def _embed(self, batch: Batch) -> Tensor:
        x = self.embed_tokens(batch.ids) if batch.embeds is None else batch.embeds
        if self.embed_positions is not None:
            x = x + self.embed_positions(batch)
        for column, name in enumerate(self._columns):
            table = self.embed_features[name]
            x = x + (table.weight[0] if batch.features is None else table(batch.features[:, column]))
        return x if self.embed_layernorm is None else self.embed_layernorm(x)


class Transform(nn.Module):
    """`norm(act(dense(x)))` on `[..., in_features]`, the norm where there is one."""

    def __init__(
        self, config: TransformConfig, in_features: int, out: int, *, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.config = config
        self.dense = Linear(in_features, out, bias=config.bias, dtype=dtype)
        self.layer_norm = Norm(config.norm, out, dtype=dtype) if config.norm is not None else None

    def forward(self, x: Tensor) -> Tensor:
        y = ACTIVATIONS[self.config.act](self.dense(x))
        return y if self.layer_norm is None else self.layer_norm(y)


class Classifier(Transform):
    """A score for each label, `[..., dim] -> [..., labels]`, of what a transform makes of its input."""

    def __init__(self, config: TransformConfig, dim: int, labels: int, *, dtype: torch.dtype | None = None):
        super().__init__(config, dim, dim, dtype=dtype)
        self.out_proj = Linear(dim, labels, bias=True, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(super().forward(x))


class MaskedHead(Transform):
    """Before the logits of a masked token: a transform to the width of the embedding, and the bias of the
    product with it."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config.heads.masked, config.dim, config.embed_dim or config.dim, dtype=dtype)
        self.bias = nn.Parameter(torch.empty(config.vocab_size, dtype=dtype)) if config.head_bias else None


def classifier(
    config: TransformConfig | None, dim: int, labels: int, *, bias: bool = True, dtype: torch.dtype | None
) -> nn.Module:
    """A `Classifier`, or where nothing stands before it the product alone."""
    if config is None:
        return Linear(dim, labels, bias=bias, dtype=dtype)
    return Classifier(config, dim, labels, dtype=dtype)


def pool(hidden: Tensor, batch: Batch, how: str, skip: int | None = None) -> Tensor:
    """One vector for each row, `[tokens, dim] -> [rows, dim]`: that of its "first" or "last" token, or their
    "mean"; zeros for a row without tokens. `skip`: an id that the last token doesn't have (the first is taken
    where all have it)."""
    counts = batch.starts.diff()
    if how == "mean" or (how == "last" and skip is not None):
        row = torch.repeat_interleave(counts.long(), output_size=batch.tokens)
    if how == "mean":
        wide = torch.promote_types(hidden.dtype, torch.float32)
        sums = hidden.new_zeros(batch.rows, hidden.shape[-1], dtype=wide).index_add_(0, row, hidden.to(wide))
        return (sums / counts.clamp(min=1)[:, None]).to(hidden.dtype)
    at = batch.starts[:-1] if how == "first" else batch.starts[1:] - 1
    if how == "last" and skip is not None and batch.ids is not None:
        kept = torch.arange(batch.tokens, device=row.device).masked_fill_(batch.ids == skip, 0)
        at = batch.starts[:-1].long().scatter_reduce(0, row, kept, "amax")
    if batch.tokens == 0:
        return hidden.new_zeros(batch.rows, hidden.shape[-1])
    vectors = hidden.index_select(0, at.clamp(0, batch.tokens - 1))
    return torch.where(counts[:, None] > 0, vectors, 0.0)
