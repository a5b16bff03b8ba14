"""Sounds to labels, by encoders of waveforms and of spectrograms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taut.pipelines.base import Piece
from taut.pipelines.classification import MediaClassificationSettings, apply, labelled
from taut.pipelines.sounds import SoundPipeline


class HearingPipeline(SoundPipeline):
    """A pipeline whose model is an encoder of sounds."""

    def features(self, clip: np.ndarray) -> Tensor:
        """What the model takes of a clip, without padding: samples or a spectrogram."""
        rate = self.processor.sampling_rate
        return self.processor(clip, sampling_rate=rate, return_tensors="pt")[self.model_input][0]

    @property
    def model_input(self) -> str:
        return self.processor.model_input_names[0]

    def piece(self, clip: np.ndarray, note: Any = None) -> Piece:
        """One row of the model's inputs, of a size in the model's tokens."""
        features, config = self.features(clip), self.model.config
        if config.kind == "speech encoder":
            size = self.model.model.feature_extractor.frames(len(features))
        elif config.kind == "speech encoder-decoder":
            size = config.encoder.context
        else:
            size = config.patches.tokens
        return Piece({self.model_input: features}, size, note)

    def run(self, pieces: Sequence[Piece]) -> Any:
        """The model's output for rows, those of waveforms padded at the end and masked."""
        rows = [piece.inputs[self.model_input].to(self.dtype) for piece in pieces]
        if self.model.config.kind != "speech encoder":
            return self.model(torch.stack(rows).to(self.device))
        counts = torch.tensor([len(row) for row in rows])
        values = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
        mask = None
        if len({*counts.tolist()}) > 1:
            mask = (torch.arange(values.shape[1]) < counts[:, None]).long().to(self.device)
        return self.model(values, attention_mask=mask)


class AudioClassification(HearingPipeline):
    """A sound to its labels, `[{"label", "score"}]`, the best first."""

    task = "audio-classification"
    settings = MediaClassificationSettings

    def prepare_one(self, item: Any, settings: MediaClassificationSettings) -> list[Piece]:
        return [self.piece(self.hear(item, settings.timeout))]

    def compute(self, pieces: Sequence[Piece], settings: MediaClassificationSettings) -> Sequence[Tensor]:
        return self.run(pieces).logits.to(torch.float32).cpu().unbind(0)

    def finish(
        self,
        item: Any,
        pieces: Sequence[Piece],
        outputs: Sequence[Tensor],
        settings: MediaClassificationSettings,
    ) -> list[dict[str, Any]]:
        config, function = self.model.config, settings.function_to_apply
        if function is None and config.num_labels == 1 and config.problem_type is None:
            function = "softmax"  # as in transformers, where texts and images get a sigmoid
        return labelled(apply(outputs[0], config, function), config, settings.top_k)
