"""Prompts as users give them (padded tensors, masks, lists) to token ids of each row."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from taut.errors import RequestError


def read_prompts(
    inputs: Any,
    attention_mask: Any,
    *,
    pad: int | None,
    ends: tuple[int, ...],
    vocab: int,
    device: torch.device,
    name: str = "input_ids",
) -> tuple[Tensor, list[list[int]]]:
    """`(given, prompts)`: the padded `[rows, width]` int64 ids as given, and each row's real tokens.

    `inputs`: integers `[rows, width]`, or lists of token ids; lists of uneven length are padded left.
    `attention_mask` `[rows, width]`: 0 for padding, wherever it is. Without it, `pad` tokens are padding
    unless `pad` is also one of `ends`, the end-of-sequence tokens (what transformers infers).
    `device` is where lists go; a tensor stays where it is. `name` is what errors call the input. Raises
    `RequestError` for a wrong shape or dtype, a row without tokens, and an id that is not below `vocab`.
    """
    given, mask = _padded(inputs, attention_mask, pad, device)
    rows = given.tolist()
    if mask is None and pad is not None and pad not in ends:
        mask = given != pad
    if mask is not None:
        real = [[at for at, kept in enumerate(row) if kept] for row in mask.tolist()]
    else:
        real = [list(range(given.shape[1]))] * len(rows)
        marker = pad if pad is not None else (ends or (None,))[0]
        if len(rows) > 1 and any(marker in (row[0], row[-1]) for row in rows if row):
            warnings.warn(
                f"no attention_mask is given, and the pad token {marker} also ends a sequence, so it is "
                "taken as part of the prompt; pass the tokenizer's attention_mask",
                stacklevel=5,
            )
    prompts = [[row[at] for at in places] for row, places in zip(rows, real, strict=True)]
    for index, prompt in enumerate(prompts):
        if not prompt:
            why = "all of it is padding" if given.shape[1] else "it is empty"
            raise RequestError(
                f"row {index} of {name} has no token ({why}). Next step: leave the row out, or start it "
                "with the BOS token"
            )
        if min(prompt) < 0 or max(prompt) >= vocab:
            at, bad = next((at, token) for at, token in enumerate(prompt) if not 0 <= token < vocab)
            raise RequestError(
                f"{name} row {index}, position {real[index][at]}: token id {bad} is outside the model's "
                f"vocabulary, 0 to {vocab - 1}. Next step: use the tokenizer of this model"
            )
    return given, prompts


def _padded(
    inputs: Any, attention_mask: Any, pad: int | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """`(ids, mask)`, both `[rows, width]`; lists of uneven length are padded left."""
    if isinstance(inputs, Mapping) or hasattr(inputs, "input_ids"):
        raise RequestError("input_ids is a tokenizer's whole output. Next step: call generate(**inputs)")
    if not isinstance(inputs, Tensor):
        rows = _rows(inputs)
        width = max(map(len, rows), default=0)
        if any(len(row) < width for row in rows):
            if attention_mask is not None:
                raise RequestError("input_ids are lists of uneven length, which need no attention_mask")
            attention_mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
            rows = [[pad or 0] * (width - len(row)) + row for row in rows]
        inputs = torch.tensor(rows, dtype=torch.int64, device=device).view(len(rows), width)
    if inputs.ndim != 2 or inputs.shape[0] == 0:
        hint = "; next step: input_ids.unsqueeze(0)" if inputs.ndim == 1 else ""
        raise RequestError(f"input_ids has shape {tuple(inputs.shape)}; expected [rows, width]{hint}")
    if inputs.dtype.is_floating_point or inputs.dtype.is_complex or inputs.dtype == torch.bool:
        raise RequestError(f"input_ids has dtype {inputs.dtype}; expected integers, as tokenizers give them")
    ids = inputs.to(torch.int64)
    if attention_mask is None:
        return ids, None
    mask = torch.as_tensor(attention_mask)
    if mask.shape != ids.shape:
        raise RequestError(
            f"attention_mask has shape {tuple(mask.shape)} and input_ids {tuple(ids.shape)}; they must be "
            "equal: 1 for a token, 0 for padding"
        )
    return ids, mask != 0


def _rows(inputs: Any) -> list[list[int]]:
    """Lists of token ids, one a row; one flat list is one row."""
    if isinstance(inputs, str) or not hasattr(inputs, "__iter__"):
        hint = ". Next step: tokenize the text" if isinstance(inputs, str) else ""
        raise RequestError(
            f"input_ids is a {type(inputs).__name__}; expected a tensor or lists of token ids{hint}"
        )
    rows = list(inputs)
    if rows and all(isinstance(item, int) for item in rows):
        rows = [rows]
    rows = [row.tolist() if isinstance(row, Tensor) else row for row in rows]
    for row in rows:
        if not isinstance(row, (list, tuple)):
            raise RequestError(f"input_ids holds {row!r}; expected lists of token ids, one a row")
        for token in row:
            if not isinstance(token, int) or isinstance(token, bool):
                raise RequestError(f"input_ids holds {token!r}; expected token ids, which are integers")
    return [list(row) for row in rows]
