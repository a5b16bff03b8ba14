"""Sampling on the device: one token a row by the row's own parameters and seed, without synchronisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taut.errors import RequestError


@dataclass(frozen=True)
class Sampling:
    """Parameters of each row, all `[rows]`. `temperature` float32, 0: greedy; `top_k` int32, 0: off; `top_p`
    float32, 1: off; `min_p` float32, 0: off; `seeds` and `steps` int64: a draw is a function of both."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    steps: Tensor


def signed(value: int) -> int:
    """`value` modulo 2**64 as a signed 64-bit integer."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >= 1 << 63 else value


GAMMA = signed(0x9E3779B97F4A7C15)
FIRST = signed(0xBF58476D1CE4E5B9)
SECOND = signed(0x94D049BB133111EB)


def _mixed(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 on int64 tensors (Steele, Lea, Flood 2014); arithmetic wraps."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * FIRST
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * SECOND
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform(seeds: Tensor, steps: Tensor) -> Tensor:
    """One float64 in [0, 1) for each (seed, step), both int64 `[rows]`: a hash, so it has no state and gives
    the same number on every device."""
    bits = _mixed(_mixed(seeds + GAMMA) + steps * GAMMA)
    return ((bits >> 12) & 0xFFFFFFFFFFFFF).to(torch.float64) * 2.0**-52


def sample_reference(logits: Tensor, how: Sampling) -> tuple[Tensor, Tensor]:
    """Tokens int64 `[rows]` for `logits` `[rows, vocab]`, and whether each row's largest logit is finite.

    Rows that sample divide by their temperature, then keep the `top_k` largest scores (and their equals), of
    these the fewest that hold `top_p` of the probability (of equal scores the larger id first), of these
    the ones with at least `min_p` of the largest probability; the token is the inverse of the cumulative
    sum, in the order of ids, at the row's uniform number.
    """
    logits = logits.float()
    vocab = logits.shape[1]
    peaks = logits.amax(-1)
    best = logits.argmax(-1)
    finite = peaks.isfinite()
    greedy = how.temperature <= 0
    values = torch.where(finite[:, None], logits, 0.0)
    values = values / torch.where(greedy, 1.0, how.temperature)[:, None]
    ordered, order = values.sort(dim=-1, stable=True)
    limited = (how.top_k > 0) & (how.top_k < vocab)
    least = ordered.gather(1, (vocab - how.top_k.long().clamp(1, vocab)).unsqueeze(1))
    values = values.masked_fill(limited[:, None] & (values < least), float("-inf"))
    ordered = ordered.masked_fill(limited[:, None] & (ordered < least), float("-inf"))
    mass = (ordered - ordered.logsumexp(-1, keepdim=True)).exp().double().flip(-1)
    before = (mass.cumsum(-1) - mass).flip(-1)  # probability of everything more probable
    limit = torch.where(how.top_p < 1, how.top_p.double(), float("inf"))[:, None]
    values = values.masked_fill((before >= limit).scatter(1, order, before >= limit), float("-inf"))
    peak = values.amax(-1, keepdim=True)
    values = values.masked_fill(values - peak < how.min_p.float().log()[:, None], float("-inf"))
    sums = (values - peak).exp().cumsum(-1, dtype=torch.float64)
    target = uniform(how.seeds, how.steps)[:, None] * sums[:, -1:]
    drawn = torch.searchsorted(sums, target, right=True).squeeze(1)
    return torch.where(greedy, best, drawn), finite


def sample(logits: Tensor, how: Sampling) -> tuple[Tensor, Tensor]:
    """As `sample_reference`, on a GPU in one launch that reads its parameters on the device, so that it can
    be replayed from a CUDA graph."""
    if logits.ndim != 2 or how.seeds.shape != logits.shape[:1]:
        raise RequestError(
            f"logits have shape {list(logits.shape)} for {how.seeds.numel()} rows of parameters; expected "
            "[rows, vocab]"
        )
    if not logits.is_cuda:
        return sample_reference(logits, how)
    from taut.kernels import sample_triton

    return sample_triton.sample(logits, how)
