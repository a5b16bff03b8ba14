"""The stack of an image encoder: patches to tokens, their positions in the picture, and what sums them up."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taut.batch import Batch, Padding, Source
from taut.config import ModelConfig, Patches, Pooler, Probe
from taut.config import Norm as NormConfig
from taut.errors import RequestError
from taut.layers.attention import CrossAttention
from taut.layers.block import Stack
from taut.layers.encoder import Transform
from taut.layers.mlp import PlainMlp
from taut.layers.norm import Norm


class Vision(Stack):
    """Blocks over the tokens of pictures, which `pack` makes; with `pooler`, `pooled` gives a vector of each.

    Pictures of one size are rows of one length: `hidden.view(pictures, tokens, dim)` takes them apart.
    """

    def __init__(self, config: ModelConfig, *, pooler: bool = True, dtype: torch.dtype | None = None):
        super().__init__(config, dtype=dtype)
        self.pooler = None
        if pooler and config.heads.pooler is not None:
            prefix = config.patches.prefix
            self.pooler = PicturePooler(config.heads.pooler, config.dim, prefix, dtype=dtype)

    def make_embedding(self, config: ModelConfig, dtype: torch.dtype | None) -> None:
        patches, dim = config.patches, config.dim

        def learned(*shape: int, leading: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*(1,) * leading, *shape, dim, dtype=dtype))

        self.prefix = nn.ParameterList(
            learned(leading=0 if patches.flat else 2) for _ in range(patches.prefix)
        )
        self.hidden_token = None if patches.hidden is None else learned(leading=patches.hidden)
        self.positions = None
        if patches.positions:
            self.positions = learned(patches.tokens, leading=0 if patches.flat else 1)
        self.patch_embeddings = PatchEmbedding(patches, dim, dtype=dtype)
        self.embed_layernorm = Norm(config.embed_norm, dim, dtype=dtype) if config.embed_norm else None

    def pack(
        self, pixels: Tensor, hidden_patches: Tensor | None = None, *, interpolate: bool = False
    ) -> tuple[Batch, Padding]:
        """Pictures of one size, `[pictures, channels, height, width]`, as a batch with a row each, and the
        way back. `hidden_patches` `[pictures, patches]`: which are left out, for the learned token.
        `interpolate`: whether positions are fitted to pictures of another size than the config's. Raises
        `RequestError` for pixels that don't fit it."""
        grid = self._grid_of(pixels, interpolate)
        x = self.patch_embeddings(pixels.to(self.patch_embeddings.weight.dtype), grid)  # [pictures, n, dim]
        if hidden_patches is not None:
            x = torch.where(self._hidden(hidden_patches, x), self.hidden_token.flatten(), x)
        ahead = [token.view(1, 1, -1).expand(len(x), 1, -1) for token in self.prefix]
        x = torch.cat((*ahead, x), 1) if ahead else x
        if self.positions is not None:
            x = x + self._positions_of(grid)
        if self.embed_layernorm is not None:
            x = self.embed_layernorm(x)
        pictures, tokens = x.shape[:2]
        batch = Batch(
            ids=None,
            embeds=x.flatten(0, 1),
            positions=torch.arange(tokens, dtype=torch.int32, device=x.device).repeat(pictures),
            starts=torch.arange(pictures + 1, dtype=torch.int32, device=x.device) * tokens,
            longest=tokens if pictures else 0,
            grid=grid,
        )
        return batch, Padding(None, pictures, tokens)

    def _grid_of(self, pixels: Tensor, interpolate: bool) -> tuple[int, int]:
        """Patches of these pictures, in rows and columns."""
        patches = self.config.patches
        if pixels.dim() != 4 or pixels.shape[1] != patches.channels or not pixels.is_floating_point():
            raise RequestError(
                f"pixel_values is {pixels.dtype} {list(pixels.shape)}; expected floats [images, "
                f"{patches.channels}, height, width], as an image processor gives"
            )
        size = tuple(pixels.shape[2:])
        if size != patches.image and patches.positions and not (interpolate or patches.elastic):
            raise RequestError(
                f"pixel_values are pictures of {size[0]} x {size[1]} pixels, and the model takes "
                f"{patches.image[0]} x {patches.image[1]}; resize them, or pass "
                "interpolate_pos_encoding=True"
            )
        grid = patches.grid_of(*size)
        if min(grid) < 1:
            raise RequestError(
                f"pictures of {size[0]} x {size[1]} pixels are smaller than a patch of "
                f"{patches.size[0]} x {patches.size[1]}"
            )
        return grid

    def _hidden(self, hidden_patches: Tensor, x: Tensor) -> Tensor:
        if self.hidden_token is None:
            raise RequestError(
                "bool_masked_pos is given, and this model has no token for patches that are left out"
            )
        if hidden_patches.shape != x.shape[:2]:
            raise RequestError(
                f"bool_masked_pos has shape {list(hidden_patches.shape)}; expected {list(x.shape[:2])}, one "
                "a patch"
            )
        return hidden_patches.to(x.device).bool()[..., None]

    def _positions_of(self, grid: tuple[int, int]) -> Tensor:
        """Positions of a picture's tokens, `[tokens, dim]`, those of patches fitted to its grid."""
        patches, table = self.config.patches, self.positions.view(-1, self.config.dim)
        if grid == patches.grid:
            return table
        ahead, own = table[: patches.prefix], table[patches.prefix :]
        own = own.view(1, *patches.grid, -1).permute(0, 3, 1, 2)
        wide = torch.promote_types(own.dtype, torch.float32)
        own = F.interpolate(own.to(wide), grid, mode="bicubic", align_corners=False).to(table.dtype)
        return torch.cat((ahead, own.flatten(2)[0].t()))


