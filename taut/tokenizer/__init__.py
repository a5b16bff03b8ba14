"""Tokenizers: text to ids and back, chat templates, incremental decoding."""

from __future__ import annotations

from taut.tokenizer.detokenize import IncrementalDetokenizer
from taut.tokenizer.encoding import BatchEncoding
from taut.tokenizer.load import AutoTokenizer
from taut.tokenizer.tokenizer import Tokenizer

__all__ = ["AutoTokenizer", "BatchEncoding", "IncrementalDetokenizer", "Tokenizer"]
