"""`Rotary`: the angles of each token for one rotary embedding, with every scaling in use."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from taut.batch import Batch
from taut.config import Dynamic, Linear, Llama3, LongRope, Rope, Yarn
from taut.kernels.dispatch import ops


def base_frequencies(dim: int, theta: float) -> Tensor:
    """Angle per position of each feature pair, `theta ** (-2i / dim)`: float32 `[dim / 2]`."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))


def _llama3(base: Tensor, s: Llama3) -> Tensor:
    wavelength = 2 * math.pi / base
    smooth = ((s.context / wavelength - s.low) / (s.high - s.low)).clamp(0, 1)
    return base * (smooth + (1 - smooth) / s.factor)


def _yarn(base: Tensor, s: Yarn, rope: Rope) -> Tensor:
    def pair(rotations: float) -> float:  # the feature pair that turns this often over the context
        return rope.dim * math.log(s.context / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair(s.beta_fast), pair(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = (torch.arange(rope.dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    return torch.lerp(base, base / s.factor, ramp.clamp(0, 1))


def _frequencies(rope: Rope) -> tuple[Tensor, float]:
    """Scaled frequencies of a `Rope`, and the magnitude of its cos and sin."""
    base, scaling = base_frequencies(rope.dim, rope.theta), rope.scaling
    match scaling:
        case Linear():
            return base / scaling.factor, 1.0
        case Llama3():
            return _llama3(base, scaling), 1.0
        case Yarn():
            return _yarn(base, scaling, rope), scaling.attention_factor
        case LongRope():  # entry 0 for rows within the trained context, entry 1 beyond it
            return base / torch.tensor([scaling.short, scaling.long]), scaling.attention_factor
    return base, 1.0


class Rotary:
    """Angles for one `Rope`. Not a module: its frequencies are float32 whatever the model's dtype."""

    def __init__(self, rope: Rope):
        self.rope = rope
        with torch.device("cpu"):  # models are built under the meta device
            base, self.magnitude = _frequencies(rope)
        self._by_device = {base.device: base}

    def frequencies(self, batch: Batch, device: torch.device) -> Tensor:
        """`[dim / 2]`, or `[tokens, dim / 2]` where they depend on the length of each token's row."""
        if device not in self._by_device:
            self._by_device[device] = self._by_device[torch.device("cpu")].to(device)
        base, scaling = self._by_device[device], self.rope.scaling
        if not isinstance(scaling, Dynamic | LongRope):
            return base
        lengths = token_totals(batch)
        if isinstance(scaling, LongRope):
            return base[(lengths > scaling.context).long()]
        # NTK-aware: a longer row stretches the base so that its slowest pair turns no further than trained.
        stretch = scaling.factor * lengths.clamp(min=scaling.context) / scaling.context - (scaling.factor - 1)
        dim = self.rope.dim
        theta = self.rope.theta * stretch ** (dim / (dim - 2))
        return 1.0 / (theta[:, None] ** (torch.arange(0, dim, 2, device=device).float() / dim))

    def __call__(self, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin `[tokens, 1, dim]` in `dtype`, laid out as `kernels.rope.rotate` takes them."""
        frequencies = self.frequencies(batch, batch.positions.device)
        return ops("rope", frequencies).angles(batch.positions, frequencies, self.magnitude, dtype)


def token_totals(batch: Batch) -> Tensor:
    """Final length of the row each token belongs to, float32 `[tokens]`."""
    counts = batch.starts.diff()
    if batch.totals is not None:
        totals = batch.totals
    else:
        last = (batch.starts[1:] - 1).clamp(min=0).long()
        totals = batch.positions[last] + 1 if batch.tokens else counts
    return totals.float().repeat_interleave(counts.long(), output_size=batch.tokens)