class PatchEmbedding(nn.Module):
    """A vector for each patch: `weight` `[dim, channels, height, width]`, as of a convolution."""

    def __init__(self, config: Patches, dim: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, config.channels, *config.size, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, dtype=dtype)) if config.bias else None
        self.stride = config.stride

    def forward(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """`[pictures, channels, height, width]` -> `[pictures, patches, dim]`, row by row of the grid. Where
        patches don't overlap it is a product, and what is left over at the edges isn't seen."""
        if self.stride is not None:
            return F.conv2d(pixels, self.weight, self.bias, self.stride).flatten(2).mT
        (rows, columns), (height, width) = grid, self.weight.shape[2:]
        own = pixels[..., : rows * height, : columns * width].unflatten(3, (columns, width))
        own = own.unflatten(2, (rows, height)).permute(0, 2, 4, 1, 3, 5)  # [.., rows, columns, c, h, w]
        return F.linear(own.flatten(3).flatten(1, 2), self.weight.flatten(1), self.bias)

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}"


class PicturePooler(nn.Module):
    """One vector of each picture, whose patches stand behind `prefix` other tokens."""

    def __init__(self, config: Pooler, dim: int, prefix: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.of, self.prefix = config.of, prefix
        self.probe = ProbePooler(config.of, dim, dtype=dtype) if isinstance(config.of, Probe) else None
        self.after = None
        if isinstance(config.after, NormConfig):
            self.after = Norm(config.after, dim, dtype=dtype)
        elif config.after is not None:
            self.after = Transform(config.after, dim, config.size or dim, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[pictures, tokens, dim] -> [pictures, dim]`"""
        x = pool_picture(hidden, self.of, self.prefix) if self.probe is None else self.probe(hidden)
        return x if self.after is None else self.after(x)


def pool_picture(hidden: Tensor, how: str, prefix: int) -> Tensor:
    """One vector of each picture, `[pictures, tokens, dim] -> [pictures, dim]`: that of the "first" token,
    the mean of the "patches" behind `prefix` others, or both beside one another ("first, patches")."""
    parts = {
        "first": lambda: hidden[:, 0],
        "prefix": lambda: hidden[:, :prefix].mean(1),
        "patches": lambda: hidden[:, prefix:].mean(1),
    }
    return torch.cat([parts[part]() for part in how.split(", ")], -1)


class ProbePooler(nn.Module):
    """What a learned query finds in the tokens of each picture (SigLIP's head; Zhai et al. 2023)."""

    def __init__(self, config: Probe, dim: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, 1, dim, dtype=dtype))
        self.attention = CrossAttention(config.attn, dim, 0, dim, dtype=dtype)
        self.layernorm = Norm(config.norm, dim, dtype=dtype)
        self.mlp = PlainMlp(config.mlp, dim, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        pictures, tokens, _ = hidden.shape
        starts = torch.arange(pictures + 1, dtype=torch.int32, device=hidden.device)
        x = self.query.view(1, -1).expand(pictures, -1)
        batch = Batch(None, torch.zeros_like(starts[1:]), starts, 1, embeds=x)
        batch = replace(batch, source=Source(hidden.flatten(0, 1), starts * tokens, tokens))
        x = self.attention(x, batch)
        return self.mlp(x, norm=self.layernorm, residual=x)
