"""Models of images: hidden states, and what classifies them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taut import weights
from taut.checkpoint import LazyTensor
from taut.config import ModelConfig
from taut.layers.linear import Linear
from taut.layers.vision import Vision, pool_picture
from taut.modeling.base import PreTrainedModel
from taut.modeling.labels import row_loss
from taut.modeling.output import ModelOutput
from taut.modeling.text import Encoded, run
from taut.weights import Rename, Rule, Without


class PictureModel(PreTrainedModel):
    """An image encoder, `model`, behind its pixels; a subclass adds its head."""

    whole = False

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config)
        self.pictures = config if config.contrast is None else config.contrast.vision
        self.model = Vision(self.pictures, pooler=self.suffix in self.pictures.heads.pooled, dtype=dtype)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.patch_embeddings

    def layouts(self) -> list[tuple[Rule, ...]]:
        found = super().layouts()
        if self.config.contrast is None:
            return found
        return [(Rename("vision_model", "model"), *rules) for rules in found]  # one half of it

    def encode(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Encoded:
        """Run the stack over pictures of one size.

        `pixel_values` `[images, channels, height, width]`, floats; `bool_masked_pos` `[images, patches]`:
        patches that are left out, where the family has a token for them; `interpolate_pos_encoding` fits the
        positions to pictures of another size than the config's. Raises `RequestError` for what doesn't fit.
        """
        batch, padding = self.model.pack(
            pixel_values, bool_masked_pos, interpolate=bool(interpolate_pos_encoding)
        )
        return run(
            self,
            self.model,
            batch,
            padding,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            bare=True,
        )

    def pooled(self, found: Encoded) -> Tensor | None:
        """The vector of each picture, `[images, dim]`; None for a model without a pooler."""
        return None if self.model.pooler is None else self.model.pooler(_taken_apart(found))


class ImageModel(PictureModel):
    """An image encoder without a head; its files leave out the first word that those with a head have."""

    suffix = "Model"
    head = ("model.pooler",)

    def rules(self) -> tuple[Rule, ...]:
        found = super().rules()
        prefix = weights.prefix_of(weights.layout(self, found))
        return found if prefix is None else (*found, Without(prefix))

    @classmethod
    def adapt(
        cls, config: ModelConfig, tensors: Mapping[str, LazyTensor]
    ) -> tuple[ModelConfig, Mapping[str, LazyTensor]]:
        return (config if config.contrast is None else config.contrast.vision), tensors

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """`last_hidden_state` `[images, tokens, dim]`; `pooler_output` `[images, dim]`, of a model with a
        pooler; `hidden_states` and `attentions` if asked. Inputs are those of `PictureModel.encode`."""
        found = self.encode(
            pixel_values, bool_masked_pos, interpolate_pos_encoding, output_hidden_states, output_attentions
        )
        output = ModelOutput(
            last_hidden_state=found.padding.unpack(found.hidden),
            pooler_output=self.pooled(found),
            **found.extras(),
        )
        return output.to_tuple() if return_dict is False else output


class ImageProjection(PictureModel):
    """An image encoder whose vectors are projected to be compared with those of texts."""

    suffix = "ModelWithProjection"
    head = ("visual_projection",)
    adapt = ImageModel.adapt

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config, dtype=dtype)
        self.visual_projection = Linear(config.dim, config.heads.projection, dtype=dtype)

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """`image_embeds` `[images, projection_dim]`, `last_hidden_state` `[images, tokens, dim]`;
        `hidden_states` and `attentions` if asked. Inputs are those of `PictureModel.encode`."""
        found = self.encode(
            pixel_values, None, interpolate_pos_encoding, output_hidden_states, output_attentions
        )
        output = ModelOutput(
            image_embeds=self.visual_projection(self.pooled(found)),
            last_hidden_state=found.padding.unpack(found.hidden),
            **found.extras(),
        )
        return output.to_tuple() if return_dict is False else output


class ImageClassifier(PictureModel):
    """Scores of each picture."""

    suffix = "ForImageClassification"
    head = ("classifier", "model.pooler")

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config, dtype=dtype)
        parts = self.pictures.heads.pooling.count(",") + 1
        self.classifier = Linear(parts * self.pictures.dim, config.num_labels, bias=True, dtype=dtype)

    @classmethod
    def of(cls, config: ModelConfig, source: str = "the config") -> type[PictureModel]:
        taught = config.architecture.endswith(TaughtImageClassifier.suffix)
        return TaughtImageClassifier if taught else cls

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """`logits` `[images, labels]`, and `loss` where `labels` are given, as `labels.row_loss` takes them;
        `hidden_states` and `attentions` if asked. Inputs are those of `PictureModel.encode`."""
        found = self.encode(
            pixel_values, None, interpolate_pos_encoding, output_hidden_states, output_attentions
        )
        how, prefix = self.pictures.heads.pooling, self.pictures.patches.prefix
        vectors = self.pooled(found) if how == "pooler" else pool_picture(_taken_apart(found), how, prefix)
        logits = self.classifier(vectors)
        loss = None if labels is None else row_loss(logits, labels, self.config)
        output = ModelOutput(loss=loss, logits=logits, **found.extras())
        return output.to_tuple() if return_dict is False else output


class TaughtImageClassifier(PictureModel):
    """Scores of each picture's first token and, as a teacher taught them, of its second (DeiT), and their
    mean."""

    suffix = "ForImageClassificationWithTeacher"
    head = ("cls_classifier", "distillation_classifier")

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config, dtype=dtype)
        self.cls_classifier = Linear(config.dim, config.num_labels, bias=True, dtype=dtype)
        self.distillation_classifier = Linear(config.dim, config.num_labels, bias=True, dtype=dtype)

    def forward(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """`logits`, `cls_logits` and `distillation_logits`, each `[images, labels]`; `hidden_states` and
        `attentions` if asked. Inputs are those of `PictureModel.encode`."""
        found = self.encode(
            pixel_values, None, interpolate_pos_encoding, output_hidden_states, output_attentions
        )
        hidden = _taken_apart(found)
        own, taught = self.cls_classifier(hidden[:, 0]), self.distillation_classifier(hidden[:, 1])
        output = ModelOutput(
            logits=(own + taught) / 2, cls_logits=own, distillation_logits=taught, **found.extras()
        )
        return output.to_tuple() if return_dict is False else output


def _taken_apart(found: Encoded) -> Tensor:
    """The hidden states of each picture, `[images, tokens, dim]`."""
    return found.padding.unpack(found.hidden)
