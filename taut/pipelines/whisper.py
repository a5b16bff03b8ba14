"""Speech to its text by Whisper, whose decoder writes it, with the times of its segments or words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from taut.engine.transcribe import OWN
from taut.errors import RequestError
from taut.pipelines.base import Piece
from taut.pipelines.generation import GenerateSettings, Generating
from taut.pipelines.speech import SpeechRecognition, SpeechSettings, more
from taut.pipelines.transcript import Transcript
from taut.tokenizer.languages import LANGUAGES


@dataclass(frozen=True)
class WhisperSettings(SpeechSettings, GenerateSettings):
    """`chunk_length_s`: seconds of a chunk that long speech is cut into, None or 0 for windows of 30 seconds,
    each of which begins where the model says that the one before ended; `stride_length_s`: seconds that
    chunks share, by default a sixth of a chunk at each end; `return_timestamps`: True, and `chunks` say when
    each segment was spoken; `return_language`: they say in which language too; `ignore_warning` is
    transformers', and changes nothing here; `timeout`: seconds to wait for an address. All other options are
    those of `generate` (`language`, `task` ...)."""

    return_language: bool | None = None
    ignore_warning: bool | None = None


class WhisperRecognition(Generating, SpeechRecognition):
    """`SpeechRecognition` by Whisper: its decoder writes what the encoder hears, a window of 30 seconds at a
    time. Where nothing else is said, at most 256 tokens a window, by five beams."""

    settings = WhisperSettings
    fallbacks: ClassVar[Mapping[str, Any]] = {"max_new_tokens": 256, "num_beams": 5}
    taken = OWN
    budget: ClassVar[Mapping[str, int]] = {"cpu": 4, "cuda": 64}  # windows

    def check(self, settings: WhisperSettings) -> None:
        if settings.return_timestamps not in (None, False, True):
            raise RequestError(
                f"return_timestamps is {settings.return_timestamps!r}; of Whisper there are times of "
                "segments (True), and none of words or characters yet"
            )
        most = self.processor.chunk_length
        if settings.chunk_length_s and settings.chunk_length_s > most:
            raise RequestError(
                f"chunk_length_s is {settings.chunk_length_s}, and the model hears {most} seconds at a time; "
                "leave it out to have it go on from window to window by itself"
            )

    def piece(self, clip: np.ndarray, note: Any = None) -> Piece:
        """The spectrogram of a window, or of all of a longer clip."""
        options: dict[str, Any] = {"sampling_rate": self.processor.sampling_rate, "return_tensors": "pt"}
        if len(clip) > self.processor.n_samples:
            options |= {"truncation": False, "padding": "longest"}
        return Piece({"input_features": self.processor(clip, **options)["input_features"][0]}, 1, note)

    def compute(self, pieces: Sequence[Piece], settings: WhisperSettings) -> Sequence[list[int]]:
        """The tokens that the model writes of each piece; those of one window go together, and longer ones
        do."""
        options, times = self.generation(settings), self._times(settings)
        options |= {"return_segments": bool(settings.return_language), "return_dict_in_generate": False}
        found: list[Any] = [None] * len(pieces)
        window = self.processor.nb_max_frames
        for long in (False, True):
            rows = [
                row
                for row, piece in enumerate(pieces)
                if (piece.inputs["input_features"].shape[1] > window) == long
            ]
            if rows:
                heard = [pieces[row].inputs["input_features"] for row in rows]
                options["return_timestamps"] = times or long  # by which it goes on
                for row, one in zip(rows, self._write(heard, options), strict=True):
                    found[row] = one
        return found

    def _write(self, heard: Sequence[Tensor], options: Mapping[str, Any]) -> list[list[int]]:
        """The tokens that the model writes of spectrograms `[mel bins, frames]`."""
        counts = torch.tensor([one.shape[1] for one in heard])
        frames = torch.nn.utils.rnn.pad_sequence([one.T for one in heard], batch_first=True).mT
        mask = (torch.arange(frames.shape[2]) < counts[:, None]).long()
        found = self.model.generate(frames.to(self.device, self.dtype), attention_mask=mask, **options)
        if not isinstance(found, Mapping):
            return found.tolist()
        rows = zip(found["sequences"].tolist(), found["segments"], strict=True)
        return [self._language(segments) + row for row, segments in rows]

    def _language(self, segments: Sequence[Mapping[str, Any]]) -> list[int]:
        """The token of the language that the decoder began with, if it began with one."""
        if not segments:
            return []
        known = set((self.model.generation_config.to_dict().get("lang_to_id") or {}).values())
        return [token for token in segments[0]["result"].tolist() if token in known][:1]

    def finish(
        self, item: Any, pieces: Sequence[Piece], outputs: Sequence[list[int]], settings: WhisperSettings
    ) -> dict[str, Any]:
        rate, positions = self.processor.sampling_rate, self.model.config.encoder.context
        transcript = Transcript(
            self.tokenizer,
            LANGUAGES,
            times=self._times(settings),
            precision=self.processor.chunk_length / positions,
            window=positions,
        )
        for piece, tokens in zip(pieces, outputs, strict=True):
            cut = piece.note
            seconds = None if cut is None else (cut.samples / rate, cut.left / rate, cut.right / rate)
            transcript.add(tokens, seconds)
        return {**transcript.result(language=bool(settings.return_language)), **more(item, len(pieces))}

    def _times(self, settings: WhisperSettings) -> bool:
        said = self.model.generation_config.to_dict().get("return_timestamps")
        return bool(settings.return_timestamps or said)
