"""The stack of a speech encoder: waveforms to frames by convolutions, frames to tokens, and their
positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taut.batch import Batch
from taut.config import ModelConfig, Waves
from taut.config import Norm as NormConfig
from taut.errors import RequestError
from taut.kernels.act import ACTIVATIONS
from taut.layers.block import Stack
from taut.layers.linear import Linear
from taut.layers.norm import Norm

_NORM = NormConfig(1e-5, kind="layer", bias=True)
# Samples that are convolved together: of more, what the first layers make takes too much memory.
_TOGETHER = 1 << 19


class Speech(Stack):
    """Blocks over the tokens of clips, which `pack` makes: a row for each clip, of its own length."""

    def make_embedding(self, config: ModelConfig, dtype: torch.dtype | None) -> None:
        waves, dim = config.waves, config.dim
        self.hidden_token = nn.Parameter(torch.empty(dim, dtype=dtype)) if waves.hidden else None
        self.feature_extractor = WaveConvolutions(waves, dtype=dtype)
        self.feature_norm = Norm(waves.norm, waves.channels[-1], dtype=dtype) if waves.norm else None
        self.feature_projection = Linear(waves.channels[-1], dim, bias=True, dtype=dtype)
        self.pos_conv_embed = PositionConvolution(waves, dim, dtype=dtype)
        self.embed_layernorm = Norm(config.embed_norm, dim, dtype=dtype) if config.embed_norm else None

    def pack(
        self, clips: Sequence[Tensor], hidden_frames: Sequence[Tensor] | None = None
    ) -> tuple[Batch, Tensor]:
        """Clips `[samples]` of any lengths as a batch, and the features `[tokens, channels]` that its tokens
        were made of. `hidden_frames`: for each clip, a bool a frame, which are left out for the learned
        token. Raises `RequestError` for a clip too short for one frame."""
        features, counts = self.feature_extractor([c.to(self.feature_projection.bias.dtype) for c in clips])
        if self.feature_norm is not None:
            features = self.feature_norm(features)
        x = self.feature_projection(features)
        if hidden_frames is not None:
            if self.hidden_token is None:
                raise RequestError(
                    "mask_time_indices is given, and this model has no token for frames that are left out"
                )
            x = torch.where(torch.cat(list(hidden_frames))[:, None], self.hidden_token, x)
        x = x + self.pos_conv_embed(x, counts)
        if self.embed_layernorm is not None:
            x = self.embed_layernorm(x)
        starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=x.device)
        positions = [torch.arange(count, dtype=torch.int32, device=x.device) for count in counts]
        batch = Batch(
            ids=None,
            embeds=x,
            positions=torch.cat(positions) if positions else starts[:0],
            starts=starts,
            longest=max(counts, default=0),
        )
        return batch, features


class WaveConvolutions(nn.Module):
    """Convolutions over waveforms without padding, each clip by itself."""

    def __init__(self, config: Waves, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.config = config
        shapes = zip((1, *config.channels), config.channels, config.kernels, strict=False)
        self.conv_layers = nn.ModuleList(
            WaveConvolution(
                *shape,
                bias=config.bias,
                norm=config.normed == "layer" or index == 0,
                dtype=dtype,
            )
            for index, shape in enumerate(shapes)
        )

    def frames(self, samples: int) -> int:
        """How many frames a clip of so many samples gives."""
        for kernel, stride in zip(self.config.kernels, self.config.strides, strict=True):
            samples = (samples - kernel) // stride + 1 if samples >= kernel else 0
        return samples

    @property
    def least(self) -> int:
        """Samples that one frame needs."""
        samples = 1
        for kernel, stride in zip(self.config.kernels[::-1], self.config.strides[::-1], strict=True):
            samples = (samples - 1) * stride + kernel
        return samples

    def forward(self, clips: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
        """Frames of all clips `[samples]` end to end, `[tokens, channels]`, and how many each has."""
        counts = [self.frames(len(clip)) for clip in clips]
        if 0 in counts:
            at = counts.index(0)
            raise RequestError(
                f"input_values[{at}] is a clip of {len(clips[at])} samples, and one frame takes {self.least}"
            )
        made = [self._together(clips[i:j], counts[i:j]) for i, j in _groups([len(c) for c in clips])]
        weight = self.conv_layers[-1].weight
        return torch.cat(made) if made else weight.new_zeros(0, weight.shape[0]), counts

    def _together(self, clips: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """The frames of some clips. They are laid end to end, each at a multiple of all strides: then a frame
        that has samples of one clip alone is that clip's, and the others are dropped."""
        step = self.config.step
        begins = [0, *accumulate(-(-len(clip) // step) * step for clip in clips)]
        room = [end - begin for begin, end in pairwise(begins)]
        laid = [F.pad(clip, (0, size - len(clip))) for clip, size in zip(clips, room, strict=True)]
        x = torch.cat(laid)[None, None]  # [1, channels, samples]
        c, lengths = self.config, [len(clip) for clip in clips]
        act = ACTIVATIONS[c.act]
        for layer, kernel, stride in zip(self.conv_layers, c.kernels, c.strides, strict=True):
            x = F.conv1d(x, layer.weight, layer.bias, stride)
            lengths = [(length - kernel) // stride + 1 for length in lengths]
            begins = [begin // stride for begin in begins]
            if layer.layer_norm is not None and c.normed == "layer":
                x = layer.layer_norm(x.mT).mT
            elif layer.layer_norm is not None:
                x = _normed_over_time(x, begins, lengths, layer.layer_norm)
            x = act(x)
        return torch.cat([x[0, :, begin : begin + n] for begin, n in zip(begins, counts, strict=False)], 1).mT


class WaveConvolution(nn.Module):
    """The parameters of one convolution, `weight` `[out, in, kernel]`, and of the norm behind it."""

    def __init__(
        self, inner: int, out: int, kernel: int, *, bias: bool, norm: bool, dtype: torch.dtype | None = None
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, inner, kernel, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out, dtype=dtype)) if bias else None
        self.layer_norm = Norm(_NORM, out, dtype=dtype) if norm else None


class PositionConvolution(nn.Module):
    """What the frames around each one, within its row, say of its position: a convolution in groups of
    features, whose weights have a length of their own for each place of the kernel."""

    def __init__(self, config: Waves, dim: int, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.kernel, self.groups = config.positions
        self.act = ACTIVATIONS[config.act]
        self.bias = nn.Parameter(torch.empty(dim, dtype=dtype))
        self.length = nn.Parameter(torch.empty(1, 1, self.kernel, dtype=dtype))
        self.direction = nn.Parameter(torch.empty(dim, dim // self.groups, self.kernel, dtype=dtype))
        self.initial = {"length": 2 * (dim / (self.kernel * self.groups)) ** 0.5}

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """`[tokens, dim]` of packed rows with `counts` tokens. Between rows stand as many zeros as the kernel
        reaches, so that none sees another."""
        if not counts:  # which PyTorch's convolution refuses
            return x
        gap = self.kernel // 2
        row = torch.repeat_interleave(
            torch.tensor(counts, dtype=torch.long, device=x.device), output_size=len(x)
        )
        at = torch.arange(len(x), device=x.device) + row * gap
        laid = x.new_zeros(len(x) + gap * (len(counts) - 1), x.shape[1]).index_copy(0, at, x)
        made = F.conv1d(laid.mT[None], self.weight(), self.bias, padding=gap, groups=self.groups)[0].mT
        return self.act(made.index_select(0, at))

    def weight(self) -> Tensor:
        """`[dim, dim / groups, kernel]`"""
        direction = self.direction.to(torch.promote_types(self.direction.dtype, torch.float32))
        scale = self.length.to(direction.dtype) / direction.norm(dim=(0, 1), keepdim=True)
        return (direction * scale).to(self.direction.dtype)


def _normed_over_time(x: Tensor, begins: Sequence[int], lengths: Sequence[int], norm: Norm) -> Tensor:
    """Each channel of each clip normalised over that clip's frames; `x` `[1, channels, frames]`."""
    pieces = []
    for begin, end, length in zip(begins, [*begins[1:-1], x.shape[2]], lengths, strict=False):
        own = x[..., begin : begin + length]
        pieces.append(F.group_norm(own, own.shape[1], norm.weight, norm.bias, norm.config.eps))
        pieces.append(x[..., begin + length : end])
    return torch.cat(pieces, 2)


def _groups(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Neighbours with at most `_TOGETHER` samples in all, as first and one past the last; longer ones
    alone."""
    first, total = 0, 0
    for index, length in enumerate(lengths):
        if total and total + length > _TOGETHER:
            yield first, index
            first, total = index, 0
        total += length
    if lengths:
        yield first, len(lengths)
