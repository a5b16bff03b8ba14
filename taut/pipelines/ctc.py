"""Speech to its text by models that score each frame for characters (CTC; Graves et al. 2006)."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from taut.errors import RequestError
from taut.pipelines.audio import HearingPipeline
from taut.pipelines.base import Piece
from taut.pipelines.speech import SpeechRecognition, SpeechSettings, more


class CtcRecognition(SpeechRecognition, HearingPipeline):
    """`SpeechRecognition` by a model that scores each frame for characters: the best of each, where repeats
    count once."""

    @property
    def step(self) -> int:
        """Samples from one frame to the next."""
        return prod(self.model.config.waves.strides)

    def check(self, settings: SpeechSettings) -> None:
        if settings.return_timestamps not in (None, False, "char", "word"):
            raise RequestError(
                f"return_timestamps is {settings.return_timestamps!r}; a model that scores characters has "
                "times of 'char' and 'word'"
            )

    def compute(self, pieces: Sequence[Piece], settings: SpeechSettings) -> Sequence[list[int]]:
        """The best character of each frame of each chunk."""
        best = self.run(pieces).logits.argmax(-1).cpu()
        return [row[: piece.size].tolist() for row, piece in zip(best, pieces, strict=True)]

    def finish(
        self, item: Any, pieces: Sequence[Piece], outputs: Sequence[list[int]], settings: SpeechSettings
    ) -> dict[str, Any]:
        frames: list[int] = []
        for piece, found in zip(pieces, outputs, strict=True):
            cut = piece.note
            if cut is None:
                frames += found
                continue
            count = round(cut.samples / self.step)
            left, right = (round(side / cut.samples * count) for side in (cut.left, cut.right))
            frames += found[left : count - right]
        result: dict[str, Any] = {"text": self.tokenizer.decode(frames)}
        if kind := settings.return_timestamps:
            name, seconds = f"{kind}_offsets", self.step / self.processor.sampling_rate
            result["chunks"] = [
                {"text": one[kind], "timestamp": (one["start_offset"] * seconds, one["end_offset"] * seconds)}
                for one in self.tokenizer.decode(frames, **{f"output_{name}": True})[name]
            ]
        return {**result, **more(item, len(pieces))}
