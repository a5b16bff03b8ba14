"""`TextPipeline`: texts to rows of tokens that a model takes, for every task that begins with text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Encoding
from torch import Tensor

from taut.config import ModelConfig
from taut.errors import RequestError
from taut.modeling.text import Encoded
from taut.pipelines.base import Piece, Pipeline, stacked


class TextPipeline(Pipeline):
    """A pipeline that reads text through a tokenizer."""

    def encode(
        self,
        texts: Sequence[Any],
        pairs: Sequence[str] | None = None,
        *,
        truncation: bool | str | None = None,
        check: bool = True,
        **options: Any,
    ) -> list[Encoding]:
        """The tokens of texts (and of their pairs), those of overflowing parts included if `options` ask for
        them; `truncation` and `options` are the tokenizer's, of which `padding` changes nothing: rows are
        packed. With `check`, `RequestError` for more tokens than the model has positions."""
        options.pop("padding", None)
        if truncation and options.get("max_length") is None:
            options["max_length"] = min(self.tokenizer.model_max_length, _reader(self.model.config).context)
        found = self.tokenizer(
            list(texts), pairs, truncation=truncation, padding=False, verbose=False, **options
        ).encodings
        if check:
            for one in found:
                self.fits(len(one.ids))
        return found

    def fits(self, tokens: int) -> None:
        """Raises `RequestError` for more tokens than the model has positions."""
        if (most := positions(self.model.config)) is not None and tokens > most:
            raise RequestError(
                f"the text has {tokens} tokens, and a {self.model.config.model_type} has positions for "
                f"{most}; pass truncation=True to leave out the rest"
            )

    def piece(self, encoding: Encoding, note: Any = None) -> Piece:
        """The inputs of one row that the model knows; `RequestError` for one without tokens."""
        if not encoding.ids:
            raise RequestError(
                "the text is empty, and the tokenizer adds no token of its own; give some text"
            )
        inputs = {"input_ids": encoding.ids}
        if any(features.given == "token_type_ids" for features in self.model.config.features):
            inputs["token_type_ids"] = encoding.type_ids
        return Piece(inputs, len(encoding.ids), note)

    def run(self, pieces: Sequence[Piece]) -> Any:
        """The model's output for rows of tokens, padded at the end."""
        return self.model(**stacked(pieces, self.device))

    def encoded(self, pieces: Sequence[Piece]) -> Encoded:
        """The packed hidden states of rows of tokens, in the order of the pieces."""
        given = stacked(pieces, self.device)
        ids, mask = given.pop("input_ids"), given.pop("attention_mask")
        return self.model.encode(ids, mask, features=given)

    def rows(self, grid: Tensor, pieces: Sequence[Piece]) -> list[Tensor]:
        """What a model says of each token, `[rows, width, ...]`, as one float32 tensor `[tokens, ...]` a
        row, on the host."""
        grid = grid.to(torch.float32).cpu()
        return [grid[row, : piece.size] for row, piece in enumerate(pieces)]


def positions(config: ModelConfig) -> int | None:
    """How many tokens a model has positions for, None where positions are computed and have no end."""
    config = _reader(config)
    return None if config.positions is None else config.context


def _reader(config: ModelConfig) -> ModelConfig:
    """The half of a model that reads the text."""
    return config if config.encoder is None else config.encoder


def as_text(item: Any, task: str) -> str:
    """`item`, which has to be a text."""
    if not isinstance(item, str):
        raise RequestError(f"{task} takes a text, not {type(item).__name__} {str(item)[:60]!r}")
    return item
