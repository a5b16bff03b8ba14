"""`vocab.json` with `merges.txt`, as old checkpoints have them, is what transformers makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, trainers

from taut.errors import TokenizerError
from taut.tokenizer import AutoTokenizer

from .conftest import CORPUS, TEXTS
from .test_against_transformers import assert_equal

# tokenizer_config.json and config.json.
FOLDERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt2": ({"tokenizer_class": "GPT2Tokenizer"}, {}),
    "opt": (
        {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": "</s>", "eos_token": "</s>",
         "unk_token": "</s>", "pad_token": "<pad>"},
        {"model_type": "opt"},
    ),
    "bart": ({"tokenizer_class": "BartTokenizer", "model_max_length": 1024}, {}),
    "bart without a class": ({}, {"model_type": "bart"}),
    "roberta": ({"tokenizer_class": "RobertaTokenizer", "add_prefix_space": True}, {}),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.model.save(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("kind", FOLDERS)
def test_equal(kind: str, folder: Path) -> None:
    for file, values in zip(("tokenizer_config.json", "config.json"), FOLDERS[kind], strict=True):
        (folder / file).write_text(json.dumps(values))
    ours, theirs = AutoTokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for name in ("special_tokens_map", "all_special_ids", "model_max_length", "padding_side", "vocab_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.get_vocab() == theirs.get_vocab()
    for text in (*TEXTS, "A<mask> b<pad>"):
        assert_equal(ours(text), theirs(text))
        assert_equal(ours(text, "the pair"), theirs(text, "the pair"))
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)
    ours.save_pretrained(folder / "saved")
    again = AutoTokenizer.from_pretrained(folder / "saved")
    assert [dict(again(text, "pair")) for text in TEXTS] == [dict(ours(text, "pair")) for text in TEXTS]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer"}'},
            r"don't say how Qwen2Tokenizer cuts text; supported .*BartTokenizer",
        ),
        ({"vocab.json": "{"}, r"vocab\.json or merges\.txt is damaged \(.*; download both again"),
        ({"merges.txt": "#version\na b c d\n"}, r"vocab\.json or merges\.txt is damaged"),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, r"it lacks <s> or </s>, which BartTokenizer writes"),
    ],
)
def test_bad_files(files: dict[str, str], message: str, folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BartTokenizer"}')
    for file, text in files.items():
        (folder / file).write_text(text)
    with pytest.raises(TokenizerError, match=message):
        AutoTokenizer.from_pretrained(folder)
