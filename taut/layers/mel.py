"""The stack of an encoder of log-mel spectrograms: two convolutions, positions in time, and blocks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taut.batch import Batch, Padding
from taut.config import ModelConfig
from taut.errors import RequestError
from taut.layers.block import Stack
from taut.layers.embedding import PositionEmbedding


class MelEncoder(Stack):
    """Blocks over the tokens of spectrograms, which `pack` makes: a row for each, a token for two frames."""

    def make_embedding(self, config: ModelConfig, dtype: torch.dtype | None) -> None:
        self.conv1 = nn.Conv1d(config.mel_bins, config.dim, 3, padding=1, dtype=dtype)
        self.conv2 = nn.Conv1d(config.dim, config.dim, 3, stride=2, padding=1, dtype=dtype)
        self.embed_positions = TimeEmbedding(config.positions, config.dim, dtype=dtype)

    @property
    def frames(self) -> int:
        """Frames of the longest spectrogram."""
        return 2 * self.config.context

    def pack(self, features: Tensor) -> tuple[Batch, Padding]:
        """Spectrograms `[clips, bins, frames]`, floats, as a batch with a row each, and the way back. Raises
        `RequestError` for what doesn't fit the config."""
        bins = self.config.mel_bins
        if features.dim() != 3 or features.shape[1] != bins or not features.is_floating_point():
            raise RequestError(
                f"input_features is {features.dtype} {list(features.shape)}; expected floats [clips, {bins}, "
                "frames], as a feature extractor gives"
            )
        if not 1 <= features.shape[2] <= self.frames:
            raise RequestError(
                f"input_features has {features.shape[2]} frames, and the encoder takes 1 to {self.frames} at "
                "a time; generate takes more"
            )
        weight = self.conv1.weight
        x = F.gelu(self.conv1(features.to(weight.device, weight.dtype)))
        x = F.gelu(self.conv2(x)).mT  # [clips, tokens, dim]
        clips, tokens = x.shape[:2]
        x = x + self.embed_positions.weight[:tokens]
        batch = Batch(
            ids=None,
            embeds=x.flatten(0, 1),
            positions=torch.arange(tokens, dtype=torch.int32, device=x.device).repeat(clips),
            starts=torch.arange(clips + 1, dtype=torch.int32, device=x.device) * tokens,
            longest=tokens if clips else 0,
        )
        return batch, Padding(None, clips, tokens)


class TimeEmbedding(PositionEmbedding):
    """Sinusoidal positions whose longest wave is 10000 positions long, over 2 pi."""

    def compute(self) -> None:
        count, dim = self.weight.shape
        steps = torch.arange(dim // 2, dtype=torch.float64) / max(dim // 2 - 1, 1)
        angles = torch.arange(count, dtype=torch.float64)[:, None] * torch.exp(-math.log(10000.0) * steps)
        with torch.no_grad():
            self.weight.copy_(torch.cat((angles.sin(), angles.cos()), 1).float())
