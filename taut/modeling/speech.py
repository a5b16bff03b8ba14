"""Models of speech: hidden states of waveforms, frames scored for characters (CTC), clips classified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taut import weights
from taut.batch import Padding
from taut.checkpoint import LazyTensor
from taut.config import ModelConfig
from taut.errors import RequestError
from taut.layers.encoder import pool
from taut.layers.linear import Linear
from taut.layers.speech import Speech
from taut.modeling.base import PreTrainedModel
from taut.modeling.labels import row_loss
from taut.modeling.output import ModelOutput
from taut.modeling.text import Encoded, run
from taut.weights import Rule, Without

# What older files call the length and the direction of a convolution's weights.
_OLDER = {
    "pos_conv_embed.conv.weight_g": "pos_conv_embed.conv.parametrizations.weight.original0",
    "pos_conv_embed.conv.weight_v": "pos_conv_embed.conv.parametrizations.weight.original1",
}


@dataclass
class Heard(Encoded):
    """What a speech encoder made of clips; `features` `[tokens, channels]` are what it made tokens of."""

    features: Tensor | None = None


class SpeechModel(PreTrainedModel):
    """A speech encoder, `model`, behind padded waveforms; a subclass adds its head."""

    whole = False

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config)
        self.model = Speech(config, dtype=dtype)

    @classmethod
    def adapt(
        cls, config: ModelConfig, tensors: Mapping[str, LazyTensor]
    ) -> tuple[ModelConfig, Mapping[str, LazyTensor]]:
        """Files have the token for frames that are left out or not, whatever the config says of training."""

        def today(name: str) -> str:
            old = next((end for end in _OLDER if name.endswith(end)), None)
            return name if old is None else name.removesuffix(old) + _OLDER[old]

        hidden = any(name.endswith("masked_spec_embed") for name in tensors)
        config = replace(config, waves=replace(config.waves, hidden=hidden))
        return config, {today(name): tensor for name, tensor in tensors.items()}

    def freeze_feature_encoder(self) -> None:
        """Give the convolutions over waveforms no gradient."""
        self.model.feature_extractor.requires_grad_(False)

    def freeze_base_model(self) -> None:
        """Give nothing but the head a gradient."""
        self.model.requires_grad_(False)

    def encode(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        mask_time_indices: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Heard:
        """Run the stack over clips, each by itself.

        `input_values` `[rows, samples]`, floats; `attention_mask` `[rows, samples]` marks a clip's own
        samples, wherever its padding stands: without it padding is taken for sound. `mask_time_indices`
        `[rows, frames]`: frames left out, where the model has a token for them. Raises `RequestError` for
        shapes that don't match and for a clip too short for one frame.
        """
        if input_values.dim() != 2 or not input_values.is_floating_point():
            raise RequestError(
                f"input_values is {input_values.dtype} {list(input_values.shape)}; expected floats "
                "[clips, samples], as a feature extractor gives"
            )
        rows, samples = input_values.shape
        clips = list(input_values)
        if attention_mask is not None:
            if attention_mask.shape != input_values.shape:
                raise RequestError(
                    f"attention_mask has shape {list(attention_mask.shape)}; expected {[rows, samples]}, "
                    "one a sample"
                )
            real = attention_mask.to(input_values.device) != 0
            clips = list(input_values[real].split(real.sum(-1).tolist()))
        frames = self.model.feature_extractor.frames
        counts, width = [frames(len(clip)) for clip in clips], frames(samples)
        hidden = None
        if mask_time_indices is not None:
            if mask_time_indices.shape != (rows, width):
                raise RequestError(
                    f"mask_time_indices has shape {list(mask_time_indices.shape)}; expected "
                    f"{[rows, width]}, one a frame"
                )
            hidden = [
                m[:n].to(input_values.device).bool() for m, n in zip(mask_time_indices, counts, strict=True)
            ]
        batch, features = self.model.pack(clips, hidden)
        padding = Padding(None, rows, width)
        if any(count != width for count in counts):
            row = torch.repeat_interleave(batch.starts.diff().long(), output_size=batch.tokens)
            padding = Padding(row * width + batch.positions, rows, width)
        found = run(
            self,
            self.model,
            batch,
            padding,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            bare=True,
        )
        return Heard(**vars(found), features=features)


class SpeechEncoder(SpeechModel):
    """A speech encoder without a head; its files leave out the first word that those with a head have."""

    suffix = "Model"

    def rules(self) -> tuple[Rule, ...]:
        found = super().rules()
        prefix = weights.prefix_of(weights.layout(self, found))
        return found if prefix is None else (*found, Without(prefix))

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        mask_time_indices: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """`last_hidden_state` `[rows, frames, dim]`, zeros at padding; `extract_features`
        `[rows, frames, channels]`, where the family gives them; `hidden_states` and `attentions` if asked.
        Inputs are those of `SpeechModel.encode`."""
        found = self.encode(
            input_values, attention_mask, mask_time_indices, output_hidden_states, output_attentions
        )
        features = found.padding.unpack(found.features) if self.config.waves.features_given else None
        output = ModelOutput(
            last_hidden_state=found.padding.unpack(found.hidden), extract_features=features, **found.extras()
        )
        return output.to_tuple() if return_dict is False else output


class CtcModel(SpeechModel):
    """Scores of each frame for the characters of a vocabulary (connectionist temporal classification; Graves
    et al. 2006)."""

    suffix = "ForCTC"
    head = ("lm_head",)

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config, dtype=dtype)
        self.lm_head = Linear(config.dim, config.vocab_size, bias=True, dtype=dtype)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """`logits` `[rows, frames, vocab]`; at padding the blank's is 0 and all others the lowest number
        there is, so that nothing is read there. `loss` where `labels` `[rows, length]` are given (-100 or the
        blank fills a row), summed or averaged as the config says; `hidden_states` and `attentions` if asked.
        Inputs are those of `SpeechModel.encode`."""
        found = self.encode(input_values, attention_mask, None, output_hidden_states, output_attentions)
        blank = self.config.pad_token_id or 0
        scores = found.padding.unpack(self.lm_head(found.hidden))
        if found.padding.index is not None:
            nothing = scores.new_full((scores.shape[-1],), torch.finfo(scores.dtype).min)
            nothing[blank] = 0
            scores = torch.where(found.padding.real(scores.device)[..., None], scores, nothing)
        loss = None if labels is None else self._loss(scores, labels, found, blank)
        output = ModelOutput(loss=loss, logits=scores, **found.extras())
        return output.to_tuple() if return_dict is False else output

    def _loss(self, scores: Tensor, labels: Tensor, found: Heard, blank: int) -> Tensor:
        if labels.dim() != 2 or labels.shape[0] != scores.shape[0] or labels.is_floating_point():
            raise RequestError(
                f"labels is {labels.dtype} {list(labels.shape)}; expected int64 [{scores.shape[0]}, length]"
            )
        labels = labels.to(scores.device)
        own = (labels != -100) & (labels != blank)
        words = labels.masked_select(own)
        if len(words) and not 0 <= words.min() <= words.max() < self.config.vocab_size:
            wrong = int(words.min()) if words.min() < 0 else int(words.max())
            raise RequestError(
                f"labels has the id {wrong}; the vocabulary has ids 0 to {self.config.vocab_size - 1}"
            )
        wide = torch.promote_types(scores.dtype, torch.float32)
        with torch.backends.cudnn.flags(enabled=False):  # its own takes other lengths
            return F.ctc_loss(
                scores.log_softmax(-1, dtype=wide).transpose(0, 1),
                words,
                found.batch.starts.diff().long(),
                own.sum(-1),
                blank=blank,
                reduction=self.config.heads.ctc.reduction,
                zero_infinity=self.config.heads.ctc.zero_infinity,
            )


class ClipHead:
    """What models share that score clips: a projection of each token, of the last hidden states or, by
    learned shares, of all; scores are those of the mean. A subclass, which is a `PreTrainedModel` too, calls
    `make_head`."""

    head = ("projector", "classifier", "layer_weights")

    def make_head(self, config: ModelConfig, encoder: ModelConfig, dtype: torch.dtype | None) -> None:
        """The head of `config`, on states of `encoder`."""
        size = config.heads.projection
        self.layer_weights, self.initial = None, {"layer_weights": 0.0}
        if config.heads.all_layers:
            self.layer_weights = nn.Parameter(torch.empty(len(encoder.layers) + 1, dtype=dtype))
        self.projector = Linear(encoder.dim, size, bias=True, dtype=dtype)
        self.classifier = Linear(size, config.num_labels, bias=True, dtype=dtype)

    def projected(self, hidden: Tensor, states: Sequence[Tensor]) -> Tensor:
        """The projection of `hidden` `[..., dim]`, or of the shares of all `states`: one of that shape for
        the input of each block, and for what the last one gives."""
        if self.layer_weights is not None:
            shares = self.layer_weights.softmax(-1)
            hidden = sum(share * state.to(hidden) for share, state in zip(shares, states, strict=True))
        return self.projector(hidden)


class SpeechClassifier(ClipHead, SpeechModel):
    """Scores of each clip, of the mean of what its frames are projected to."""

    suffix = "ForSequenceClassification"

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config, dtype=dtype)
        self.make_head(config, config, dtype)

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """`logits` `[rows, labels]`, and `loss` where `labels` are given, as `labels.row_loss` takes them;
        `hidden_states` and `attentions` if asked. Inputs are those of `SpeechModel.encode`."""
        states = output_hidden_states or self.layer_weights is not None
        found = self.encode(input_values, attention_mask, None, states, output_attentions)
        projected = self.projected(found.hidden, found.states)
        logits = self.classifier(pool(projected, found.batch, "mean"))
        if not output_hidden_states:
            found.states = []
        loss = None if labels is None else row_loss(logits, labels, self.config)
        output = ModelOutput(loss=loss, logits=logits, **found.extras())
        return output.to_tuple() if return_dict is False else output
