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
    chunks share, by default a sixth of a chunk at each end; `return_timestamps`: True or "word", and
    `chunks` say when each segment or word was spoken; `return_language`: they say in which language too;
    `ignore_warning` is transformers', and changes nothing here; `timeout`: seconds to wait for an address.
    All other options are those of `generate` (`language`, `task` ...)."""

    return_language: bool | None = None
    ignore_warning: bool | None = None


@dataclass(frozen=True)
class Written:
    """What the model wrote of a piece: its tokens, in which second each ended where that was asked, and the
    token of the language that it began with where that is known."""

    tokens: list[int]
    ends: list[float] | None = None
    language: int | None = None


class WhisperRecognition(Generating, SpeechRecognition):
    """`SpeechRecognition` by Whisper: its decoder writes what the encoder hears, a window of 30 seconds at a
    time. Where nothing else is said, at most 256 tokens a window, by five beams."""

    settings = WhisperSettings
    fallbacks: ClassVar[Mapping[str, Any]] = {"max_new_tokens": 256, "num_beams": 5}
    taken = OWN
    budget: ClassVar[Mapping[str, int]] = {"cpu": 4, "cuda": 64}  # windows

    def check(self, settings: WhisperSettings) -> None:
        if settings.return_timestamps not in (None, False, True, "word"):
            raise RequestError(
                f"return_timestamps is {settings.return_timestamps!r}; of Whisper there are times of "
                "segments (True) and of words ('word')"
            )
        most = self.processor.chunk_length
        if settings.chunk_length_s and settings.chunk_length_s > most:
            raise RequestError(
                f"chunk_length_s is {settings.chunk_length_s}, and the model hears {most} seconds at a time; "
                "leave it out to have it go on from window to window by itself"
            )

    def piece(self, clip: np.ndarray, note: Any = None) -> Piece:
        """The spectrogram of a window, or of all of a longer clip, with the mask of what is sound."""
        options: dict[str, Any] = {"return_tensors": "pt", "return_attention_mask": True}
        if len(clip) > self.processor.n_samples:
            options |= {"truncation": False, "padding": "longest"}
        found = self.processor(clip, sampling_rate=self.processor.sampling_rate, **options)
        return Piece({name: value[0] for name, value in found.items()}, 1, note)

    def compute(self, pieces: Sequence[Piece], settings: WhisperSettings) -> Sequence[Written]:
        """What the model writes of each piece; those of one window go together, and longer ones do."""
        options, times = self.generation(settings), self._times(settings)
        options |= {"return_dict_in_generate": False, "return_token_timestamps": times == "word"}
        options["return_segments"] = times == "word" or bool(settings.return_language)
        found: list[Any] = [None] * len(pieces)
        window = self.processor.nb_max_frames
        for long in (False, True):
            rows = [
                row
                for row, piece in enumerate(pieces)
                if (piece.inputs["input_features"].shape[1] > window) == long
            ]
            if rows:
                options["return_timestamps"] = bool(times) or long  # by which it goes on
                written = self._write([pieces[row].inputs for row in rows], options)
                for row, one in zip(rows, written, strict=True):
                    found[row] = one
        return found

    def _write(self, heard: Sequence[Mapping[str, Tensor]], options: Mapping[str, Any]) -> list[Written]:
        """What the model writes of spectrograms `[mel bins, frames]`."""
        rows = [one["input_features"].T for one in heard]
        frames = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).mT.to(self.device, self.dtype)
        masks = [one["attention_mask"] for one in heard]
        mask = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
        found = self.model.generate(frames, attention_mask=mask, **options)
        if not isinstance(found, Mapping):
            return [Written(row) for row in found.tolist()]
        written = []
        for row, segments in zip(found["sequences"].tolist(), found["segments"], strict=True):
            ends = None
            if options["return_token_timestamps"]:
                ends = [time for one in segments for time in one["token_timestamps"].tolist()]
            written.append(Written(row, ends, self._language(segments)))
        return written

    def _language(self, segments: Sequence[Mapping[str, Any]]) -> int | None:
        """The token of the language that the decoder began with, if it began with one."""
        if not segments:
            return None
        known = set((self.model.generation_config.to_dict().get("lang_to_id") or {}).values())
        return next((token for token in segments[0]["result"].tolist() if token in known), None)

    def finish(
        self, item: Any, pieces: Sequence[Piece], outputs: Sequence[Written], settings: WhisperSettings
    ) -> dict[str, Any]:
        rate, positions = self.processor.sampling_rate, self.model.config.encoder.context
        transcript = Transcript(
            self.tokenizer,
            LANGUAGES,
            times=self._times(settings),
            precision=self.processor.chunk_length / positions,
            window=positions,
        )
        for piece, written in zip(pieces, outputs, strict=True):
            cut = piece.note
            seconds = None if cut is None else (cut.samples / rate, cut.left / rate, cut.right / rate)
            transcript.add(written.tokens, seconds, written.ends, written.language)
        return {**transcript.result(language=bool(settings.return_language)), **more(item, len(pieces))}

    def _times(self, settings: WhisperSettings) -> bool | str:
        said = self.model.generation_config.to_dict().get("return_timestamps")
        return settings.return_timestamps or said or False
