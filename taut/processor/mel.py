"""Mel filters, and the log-mel spectrograms of Whisper and of Kaldi."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

# Slaney's mel scale (Auditory Toolbox, 1998) is linear up to 1 kHz, which is 15 mel, then logarithmic.
_KNEE_HZ, _KNEE_MEL = 1000.0, 15.0
_STEP = np.log(6.4) / 27.0


def slaney_mel(hertz: np.ndarray) -> np.ndarray:
    """Hertz on Slaney's mel scale."""
    linear = hertz * (_KNEE_MEL / _KNEE_HZ)
    return np.where(hertz < _KNEE_HZ, linear, _KNEE_MEL + np.log(np.maximum(hertz, 1e-9) / _KNEE_HZ) / _STEP)


def slaney_hertz(mel: np.ndarray) -> np.ndarray:
    """The reverse of `slaney_mel`."""
    linear = mel * (_KNEE_HZ / _KNEE_MEL)
    return np.where(mel < _KNEE_MEL, linear, _KNEE_HZ * np.exp(_STEP * (mel - _KNEE_MEL)))


def kaldi_mel(hertz: np.ndarray) -> np.ndarray:
    """Hertz on Kaldi's mel scale."""
    return 1127.0 * np.log(1.0 + hertz / 700.0)


def triangles(bins: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Triangular filters float64 `[bins, filters]`: filter i rises from `edges[i]` to 1 at `edges[i + 1]` and
    falls to `edges[i + 2]`; `bins` and `edges` on one scale."""
    up = (bins[:, None] - edges[None, :-2]) / np.diff(edges)[:-1]
    down = (edges[None, 2:] - bins[:, None]) / np.diff(edges)[1:]
    return np.maximum(0.0, np.minimum(up, down))


@lru_cache(maxsize=8)
def whisper_filters(mels: int, n_fft: int, rate: int) -> Tensor:
    """float32 `[mels, n_fft / 2 + 1]`: on Slaney's scale up to 8 kHz, each of equal area."""
    edges = slaney_hertz(np.linspace(0.0, float(slaney_mel(np.array(8000.0))), mels + 2))
    filters = triangles(np.linspace(0, rate // 2, 1 + n_fft // 2), edges)
    return torch.from_numpy((filters * (2.0 / (edges[2:] - edges[:-2]))).T.astype(np.float32).copy())


def whisper_log_mel(
    sound: Tensor, mels: int, *, n_fft: int, hop: int, rate: int, dither: float = 0.0
) -> Tensor:
    """Whisper's features `[clips, mels, samples / hop]` of `sound` float32 `[clips, samples]` (Radford et al.
    2022): log10 of the mel power, at most 8 below each clip's loudest, then `(x + 4) / 4`."""
    if dither:
        sound = sound + dither * torch.randn_like(sound)
    window = torch.hann_window(n_fft, device=sound.device)
    bins = torch.stft(sound, n_fft, hop, window=window, return_complex=True)[..., :-1]
    power = (bins.abs() ** 2).contiguous()
    log = (whisper_filters(mels, n_fft, rate).to(sound.device) @ power).clamp(min=1e-10).log10()
    log = torch.maximum(log, log.amax((1, 2), keepdim=True) - 8.0)
    return (log + 4.0) / 4.0


@lru_cache(maxsize=8)
def kaldi_filters(mels: int, n_fft: int, rate: int) -> Tensor:
    """float64 `[n_fft / 2 + 1, mels]`: triangles on Kaldi's scale, from 20 Hz to half the rate."""
    bins = kaldi_mel(np.arange(1 + n_fft // 2) * (rate / n_fft))
    low, high = kaldi_mel(np.array([20.0, rate // 2]))
    return torch.from_numpy(triangles(bins, np.linspace(low, high, mels + 2)))


def kaldi_fbank(sound: Tensor, mels: int, rate: int) -> Tensor:
    """Kaldi's log-mel filter bank, float32 `[frames, mels]`, of `sound` `[samples]`, in frames of 400 samples
    every 160: each less its mean, pre-emphasised by 0.97 and under a Hann window."""
    frames = sound.double().unfold(0, 400, 160)
    frames = frames - frames.mean(1, keepdim=True)
    before = torch.cat((frames[:, :1], frames[:, :-1]), 1)
    window = torch.hann_window(400, periodic=False, dtype=torch.float64, device=sound.device)
    power = torch.fft.rfft((frames - 0.97 * before) * window, 512).abs() ** 2
    floor = torch.finfo(torch.float32).eps
    return (power @ kaldi_filters(mels, 512, rate).to(sound.device)).clamp(min=floor).log().float()
