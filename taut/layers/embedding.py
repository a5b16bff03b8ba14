"""Token embedding, which is also the head's matrix where the two are tied, and what positions add."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taut.batch import Batch
from taut.config import Grid, Positions, Relative
from taut.errors import RequestError
from taut.kernels.linear import linear
from taut.quant.base import Packed, join


class Embedding(nn.Module):
    """Rows of `weight` `[vocab, dim]` by id, times `scale` (rounded to the weight's dtype). Looking up the id
    `padding` gives its row no gradient."""

    def __init__(
        self,
        vocab: int,
        dim: int,
        *,
        scale: float | None = None,
        padding: int | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, dim, dtype=dtype))
        self.scale, self.padding = scale, padding
        self.shape = torch.Size((vocab, dim))  # of the weight, however it is held
        self.packed: Packed | None = None

    def forward(self, ids: Tensor) -> Tensor:
        if self.packed is None:
            there = self.padding is not None and self.padding < self.shape[0]
            x = F.embedding(ids, self.weight, self.padding if there else None)
        else:
            x = self.packed.rows_at(ids.flatten(), self.like.dtype).view(*ids.shape, -1)
        return x if self.scale is None else x * torch.tensor(self.scale, dtype=x.dtype)

    def project(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits `[tokens, vocab]` of `hidden` `[tokens, dim]` with the same matrix (a tied head)."""
        return linear(hidden, self.weight, bias) if self.packed is None else self.packed(hidden, bias)

    def joined(self, units: Sequence[Packed]) -> Packed:
        """These matrices, one below the other, as `hold` takes them."""
        return join(units)

    def hold(self, packed: Packed) -> None:
        """Hold the weight packed, and let go of the dense one. Rows are looked up in its dtype."""
        self.register_buffer("like", self.weight.new_empty(0, device=packed.device), persistent=False)
        self.weight, self.packed = None, packed.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.shape[0]}, {self.shape[1]}"


