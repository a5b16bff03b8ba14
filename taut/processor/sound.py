"""Feature extractors: sounds to the waveforms or spectrograms that a model takes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch

from taut.config import Reader
from taut.errors import MediaError
from taut.processor.base import Preprocessor
from taut.processor.mel import kaldi_fbank, whisper_log_mel
from taut.processor.output import BatchFeature
from taut.processor.read import each, is_source, sounds

_PADDING = {True: "longest", "max_length": "max_length", False: "do_not_pad", None: "do_not_pad"}


class SoundExtractor(Preprocessor):
    """What feature extractors share: reading sounds, and padding them."""

    kind_key = "feature_extractor_type"
    sampling_rate: int
    padding_value: float
    padding_side: str
    return_attention_mask: bool
    shared: ClassVar[Mapping[str, Any]] = {
        "sampling_rate": 16000,
        "padding_value": 0.0,
        "padding_side": "right",
        "return_attention_mask": False,
    }

    def read(self, r: Reader) -> dict[str, Any]:
        r.ignore("return_tensors", "device")
        return {
            "sampling_rate": r.int("sampling_rate"),
            "padding_value": r.float("padding_value", positive=False),
            "padding_side": r.choice("padding_side", ("left", "right")),
            "return_attention_mask": r.bool("return_attention_mask"),
        }

    def clips(self, given: Any, sampling_rate: int | None, timeout: float | None = 30.0) -> list[np.ndarray]:
        """The sounds that a caller gave, float32 `[samples]` at this model's rate."""
        first = given[0] if isinstance(given, (list, tuple)) and len(given) else given
        if sampling_rate is None and not is_source(first) and not isinstance(first, Mapping):
            warnings.warn(
                f"arrays are taken to be sounds at {self.sampling_rate} Hz; pass sampling_rate= to be sure",
                stacklevel=3,
            )
        return sounds(given, self.sampling_rate, sampling_rate, timeout)

    def cut(
        self, rows: list[np.ndarray], truncation: bool, max_length: int | None, multiple: int | None
    ) -> list[np.ndarray]:
        """Clips of at most `max_length` samples, rounded up to a multiple, if asked for."""
        if not truncation:
            return rows
        if max_length is None:
            raise MediaError("truncation=True needs max_length=, in samples")
        return [row[: _rounded(max_length, multiple)] for row in rows]

    def padded(
        self, rows: list[np.ndarray], padding: bool | str, max_length: int | None, multiple: int | None
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Clips filled to one length, as asked, and the mask of what is theirs."""
        how = _PADDING.get(padding, padding)
        if how not in _PADDING.values():
            raise MediaError(f"padding is {padding!r}; known: True, False, {', '.join({*_PADDING.values()})}")
        if how == "max_length" and max_length is None:
            raise MediaError("padding='max_length' needs max_length=, in samples")
        width = 0 if how == "do_not_pad" else max_length
        if how == "longest":
            width = max((len(row) for row in rows), default=0)
        out, masks = [], []
        for row in rows:
            missing = max(_rounded(width, multiple) - len(row), 0)
            edges = (0, missing) if self.padding_side == "right" else (missing, 0)
            out.append(np.pad(row, edges, constant_values=self.padding_value))
            masks.append(np.pad(np.ones(len(row), np.int32), edges))
        return out, masks


def _rounded(length: int, multiple: int | None) -> int:
    return -(-length // multiple) * multiple if multiple else length


def _normalised(clip: np.ndarray) -> np.ndarray:
    return (clip - clip.mean()) / np.sqrt(clip.var() + 1e-7)


class Wav2Vec2FeatureExtractor(SoundExtractor):
    """Waveforms as `input_values` `[clips, samples]`, each less its mean and by its deviation where
    `do_normalize` says so; of `wav2vec2`, `hubert` and `wavlm`.

    Each clip is normalised by itself, whatever stands beside it, and a batch in which clips were padded has
    its `attention_mask`: with it a model gives each clip what it gives that clip alone.
    """

    models = ("wav2vec2", "hubert", "wavlm")
    input_names = ("input_values", "attention_mask")
    defaults: ClassVar[Mapping[str, Any]] = {"do_normalize": True, "feature_size": 1}

    def read(self, r: Reader) -> dict[str, Any]:
        r.only("feature_size", 1)
        return {**super().read(r), "do_normalize": r.bool("do_normalize")}

    def __call__(
        self,
        raw_speech: Any,
        padding: bool | str = False,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        sampling_rate: int | None = None,
        timeout: float | None = 30.0,
    ) -> BatchFeature:
        """`input_values` float32 and, where asked for or needed, `attention_mask` int32.

        `raw_speech` is one sound or a list of them (see `taut.processor.read.sounds`); files are brought to
        the model's rate, arrays have to be at it. `padding`, `max_length` (samples) and `truncation` mean
        what they mean for a tokenizer. `return_attention_mask` None: what the settings say, and always for a
        batch with padding.
        """
        clips = self.clips(raw_speech, sampling_rate, timeout)
        clips = self.cut(clips, truncation, max_length, pad_to_multiple_of)
        if self.do_normalize:
            clips = [_normalised(clip) for clip in clips]
        rows, masks = self.padded(clips, padding, max_length, pad_to_multiple_of)
        data = {"input_values": rows}
        wanted = return_attention_mask
        if wanted is None:
            wanted = self.return_attention_mask or any(not mask.all() for mask in masks)
        if wanted:
            data["attention_mask"] = masks
        return BatchFeature.of(data, return_tensors)


class WhisperFeatureExtractor(SoundExtractor):
    """Log-mel spectrograms as `input_features` `[clips, feature_size, frames]`, by default of 30 seconds,
    silence filling what a clip hasn't."""

    models = ("whisper",)
    input_names = ("input_features",)
    defaults: ClassVar[Mapping[str, Any]] = {
        "feature_size": 80,
        "hop_length": 160,
        "chunk_length": 30,
        "n_fft": 400,
        "dither": 0.0,
    }

    def read(self, r: Reader) -> dict[str, Any]:
        r.ignore("mel_filters", "n_samples", "nb_max_frames")
        found = super().read(r)
        found |= {name: r.int(name) for name in ("feature_size", "hop_length", "chunk_length", "n_fft")}
        return {**found, "dither": r.float("dither", positive=False)}

    @property
    def n_samples(self) -> int:
        """Samples of a whole window."""
        return self.chunk_length * self.sampling_rate

    @property
    def nb_max_frames(self) -> int:
        """Frames of a whole window."""
        return self.n_samples // self.hop_length

    def __call__(
        self,
        raw_speech: Any,
        truncation: bool = True,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        padding: bool | str = "max_length",
        max_length: int | None = None,
        sampling_rate: int | None = None,
        do_normalize: bool | None = None,
        device: str | torch.device = "cpu",
        timeout: float | None = 30.0,
    ) -> BatchFeature:
        """`input_features` float32 and, where asked for, `attention_mask` int32 `[clips, frames]`.

        By default each clip becomes a window of `chunk_length` seconds (`max_length` samples); with
        `padding="longest"` and `truncation=False` all of it. `do_normalize` brings the waveform to mean 0 and
        deviation 1 first. The spectrograms are computed on `device`.
        """
        clips = self.clips(raw_speech, sampling_rate, timeout)
        length = max_length or self.n_samples
        clips = self.cut(clips, truncation, length, pad_to_multiple_of)
        if do_normalize:
            clips = [_normalised(clip) for clip in clips]
        rows, masks = self.padded(clips, padding, length, pad_to_multiple_of)
        settings = {"n_fft": self.n_fft, "hop": self.hop_length, "rate": self.sampling_rate}

        def log_mel(sound: list[np.ndarray]) -> np.ndarray:
            if len(sound[0]) <= self.n_fft // 2:
                raise MediaError(
                    f"the sound has {len(sound[0])} samples, too few for a frame of {self.n_fft}; pad it"
                )
            batch = torch.from_numpy(np.stack(sound)).to(device)
            return whisper_log_mel(batch, self.feature_size, dither=self.dither, **settings).cpu().numpy()

        even = len({len(row) for row in rows}) == 1
        features = list(log_mel(rows)) if even else each(rows, "sounds", lambda row: log_mel([row])[0])
        data = {"input_features": features}
        if self.return_attention_mask if return_attention_mask is None else return_attention_mask:
            data["attention_mask"] = [
                mask[:: self.hop_length][: len(mask) // self.hop_length] for mask in masks
            ]
        return BatchFeature.of(data, return_tensors)


class ASTFeatureExtractor(SoundExtractor):
    """Kaldi's log-mel filter banks as `input_values` `[clips, max_length, num_mel_bins]`, cut or filled with
    silence to `max_length` frames of 10 ms; of `audio-spectrogram-transformer`."""

    models = ("audio-spectrogram-transformer",)
    input_names = ("input_values",)
    defaults: ClassVar[Mapping[str, Any]] = {
        "feature_size": 1,
        "num_mel_bins": 128,
        "max_length": 1024,
        "do_normalize": True,
        "mean": -4.2677393,  # of AudioSet
        "std": 4.5689974,
    }

    def read(self, r: Reader) -> dict[str, Any]:
        r.only("feature_size", 1)
        found = super().read(r)
        found |= {"num_mel_bins": r.int("num_mel_bins"), "max_length": r.int("max_length")}
        found |= {"do_normalize": r.bool("do_normalize"), "mean": r.float("mean", positive=False)}
        return {**found, "std": r.float("std")}

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        timeout: float | None = 30.0,
    ) -> BatchFeature:
        """`input_values` float32, of one sound or a list of them (see `taut.processor.read.sounds`)."""
        clips = self.clips(raw_speech, sampling_rate, timeout)
        return BatchFeature.of({"input_values": each(clips, "sounds", self._features)}, return_tensors)

    def _features(self, clip: np.ndarray) -> np.ndarray:
        if len(clip) < 400:
            raise MediaError(f"the sound has {len(clip)} samples, too few for a frame of 400; pad it")
        frames = kaldi_fbank(torch.from_numpy(clip), self.num_mel_bins, self.sampling_rate)[: self.max_length]
        values = np.pad(frames.numpy(), ((0, self.max_length - len(frames)), (0, 0)))
        if self.do_normalize:
            values = (values - np.float32(self.mean)) / np.float32(self.std * 2)
        return values
