"""What a tokenizer returns: a dict of rows with attribute access, and its way to tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import Tensor

from taut.errors import TokenizerError, nearest
from taut.placement import pick_device

TENSORS = ("pt", "np")


class BatchEncoding(dict):
    """The encoded texts: `input_ids`, `attention_mask` and what else was asked for, each a row of ints, a
    list of rows, or a tensor `[rows, length]` (int64).

    `encoding.input_ids` is `encoding["input_ids"]`; `encoding[0]` is the `tokenizers.Encoding` of the first
    row, which knows tokens, words and characters.
    """

    def __init__(
        self, data: dict[str, Any] | None = None, encodings: Sequence[tokenizers.Encoding] | None = None
    ):
        super().__init__(data or {})
        self._encodings = list(encodings) if encodings is not None else None

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        known = ", ".join(self) or "nothing"
        raise AttributeError(f"this encoding has no {name!r}; it holds {known}{nearest(name, self)}")

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int):
            return self._row(key)
        return super().__getitem__(key)

    def __getstate__(self) -> dict[str, Any]:
        return {"_encodings": self._encodings}

    @property
    def encodings(self) -> list[tokenizers.Encoding] | None:
        """One `tokenizers.Encoding` a row; None when the rows did not come from text."""
        return self._encodings

    def to(self, device: str | torch.device | int, *, non_blocking: bool = False) -> BatchEncoding:
        """Moves the tensors to `device`, in place; returns itself. `RequestError` for one that is not
        there."""
        device = pick_device(device)
        for key, value in self.items():
            if isinstance(value, Tensor):
                self[key] = value.to(device, non_blocking=non_blocking)
        return self

    def tokens(self, row: int = 0) -> list[str]:
        """The tokens of a row as the vocabulary spells them."""
        return self._row(row).tokens

    def word_ids(self, row: int = 0) -> list[int | None]:
        """For each token of a row, the index of its word; None for special tokens."""
        return self._row(row).word_ids

    def sequence_ids(self, row: int = 0) -> list[int | None]:
        """For each token of a row, 0 for the text, 1 for its pair, None for special tokens."""
        return self._row(row).sequence_ids

    def char_to_token(self, row: int, char: int, sequence: int = 0) -> int | None:
        """The index of the token that holds a character of the text; None if there is none."""
        return self._row(row).char_to_token(char, sequence)

    def convert_to_tensors(self, kind: str | None) -> BatchEncoding:
        """Turns every value into an int64 tensor ("pt") or array ("np"), in place; returns itself.

        Raises TokenizerError when the rows differ in length."""
        if kind is None:
            return self
        if kind not in TENSORS:
            raise TokenizerError(f"return_tensors is {kind!r}; known: {', '.join(TENSORS)}")
        for key, value in self.items():
            if not isinstance(value, (Tensor, np.ndarray)):
                self[key] = _tensor(key, value, kind)
        return self

    def _row(self, index: int) -> tokenizers.Encoding:
        if self._encodings is None:
            raise TokenizerError("this encoding does not know its tokens: it was not made from text")
        return self._encodings[index]


def _tensor(key: str, value: Any, kind: str) -> Tensor | np.ndarray:
    rows = value if isinstance(value, (list, tuple)) else [value]
    lengths = sorted({len(row) for row in rows if isinstance(row, (list, tuple))})
    if len(lengths) > 1:
        shown = ", ".join(map(str, lengths[:5])) + (", ..." if len(lengths) > 5 else "")
        raise TokenizerError(
            f"the rows of {key} have different lengths ({shown}), so they make no tensor; pass padding=True, "
            "and truncation=True with max_length= to shorten the longest"
        )
    try:
        array = np.array(value, dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise TokenizerError(f"{key} can't become a tensor: {error}") from error
    return torch.from_numpy(array) if kind == "pt" else array
