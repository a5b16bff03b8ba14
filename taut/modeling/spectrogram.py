"""Models of spectrograms: hidden states, and what classifies them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taut import weights
from taut.config import ModelConfig
from taut.errors import RequestError
from taut.layers.linear import Linear
from taut.layers.norm import Norm
from taut.modeling.image import PictureModel
from taut.modeling.labels import row_loss
from taut.modeling.output import ModelOutput
from taut.modeling.text import Encoded
from taut.weights import Rule, Without


class SpectrogramModel(PictureModel):
    """An image encoder of spectrograms: frequencies down and time across."""

    def hear(
        self,
        input_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Encoded:
        """Run the stack over spectrograms, `input_values` `[clips, frames, bands]`, floats."""
        bands, frames = self.pictures.patches.image
        if input_values.dim() != 3 or input_values.shape[1:] != (frames, bands):
            raise RequestError(
                f"input_values has shape {list(input_values.shape)}; expected [clips, {frames}, {bands}], "
                "frames and bands of a spectrogram, as a feature extractor gives"
            )
        return self.encode(input_values.mT[:, None], None, None, output_hidden_states, output_attentions)


class SpectrogramEncoder(SpectrogramModel):
    """Hidden states of spectrograms; its files leave out the first word that those with a head have."""

    suffix = "Model"

    def rules(self) -> tuple[Rule, ...]:
        found = super().rules()
        prefix = weights.prefix_of(weights.layout(self, found))
        return found if prefix is None else (*found, Without(prefix))

    def forward(
        self,
        input_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """`last_hidden_state` `[clips, tokens, dim]`; `pooler_output` `[clips, dim]`, the mean of the first
        two tokens; `hidden_states` and `attentions` if asked. Input is that of `SpectrogramModel.hear`."""
        found = self.hear(input_values, output_hidden_states, output_attentions)
        output = ModelOutput(
            last_hidden_state=found.padding.unpack(found.hidden),
            pooler_output=self.pooled(found),
            **found.extras(),
        )
        return output.to_tuple() if return_dict is False else output


class NormedClassifier(nn.Module):
    """Scores `[rows, labels]` of vectors behind a norm."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__()
        self.layernorm = Norm(config.norm, config.dim, dtype=dtype)
        self.dense = Linear(config.dim, config.num_labels, bias=True, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x, norm=self.layernorm)


class SpectrogramClassifier(SpectrogramModel):
    """Scores of each spectrogram."""

    suffix = "ForAudioClassification"
    head = ("classifier",)

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config, dtype=dtype)
        self.classifier = NormedClassifier(config, dtype=dtype)

    def forward(
        self,
        input_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """`logits` `[clips, labels]`, and `loss` where `labels` are given, as `labels.row_loss` takes them;
        `hidden_states` and `attentions` if asked. Input is that of `SpectrogramModel.hear`."""
        found = self.hear(input_values, output_hidden_states, output_attentions)
        logits = self.classifier(self.pooled(found))
        loss = None if labels is None else row_loss(logits, labels, self.config)
        output = ModelOutput(loss=loss, logits=logits, **found.extras())
        return output.to_tuple() if return_dict is False else output
