"""Texts to the vectors of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from taut.errors import RequestError
from taut.pipelines.base import Piece, Settings
from taut.pipelines.text import TextPipeline, as_text


@dataclass(frozen=True)
class FeatureSettings(Settings):
    """`return_tensors`: tensors instead of lists; `truncation`, `tokenize_kwargs`: options of the
    tokenizer."""

    return_tensors: bool = False
    truncation: bool | str | None = None
    tokenize_kwargs: dict[str, Any] | None = None


class FeatureExtraction(TextPipeline):
    """A text to the last hidden states of its tokens, `[1, tokens, dim]` float32, as nested lists."""

    task = "feature-extraction"
    settings = FeatureSettings

    def prepare_one(self, item: Any, settings: FeatureSettings) -> list[Piece]:
        options = dict(settings.tokenize_kwargs or {})
        if settings.truncation is not None and "truncation" in options:
            raise RequestError("truncation is given, and in tokenize_kwargs too; leave one of them out")
        options.setdefault("truncation", settings.truncation)
        return [self.piece(self.encode([as_text(item, self.task)], **options)[0])]

    def compute(self, pieces: Sequence[Piece], settings: FeatureSettings) -> Sequence[Tensor]:
        return self.rows(self.run(pieces).last_hidden_state, pieces)

    def finish(
        self, item: Any, pieces: Sequence[Piece], outputs: Sequence[Tensor], settings: FeatureSettings
    ) -> Any:
        return outputs[0][None] if settings.return_tensors else outputs[0][None].tolist()
