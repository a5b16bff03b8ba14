"""Models that compare images with texts, and their half for texts alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taut import weights
from taut.batch import pack
from taut.checkpoint import LazyTensor
from taut.config import ModelConfig
from taut.errors import RequestError
from taut.layers.caption import CaptionEncoder
from taut.layers.linear import Linear
from taut.layers.vision import Vision
from taut.modeling.base import PreTrainedModel
from taut.modeling.output import ModelOutput
from taut.modeling.text import Encoded, check_ids, run
from taut.weights import Rule, Without


def _encode_texts(
    model: PreTrainedModel,
    stack: CaptionEncoder,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    **options: bool | None,
) -> Encoded:
    """What a stack of `model` makes of texts."""
    if input_ids is None:
        raise RequestError("give input_ids: the tokens of texts")
    check_ids(input_ids, stack.config.vocab_size)
    batch, padding = pack(input_ids, attention_mask, position_ids)
    if stack.config.heads.pooler.of == "last" and padding.index is not None:
        raise RequestError(
            "attention_mask leaves tokens out, and this model was trained to see its padding: leave the mask "
            "out, and pad texts with padding='max_length'"
        )
    return run(model, stack, batch, padding, bare=True, **options)


class TextTower(PreTrainedModel):
    """The texts' half of a model that compares them with images."""

    suffix = "Model"
    whole = False

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config)
        self.model = CaptionEncoder(config, dtype=dtype)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def rules(self) -> tuple[Rule, ...]:
        found = super().rules()
        prefix = weights.prefix_of(weights.layout(self, found))
        return found if prefix is None else (*found, Without(prefix))

    @classmethod
    def adapt(
        cls, config: ModelConfig, tensors: Mapping[str, LazyTensor]
    ) -> tuple[ModelConfig, Mapping[str, LazyTensor]]:
        return (config if config.contrast is None else config.contrast.text), tensors

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """`last_hidden_state` `[rows, width, dim]`, zeros at padding; `pooler_output` `[rows, dim]`, of the
        token that ends each text; `hidden_states` and `attentions` if asked. Inputs are those of
        `TextModel.encode`."""
        found = _encode_texts(
            self,
            self.model,
            input_ids,
            attention_mask,
            position_ids,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        output = self.output(found)
        return output.to_tuple() if return_dict is False else output

    def output(self, found: Encoded) -> ModelOutput:
        return ModelOutput(
            last_hidden_state=found.padding.unpack(found.hidden),
            pooler_output=self.model.pooled(found.hidden, found.batch),
            **found.extras(),
        )


class TextProjection(TextTower):
    """A text encoder whose vectors are projected to be compared with those of images: `text_embeds`."""

    suffix = "ModelWithProjection"
    head = ("text_projection",)

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config, dtype=dtype)
        self.text_projection = Linear(config.dim, config.heads.projection, dtype=dtype)

    def rules(self) -> tuple[Rule, ...]:
        return PreTrainedModel.rules(self)

    def output(self, found: Encoded) -> ModelOutput:
        return ModelOutput(
            text_embeds=self.text_projection(self.model.pooled(found.hidden, found.batch)),
            last_hidden_state=found.padding.unpack(found.hidden),
            **found.extras(),
        )


class ContrastiveModel(PreTrainedModel):
    """Compares images with texts: an encoder of each, whose vectors meet in one space."""

    suffix = "Model"

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config)
        contrast = config.contrast
        shape = (1,) if contrast.sigmoid else ()
        self.logit_scale = nn.Parameter(torch.empty(shape, dtype=dtype))
        self.logit_bias = nn.Parameter(torch.empty(shape, dtype=dtype)) if contrast.sigmoid else None
        self.text_model = CaptionEncoder(contrast.text, dtype=dtype)
        self.vision_model = Vision(contrast.vision, dtype=dtype)
        self.visual_projection = self.text_projection = None
        if contrast.dim is not None:
            self.visual_projection = Linear(contrast.vision.dim, contrast.dim, dtype=dtype)
            self.text_projection = Linear(contrast.text.dim, contrast.dim, dtype=dtype)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.embed_tokens

    def get_text_features(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """`pooler_output` `[rows, features]`: the vector of each text; `last_hidden_state`
        `[rows, width, dim]`, zeros at padding; `hidden_states` and `attentions` if asked."""
        found = _encode_texts(
            self,
            self.text_model,
            input_ids,
            attention_mask,
            position_ids,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        vectors = self.text_model.pooled(found.hidden, found.batch)
        return _features(found, vectors, self.text_projection, return_dict)

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """`pooler_output` `[images, features]`: the vector of each image; `last_hidden_state`
        `[images, tokens, dim]`; `hidden_states` and `attentions` if asked."""
        if pixel_values is None:
            raise RequestError("give pixel_values: the images, as an image processor gives them")
        batch, padding = self.vision_model.pack(pixel_values, interpolate=bool(interpolate_pos_encoding))
        found = run(
            self,
            self.vision_model,
            batch,
            padding,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            bare=True,
        )
        vectors = self.vision_model.pooler(padding.unpack(found.hidden))
        return _features(found, vectors, self.visual_projection, return_dict)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """Scores of images and texts: `logits_per_image` `[images, texts]` and its transpose
        `logits_per_text`; `text_embeds` and `image_embeds`, vectors of length 1; `text_model_output` and
        `vision_model_output`, as `get_text_features` and `get_image_features` give them.

        With `return_loss` the `loss`, for which image i belongs to text i: cross-entropy both ways (CLIP), or
        of every pair by itself (SigLIP).
        """
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        images = self.get_image_features(pixel_values, interpolate_pos_encoding, **asked)
        texts = self.get_text_features(input_ids, attention_mask, position_ids, **asked)
        image_embeds, text_embeds = (F.normalize(x.pooler_output, dim=-1, eps=0) for x in (images, texts))
        scores = text_embeds @ image_embeds.T * self.logit_scale.exp()
        if self.logit_bias is not None:
            scores = scores + self.logit_bias
        output = ModelOutput(
            loss=self._loss(scores) if return_loss else None,
            logits_per_image=scores.T,
            logits_per_text=scores,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=texts,
            vision_model_output=images,
        )
        return output.to_tuple() if return_dict is False else output

    def _loss(self, scores: Tensor) -> Tensor:
        if scores.shape[0] != scores.shape[1]:
            raise RequestError(
                f"return_loss takes as many texts as images, and there are {scores.shape[0]} texts and "
                f"{scores.shape[1]} images"
            )
        if self.config.contrast.sigmoid:
            signs = 2 * torch.eye(len(scores), device=scores.device, dtype=scores.dtype) - 1
            return -F.logsigmoid(signs * scores).sum(-1).mean()
        own = torch.arange(len(scores), device=scores.device)
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def _features(
    found: Encoded, vectors: Tensor, projection: Linear | None, return_dict: bool | None
) -> ModelOutput | tuple[Any, ...]:
    output = ModelOutput(
        last_hidden_state=found.padding.unpack(found.hidden),
        pooler_output=vectors if projection is None else projection(vectors),
        **found.extras(),
    )
    return output.to_tuple() if return_dict is False else output
