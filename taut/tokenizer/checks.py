"""Checks on what callers pass to a tokenizer, with errors that show what was passed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken
from torch import Tensor

from taut.errors import TokenizerError, nearest


def encoder_inputs(text: Any, pair: Any, words: bool) -> tuple[list[Any], bool]:
    """What the backend encodes, and whether it was a batch."""
    if text is None:
        raise TokenizerError("the text is None; pass a string or a list of strings")
    batched = isinstance(text, (list, tuple))
    if words:
        batched = batched and bool(text) and isinstance(text[0], (list, tuple))
    rows = list(text) if batched else [text]
    pairs = None
    if pair is not None:
        if batched != (
            isinstance(pair, (list, tuple))
            and (not words or (bool(pair) and isinstance(pair[0], (list, tuple))))
        ):
            raise TokenizerError("text and text_pair must both be one text, or both be lists of texts")
        pairs = list(pair) if batched else [pair]
        if len(pairs) != len(rows):
            raise TokenizerError(f"{len(rows)} texts but {len(pairs)} in text_pair; each text needs one")
    for index, row in enumerate(rows):
        _check_text(row, "text", index, batched, words)
    for index, row in enumerate(pairs or ()):
        _check_text(row, "text_pair", index, batched, words)
    if pairs is None or (not batched and not pair):  # as in transformers, a single empty pair is none
        return [tuple(row) if not words and isinstance(row, list) else row for row in rows], batched
    return list(zip(rows, pairs, strict=True)), batched


def _check_text(row: Any, name: str, index: int, batched: bool, words: bool) -> None:
    where = f"{name}[{index}]" if batched else name
    if words:
        if not isinstance(row, (list, tuple)) or not all(isinstance(word, str) for word in row):
            raise TokenizerError(f"{where} must be a list of words with is_split_into_words, not {show(row)}")
        return
    is_pair = name == "text" and isinstance(row, (list, tuple)) and len(row) == 2
    texts = row if is_pair and batched else [row]
    for one in texts:
        if not isinstance(one, str):
            raise TokenizerError(f"{where} must be a string, not {show(one)}")
        try:
            one.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"{where} is not valid text: {error.reason} at character {error.start}; "
                "repair it with text.encode('utf-8', 'replace').decode()"
            ) from error


def check_token(token: Any) -> None:
    if not isinstance(token, (str, AddedToken)) or not str(token):
        raise TokenizerError(f"a token must be a non-empty string, not {show(token)}")


def one_of(name: str, value: Any, known: Sequence[str]) -> Any:
    if value not in known:
        raise TokenizerError(f"{name} is {value!r}; known: {', '.join(known)}{nearest(str(value), known)}")
    return value


def to_python(value: Any) -> Any:
    return value.tolist() if isinstance(value, (Tensor, np.ndarray, np.generic)) else value


def show(value: Any) -> str:
    text = repr(value)
    return (
        "None"
        if value is None
        else f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
    )
