"""Texts to labels: those of the model, or any that are given, by what an NLI model says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taut.config import ModelConfig
from taut.errors import RequestError
from taut.pipelines.base import Piece, Settings
from taut.pipelines.text import TextPipeline, as_text

FUNCTIONS = ("softmax", "sigmoid", "none")
UNSET: Any = "unset"


def apply(logits: Tensor, config: ModelConfig, function: str | None) -> Tensor:
    """Scores of logits `[labels]`: `function`, or what the config's problem and number of labels ask for."""
    if function is None:
        if config.problem_type == "regression":
            function = "none"
        elif config.problem_type == "multi_label_classification" or config.num_labels == 1:
            function = "sigmoid"
        else:
            function = "softmax"
    function = str(function).lower()
    return {"softmax": lambda: logits.softmax(-1), "sigmoid": logits.sigmoid, "none": lambda: logits}[
        function
    ]()


def check_labels(settings: Any) -> None:
    """Raises `RequestError` for a `top_k` or `function_to_apply` that there isn't."""
    top_k, function = settings.top_k, settings.function_to_apply
    if top_k not in (None, UNSET) and (not isinstance(top_k, int) or top_k < 1):
        raise RequestError(f"top_k is {top_k!r}; expected an integer >= 1, or None for all labels")
    if function is not None and str(function).lower() not in FUNCTIONS:
        raise RequestError(f"function_to_apply is {function!r}; known: {', '.join(FUNCTIONS)}")


def labelled(scores: Tensor, config: ModelConfig, top_k: int | None) -> list[dict[str, Any]]:
    """The `top_k` best labels of scores `[labels]` (None: all), the best first."""
    order = scores.sort(descending=True, stable=True).indices[:top_k].tolist()
    return [{"label": config.id2label[index], "score": scores[index].item()} for index in order]


@dataclass(frozen=True)
class MediaClassificationSettings(Settings):
    """Of images and of sounds. `top_k`: how many labels, None for all; `function_to_apply`: "softmax",
    "sigmoid" or "none" instead of what the model's config says; `timeout`: seconds to wait for an address."""

    top_k: int | None = 5
    function_to_apply: str | None = None
    timeout: float | None = 30.0

    def __post_init__(self) -> None:
        check_labels(self)


@dataclass(frozen=True)
class TextClassificationSettings(Settings):
    """`top_k`: how many labels of each text, None for all; `function_to_apply`: "softmax", "sigmoid" or
    "none" instead of what the model's config says; `truncation`, `max_length`: the tokenizer's; so is
    `padding`, which changes nothing here."""

    top_k: int | None = UNSET
    function_to_apply: str | None = None
    truncation: bool | str | None = None
    max_length: int | None = None
    padding: bool | str | None = None

    def __post_init__(self) -> None:
        check_labels(self)


class TextClassification(TextPipeline):
    """A text, or `{"text": ..., "text_pair": ...}`, to its label and score, as `{"label", "score"}`; with
    `top_k`, to a list of them, the best first. A single text gives a list of one, as in transformers."""

    task = "text-classification"
    settings = TextClassificationSettings

    def __call__(self, inputs: Any, **options: Any) -> Any:
        result = super().__call__(inputs, **options)
        return [result] if isinstance(inputs, str) and "top_k" not in options else result

    def prepare_one(self, item: Any, settings: TextClassificationSettings) -> list[Piece]:
        pair = item if isinstance(item, Mapping) else {"text": item}
        if "text" not in pair or not set(pair) <= {"text", "text_pair"}:
            raise RequestError(f"{self.task} takes a text, or a dict of text and text_pair, not {item!r}")
        texts = [as_text(pair["text"], self.task)]
        pairs = [as_text(pair["text_pair"], self.task)] if pair.get("text_pair") is not None else None
        options = {} if settings.max_length is None else {"max_length": settings.max_length}
        return [self.piece(self.encode(texts, pairs, truncation=settings.truncation, **options)[0])]

    def compute(self, pieces: Sequence[Piece], settings: TextClassificationSettings) -> Sequence[Tensor]:
        return self.run(pieces).logits.to(torch.float32).cpu().unbind(0)

    def finish(
        self,
        item: Any,
        pieces: Sequence[Piece],
        outputs: Sequence[Tensor],
        settings: TextClassificationSettings,
    ) -> Any:
        scores = apply(outputs[0], self.model.config, settings.function_to_apply)
        if settings.top_k == UNSET:
            return labelled(scores, self.model.config, 1)[0]
        return labelled(scores, self.model.config, settings.top_k)


@dataclass(frozen=True)
class ZeroShotSettings(Settings):
    """`candidate_labels`: a list, or a text that separates them by commas; `hypothesis_template`: the
    sentence that says a label, at its `{}`; `multi_label`: several may be true at a time."""

    candidate_labels: str | Sequence[str] = ()
    hypothesis_template: str = "This example is {}."
    multi_label: bool = False

    def labels(self) -> list[str]:
        given = self.candidate_labels
        found = [one.strip() for one in given.split(",")] if isinstance(given, str) else list(given)
        if not (found := [label for label in found if label]):
            raise RequestError("zero-shot-classification needs candidate_labels, such as ['news', 'sports']")
        if self.hypothesis_template.format(found[0]) == self.hypothesis_template:
            raise RequestError(
                f"hypothesis_template is {self.hypothesis_template!r}; expected a text with {{}} where the "
                "label goes"
            )
        return found


class ZeroShotClassification(TextPipeline):
    """A text to `{"sequence", "labels", "scores"}`, the likeliest label first, by how far a model of natural
    language inference thinks that the text entails each (Yin et al. 2019)."""

    task = "zero-shot-classification"
    settings = ZeroShotSettings

    def __call__(self, inputs: Any, candidate_labels: Any = None, **options: Any) -> Any:
        given = {} if candidate_labels is None else {"candidate_labels": candidate_labels}
        return super().__call__(inputs, **given, **options)

    def check(self, settings: ZeroShotSettings) -> None:
        settings.labels()
        self._entailment()

    def prepare_one(self, item: Any, settings: ZeroShotSettings) -> list[Piece]:
        labels, text = settings.labels(), as_text(item, self.task)
        sentences = [settings.hypothesis_template.format(label) for label in labels]
        rows = self.encode([text] * len(labels), sentences, truncation="only_first")
        return [self.piece(row) for row in rows]

    def compute(self, pieces: Sequence[Piece], settings: ZeroShotSettings) -> Sequence[Tensor]:
        return self.run(pieces).logits.to(torch.float32).cpu().unbind(0)

    def finish(
        self, item: Any, pieces: Sequence[Piece], outputs: Sequence[Tensor], settings: ZeroShotSettings
    ) -> dict[str, Any]:
        logits, labels, entailment = torch.stack(list(outputs)), settings.labels(), self._entailment()
        if settings.multi_label or len(labels) == 1:
            contradiction = -1 if entailment == 0 else 0
            scores = logits[:, [contradiction, entailment]].softmax(-1)[:, 1]
        else:
            scores = logits[:, entailment].softmax(-1)
        order = scores.argsort(descending=True, stable=True).tolist()
        return {
            "sequence": item,
            "labels": [labels[index] for index in order],
            "scores": scores[order].tolist(),
        }

    def _entailment(self) -> int:
        """The label that says so."""
        named = self.model.config.label2id
        found = [index for name, index in named.items() if name.lower().startswith("entail")]
        if not found:
            raise RequestError(
                f"zero-shot-classification needs a model of natural language inference, with a label "
                f"'entailment'; this one has: {', '.join(named)}"
            )
        return found[0]
