"""Speech to its text, in chunks that overlap where it is long, with the times of its words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from taut.errors import RequestError
from taut.pipelines.base import Piece, Settings
from taut.pipelines.sounds import SoundPipeline


@dataclass(frozen=True)
class SpeechSettings(Settings):
    """`chunk_length_s`: seconds of a chunk that long speech is cut into, None or 0 for all at once;
    `stride_length_s`: seconds at its ends, or of its left and its right end, that chunks share and that are
    read for their context, by default a sixth of a chunk each; `return_timestamps`: "char" or "word", and
    `chunks` say when each was spoken; `timeout`: seconds to wait for an address."""

    chunk_length_s: float | None = None
    stride_length_s: float | Sequence[float] | None = None
    return_timestamps: bool | str | None = None
    timeout: float | None = 30.0


@dataclass(frozen=True)
class Cut:
    """A chunk's samples, and how many of them at its ends other chunks have too."""

    samples: int
    left: int
    right: int


class SpeechRecognition(SoundPipeline):
    """Speech to `{"text"}`, with `return_timestamps` also `chunks`, `[{"text", "timestamp": (start, end)}]`
    in seconds. An item that is a dict may have a `stride`, samples at its left and right end that are context
    alone, and more, which its result then has too."""

    task = "automatic-speech-recognition"
    settings = SpeechSettings

    @property
    def step(self) -> int:
        """Samples that a chunk has a multiple of."""
        return 1

    def prepare_one(self, item: Any, settings: SpeechSettings) -> list[Piece]:
        clip = self.hear(item, settings.timeout)
        stride = item.get("stride") if isinstance(item, Mapping) else None
        if stride is not None:
            ratio = self.processor.sampling_rate / item["sampling_rate"]
            left, right = (round(side * ratio) for side in stride)
            if left + right > len(clip):
                raise RequestError(
                    f"stride is {tuple(stride)}, and the sound has {len(clip)} samples; make it less"
                )
            return [self.piece(clip, Cut(len(clip), left, right))]
        if not settings.chunk_length_s:
            return [self.piece(clip)]
        return [self.piece(part, cut) for part, cut in self._chunks(clip, settings)]

    def _chunks(self, clip: np.ndarray, settings: SpeechSettings) -> Iterator[tuple[np.ndarray, Cut]]:
        """The chunks of a clip, each with what it shares with its neighbours."""
        stride = settings.stride_length_s
        stride = settings.chunk_length_s / 6 if stride is None else stride
        sides = (stride, stride) if isinstance(stride, (int, float)) else tuple(stride)
        rate, step = self.processor.sampling_rate, self.step
        length, left, right = (round(side * rate / step) * step for side in (settings.chunk_length_s, *sides))
        if length <= left + right:
            raise RequestError(
                f"chunk_length_s is {settings.chunk_length_s}, stride_length_s {settings.stride_length_s}: a "
                "chunk has to be longer than what it shares at both ends"
            )
        for begin in range(0, len(clip), length - left - right):
            part, last = clip[begin : begin + length], begin + length >= len(clip)
            cut = Cut(len(part), left if begin else 0, 0 if last else right)
            if cut.samples > cut.left:
                yield part, cut
            if last:
                return


def more(item: Any, times: int) -> dict[str, list[Any]]:
    """What a dict has beside its sound, once for each chunk, as in transformers."""
    if not isinstance(item, Mapping):
        return {}
    own = {"raw", "array", "sampling_rate", "stride"} | ({"path"} if item.get("raw") is None else set())
    return {name: [value] * times for name, value in item.items() if name not in own}