class PositionEmbedding(nn.Module):
    """A vector `[dim]` for each absolute position, learned or computed (`Positions.sinusoidal`)."""

    def __init__(self, config: Positions, dim: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        table = torch.empty(config.count + config.offset, dim, dtype=dtype)
        self.weight = nn.Parameter(table, requires_grad=not config.sinusoidal)

    def forward(self, batch: Batch) -> Tensor:
        """`[tokens, dim]`. `RequestError` for a row longer than the table; the engine refuses such rows
        before they begin."""
        self.check(batch)
        return F.embedding(batch.positions + self.config.offset, self.weight)

    def check(self, batch: Batch) -> None:
        """Raise for a row longer than the table."""
        if batch.kv is None and batch.longest > self.config.count:
            raise RequestError(
                f"a row has {batch.longest} tokens, and the model has {self.config.count} positions; "
                "shorten it (truncation=True, max_length=...)"
            )

    def compute(self) -> None:
        """Fill the table of sinusoidal positions."""
        count, dim = self.weight.shape
        angles = torch.arange(count, dtype=torch.float64)[:, None] / 10000.0 ** (
            torch.arange(0, dim, 2, dtype=torch.float64) / dim
        )
        table = torch.cat((angles.sin(), angles[:, : dim // 2].cos()), 1)
        with torch.no_grad():
            self.weight.copy_(table.float())

    def extra_repr(self) -> str:
        return f"{self.config.count}, {self.weight.shape[1]}, offset={self.config.offset}"


class RelativeBias(nn.Module):
    """What the distance from query to key adds to each head's score: `weight` `[buckets, heads]`."""

    def __init__(self, config: Relative, heads: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.buckets, heads, dtype=dtype))
        with torch.device("cpu"):  # models are built under the meta device
            buckets = relative_buckets(config)
        self._buckets = {buckets.device: buckets}

    def forward(self) -> Tensor:
        """The bias of each distance, `[heads, 2 * reach + 1]`, as `kernels.attention.Scoring` takes it."""
        device = self.weight.device
        if device not in self._buckets:
            self._buckets[device] = self._buckets[torch.device("cpu")].to(device)
        return F.embedding(self._buckets[device], self.weight).t().contiguous()

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, reach={self.config.reach}, both={self.config.both}"


class DistanceGate(nn.Module):
    """How much of the bias of distances each query takes, by head: `a * (b * constant - 1) + 2`, where a and
    b are sigmoids of sums of four products with the head's features (WavLM; Chen et al. 2021)."""

    def __init__(self, heads: int, head_dim: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, head_dim, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(8, dtype=dtype))
        self.constant = nn.Parameter(torch.empty(1, heads, 1, 1, dtype=dtype))
        self.initial = {"constant": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        """`[tokens, heads * head_dim] -> [tokens, heads]`"""
        heads = x.unflatten(-1, (self.constant.shape[1], -1))
        a, b = F.linear(heads, self.weight, self.bias).unflatten(-1, (2, 4)).sum(-1).sigmoid().unbind(-1)
        return a * (b * self.constant.view(-1) - 1.0) + 2.0


class GridBias(nn.Module):
    """What the distance between two patches of a picture adds to each head's score: `weight`
    `[distances + 3, heads]`, those down and across in order, then of a patch from the first token, of the
    first token from a patch, and of the first token from itself."""

    def __init__(self, config: Grid, heads: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        distances = (2 * config.size[0] - 1) * (2 * config.size[1] - 1)
        self.weight = nn.Parameter(torch.empty(distances + 3, heads, dtype=dtype))
        self._index: dict[tuple[object, ...], Tensor] = {}

    def forward(self, batch: Batch) -> Tensor:
        """`[heads, tokens, tokens]` of pictures with the batch's grid; for another than the config's, the
        table is interpolated."""
        table, (rows, columns) = self.weight, self.config.size
        if batch.grid != self.config.size:
            wide = torch.promote_types(table.dtype, torch.float32)
            own = table[:-3].to(wide).view(1, 2 * rows - 1, 2 * columns - 1, -1).permute(0, 3, 1, 2)
            size = [2 * edge - 1 for edge in batch.grid]
            own = F.interpolate(own, size, mode="bilinear", align_corners=False)
            table = torch.cat((own.flatten(2)[0].t().to(table.dtype), table[-3:]))
        key = batch.grid, table.device
        if key not in self._index:
            self._index = {key: grid_distances(*batch.grid).to(table.device)}
        return F.embedding(self._index[key], table).permute(2, 0, 1)

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}"


def grid_distances(rows: int, columns: int) -> Tensor:
    """For each pair of a picture's tokens, query and key, its row in the table of `GridBias`, int64."""
    count = (2 * rows - 1) * (2 * columns - 1)
    at = torch.arange(rows * columns)
    down = at[:, None] // columns - at // columns + rows - 1
    across = at[:, None] % columns - at % columns + columns - 1
    whole = torch.full((len(at) + 1, len(at) + 1), count)
    whole[1:, 1:] = down * (2 * columns - 1) + across
    whole[1:, 0] = count + 1
    whole[0, 0] = count + 2
    return whole


def relative_buckets(config: Relative) -> Tensor:
    """The bucket of each distance from `-reach` to `reach` (key position - query position), int64."""
    ahead = torch.arange(-config.reach, config.reach + 1)
    count, first = config.buckets, torch.zeros_like(ahead)
    if config.both:
        count //= 2
        first = (ahead > 0) * count
        distance = ahead.abs()
    else:
        distance = (-ahead).clamp(min=0)
    near = count // 2  # distances with a bucket each; those of the others grow by powers
    # In float32, as the model was trained: it decides at which distance a bucket ends.
    power = torch.log(distance.float() / near) / math.log(config.reach / near) * (count - near)
    far = (near + power.clamp(min=0).long()).clamp(max=count - 1)
    return first + torch.where(distance < near, distance, far)
