"""Tokenizers with a token for each byte: `<end>` is 0, `<pad>` 1, `<bos>` 2, then the bytes."""

from __future__ import annotations

import string

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from taut.tokenizer import Tokenizer

ASCII = (string.ascii_letters + " .,!?'")[:58]  # with the special tokens 61 ids


def letters(characters: str | None = None) -> Tokenizer:
    """A tokenizer of these characters (ASCII), or of all bytes."""
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if characters is None:
        found = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        found = [spelled.pre_tokenize_str(character)[0][0] for character in characters]
    vocab = {token: index for index, token in enumerate(["<end>", "<pad>", "<bos>", *found])}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer, backend.decoder = spelled, decoders.ByteLevel()
    special = {"eos_token": "<end>", "pad_token": "<pad>", "bos_token": "<bos>"}
    return Tokenizer(backend, special_tokens=special)


def words(text: str, size: int = 400) -> Tokenizer:
    """A byte-level BPE tokenizer of `size` tokens, trained on `text`."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<end>", "<pad>", "<bos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([text], trainer)
    return Tokenizer(backend, special_tokens={"eos_token": "<end>", "pad_token": "<pad>"})
