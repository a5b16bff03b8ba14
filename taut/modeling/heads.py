"""Heads that score rows, tokens and spans: classified texts and tokens, masked tokens, answers in a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taut import weights
from taut.config import ModelConfig
from taut.errors import ConfigError
from taut.kernels.linear_ce import linear_cross_entropy
from taut.layers.encoder import MaskedHead, classifier, pool
from taut.modeling.labels import row_loss, span_loss, token_loss, warn_at_padding
from taut.modeling.output import Later, ModelOutput
from taut.modeling.text import Encoded, TextModel, token_labels
from taut.weights import Rename, Rule


class Labelling(TextModel):
    """A model whose head gives scores to labels; a subclass says of what, and whether it is of each token."""

    whole = False
    each_token = True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        bbox: Tensor | None = None,
        task_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """`logits`, and `loss` where `labels` are given, as the class's `scored` says; `hidden_states` and
        `attentions` if asked. Inputs are those of `TextModel.encode`; `token_type_ids`, `bbox` and
        `task_type_ids` are for the families that have them."""
        if labels is not None and self.each_token:
            warn_at_padding(labels, attention_mask)
        features = {"token_type_ids": token_type_ids, "bbox": bbox, "task_type_ids": task_type_ids}
        found = self.encode(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            features=features,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        loss, logits = self.scored(found, labels)
        output = ModelOutput(loss=loss, logits=logits, **found.extras())
        return output.to_tuple() if return_dict is False else output

    def scored(self, found: Encoded, labels: Tensor | None) -> tuple[Tensor | None, Tensor | Later]:
        """The loss, if there are labels, and the logits."""
        raise NotImplementedError


class SequenceClassifier(Labelling):
    """Scores of each row: of its pooled first token in most encoders, of its last token in decoders."""

    suffix = "ForSequenceClassification"
    head = ("classifier", "model.pooler")
    each_token = False

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config, dtype=dtype)
        heads, labels = config.heads, config.num_labels
        width = config.dim if config.kind == "encoder" else config.embed_dim or config.dim
        self.classifier = classifier(heads.sequence, width, labels, bias=heads.bias, dtype=dtype)

    def scored(self, found: Encoded, labels: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """`logits` `[rows, labels]`; `labels` are what `labels.row_loss` takes.

        A decoder's last token is the last one that isn't the padding token of its config.
        """
        pooler = getattr(self.model, "pooler", None)
        how = "first" if pooler is not None else self.config.heads.pooling
        vectors = pool(found.hidden, found.batch, how, self.config.pad_token_id)
        logits = self.classifier(vectors if pooler is None else pooler(vectors))
        return None if labels is None else row_loss(logits, labels, self.config), logits


class TokenClassifier(Labelling):
    """Scores of each token."""

    suffix = "ForTokenClassification"
    head = ("classifier",)

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config, dtype=dtype)
        width = config.dim if config.kind == "encoder" else config.embed_dim or config.dim
        self.classifier = classifier(config.heads.token, width, config.num_labels, dtype=dtype)

    def layouts(self) -> list[tuple[Rule, ...]]:
        """A decoder's is called `score`, like that of rows, where transformers' general class has it: in the
        families whose body is called `model`."""
        found = super().layouts()
        if self.config.kind == "encoder" or weights.prefix_of(weights.layout(self, found[0])) == "model":
            return found
        return [(*rules, Rename("classifier", "score")) for rules in found]

    def scored(self, found: Encoded, labels: Tensor | None) -> tuple[Tensor | None, Tensor]:
        """`logits` `[rows, width, labels]`, zeros at padding; `labels` `[rows, width]`, -100 where a token
        has none; the loss is the mean over the others."""
        scores = self.classifier(found.hidden)
        loss = None if labels is None else token_loss(scores, token_labels(labels, found))
        return loss, found.padding.unpack(scores)


class MaskedLM(Labelling):
    """Scores of the vocabulary for each token of an encoder: the embedding's matrix, behind a transform."""

    suffix = "ForMaskedLM"
    head = ("lm_head",)

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config, dtype=dtype)
        if not config.tied:
            raise ConfigError(
                "config.json: 'tie_word_embeddings' is False, and the head of masked tokens is the "
                "embedding's matrix here; load the encoder without it (AutoModel)"
            )
        self.lm_head = MaskedHead(config, dtype=dtype)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def logits(self, hidden: Tensor) -> Tensor:
        """`[n, vocab]` of hidden states `[n, dim]`."""
        return self.model.embed_tokens.project(self.lm_head(hidden), self.lm_head.bias)

    def scored(self, found: Encoded, labels: Tensor | None) -> tuple[Tensor | None, Tensor | Later]:
        """`logits` `[rows, width, vocab]`, zeros at padding; `labels` `[rows, width]`, -100 where there is
        nothing to predict. The loss is the mean over the others and needs their logits alone; those of all
        tokens are then computed when somebody looks at them."""
        hidden = found.hidden
        if labels is None:
            return None, found.padding.unpack(self.logits(hidden))
        labels = token_labels(labels, found)
        at = (labels != -100).nonzero().squeeze(1)
        loss = linear_cross_entropy(
            self.lm_head(hidden.index_select(0, at)),
            self.model.embed_tokens.weight,
            labels.index_select(0, at),
            self.lm_head.bias,
        )
        return loss, Later(lambda: found.padding.unpack(self.logits(hidden)))


class QuestionAnswerer(TextModel):
    """Scores of each token as the first and as the last of the answer that a row holds."""

    suffix = "ForQuestionAnswering"
    head = ("qa_outputs",)
    whole = False

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config, dtype=dtype)
        self.qa_outputs = classifier(config.heads.span, config.dim, 2, dtype=dtype)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        bbox: Tensor | None = None,
        task_type_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """`start_logits` and `end_logits` `[rows, width]`, at padding the lowest number there is, so that no
        answer begins or ends there; `loss` where `start_positions` and `end_positions` `[rows]` are given, as
        `labels.span_loss` says; `hidden_states` and `attentions` if asked. Inputs are those of
        `TextModel.encode`."""
        features = {"token_type_ids": token_type_ids, "bbox": bbox, "task_type_ids": task_type_ids}
        found = self.encode(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            features=features,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        scores, real = found.padding.unpack(self.qa_outputs(found.hidden)), found.padding.real(self.device)
        scores = scores.masked_fill(~real[..., None], torch.finfo(scores.dtype).min)
        start, end = scores.unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = (span_loss(start, start_positions, real) + span_loss(end, end_positions, real)) / 2
        output = ModelOutput(loss=loss, start_logits=start, end_logits=end, **found.extras())
        return output.to_tuple() if return_dict is False else output
