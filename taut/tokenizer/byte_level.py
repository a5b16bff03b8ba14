"""Byte-level BPE (Radford et al. 2019, the GPT-2 code) from the files of old checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from taut.errors import TokenizerError

VOCABULARY, MERGES = "vocab.json", "merges.txt"
# Classes that cut text as GPT-2 does; those in the second list write a text between `<s>` and `</s>`.
_PLAIN = ("CodeGenTokenizer", "GPT2Tokenizer", "WhisperTokenizer")
_BETWEEN = ("BartTokenizer", "RobertaTokenizer")
CLASSES = (*_PLAIN, *_BETWEEN)


def build_byte_level(folder: Path, name: str, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of `vocab.json` and `merges.txt`, for the class `name`. Raises TokenizerError."""
    if name not in CLASSES:
        raise TokenizerError(
            f"{folder}: {VOCABULARY} and {MERGES} don't say how {name or 'a tokenizer without a class'} cuts "
            f"text; supported without a tokenizer.json: {', '.join(CLASSES)}"
        )
    try:
        model = models.BPE.from_file(str(folder / VOCABULARY), str(folder / MERGES))
    except Exception as error:  # the Rust library raises plain exceptions
        raise TokenizerError(
            f"{folder}: {VOCABULARY} or {MERGES} is damaged ({error}); download both again"
        ) from error
    backend = tokenizers.Tokenizer(model)
    space = bool(config.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    backend.decoder = decoders.ByteLevel()
    if name in _BETWEEN:
        start, end = backend.token_to_id("<s>"), backend.token_to_id("</s>")
        if start is None or end is None:
            raise TokenizerError(
                f"{folder / VOCABULARY}: it lacks <s> or </s>, which {name} writes around a text"
            )
        backend.post_processor = processors.RobertaProcessing(
            ("</s>", end), ("<s>", start), add_prefix_space=space
        )
    return backend
