"""Sentences compared with one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from taut.errors import RequestError
from taut.pipelines.base import Piece, Pipeline, Settings
from taut.pipelines.text import as_text
from taut.sentences import SentenceTransformer


class SentenceSimilarity(Pipeline):
    """A sentence and others to how similar each of these is to it, `[score, ...]`: of the vectors that
    `SentenceTransformer` makes, by the similarity that its files name. An item is a dict of `source_sentence`
    and `sentences`, or these two by name."""

    task = "sentence-similarity"

    def __init__(self, model: SentenceTransformer, **options: Any):
        self.sentences = model
        super().__init__(model.model, **{**options, "tokenizer": model.tokenizer})

    def __call__(
        self, inputs: Any = None, sentences: Any = None, *, source_sentence: str | None = None, **options: Any
    ) -> Any:
        if isinstance(inputs, str):
            inputs, source_sentence = None, inputs
        if inputs is None:
            inputs = {"source_sentence": source_sentence, "sentences": sentences}
        elif sentences is not None or source_sentence is not None:
            raise RequestError("give inputs, or source_sentence and sentences")
        return super().__call__(inputs, **options)

    def prepare_one(self, item: Any, settings: Settings) -> list[Piece]:
        names = ("source_sentence", "sentences")
        if not isinstance(item, Mapping) or any(item.get(name) is None for name in names):
            raise RequestError(f"{self.task} takes a dict of {' and '.join(names)}, not {item!r}")
        given = item["sentences"]
        others = [given] if isinstance(given, str) else list(given)
        texts = [as_text(text, self.task) for text in (item["source_sentence"], *others)]
        return [Piece({"input_ids": ids}, len(ids)) for ids in self.sentences.token_ids(texts)]

    def compute(self, pieces: Sequence[Piece], settings: Settings) -> Sequence[Tensor]:
        return self.sentences.vectors([piece.inputs["input_ids"] for piece in pieces]).cpu().unbind(0)

    def finish(
        self, item: Any, pieces: Sequence[Piece], outputs: Sequence[Tensor], settings: Settings
    ) -> Any:
        vectors = torch.stack(list(outputs))
        return self.sentences.similarity(vectors[:1], vectors[1:])[0].tolist()
