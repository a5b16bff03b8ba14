"""Every kind of tokenizer does what transformers' fast tokenizer of the same files does."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from taut.tokenizer import AutoTokenizer, Tokenizer

from .conftest import KINDS, TEXTS

ALL = [*KINDS, "minilm"]
PADDED = [kind for kind in ALL if kind != "no_pad"]
BATCH = TEXTS[2:12]
PAIRS = [(TEXTS[2], TEXTS[4]), (TEXTS[3], ""), (TEXTS[9], TEXTS[6])]

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no special": {"add_special_tokens": False},
    "truncated": {"truncation": True, "max_length": 7},
    "max_length alone": {"max_length": 5},
    "truncated to the model": {"truncation": True},
    "masks": {"return_special_tokens_mask": True, "return_offsets_mapping": True, "return_length": True},
    "types": {"return_token_type_ids": True, "return_attention_mask": False},
    "overflow": {"truncation": True, "max_length": 8, "stride": 1, "return_overflowing_tokens": True},
    "split specials": {"split_special_tokens": True},
}
PADDING: dict[str, dict[str, Any]] = {
    "longest": {"padding": True},
    "max_length": {"padding": "max_length", "max_length": 30, "truncation": True},
    "model's length": {"padding": "max_length", "truncation": True},
    "left": {"padding": "longest", "padding_side": "left", "return_special_tokens_mask": True},
    "multiple": {"padding": True, "pad_to_multiple_of": 8},
    "tensor": {"padding": True, "return_tensors": "pt"},
    "array": {"padding": True, "truncation": "longest_first", "max_length": 9, "return_tensors": "np"},
}


@cache
def load(folder: Path) -> tuple[Tokenizer, Any]:
    return AutoTokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


def plain(encoding: Any) -> dict[str, Any]:
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in encoding.items()}


def assert_equal(ours: Any, theirs: Any) -> None:
    assert list(ours.keys()) == list(theirs.keys())
    assert plain(ours) == plain(theirs)
    assert [type(value) for value in ours.values()] == [type(value) for value in theirs.values()]


@pytest.mark.parametrize("kind", ALL)
def test_attributes(kind: str, folder_of: Callable[[str], Path]) -> None:
    ours, theirs = load(folder_of(kind))
    names = (
        "bos_token eos_token unk_token sep_token pad_token cls_token mask_token bos_token_id eos_token_id "
        "unk_token_id sep_token_id pad_token_id cls_token_id mask_token_id padding_side truncation_side "
        "model_max_length vocab_size model_input_names all_special_ids all_special_tokens special_tokens_map "
        "extra_special_tokens clean_up_tokenization_spaces is_fast"
    )
    for name in names.split():
        assert getattr(ours, name) == getattr(theirs, name), name
    assert len(ours) == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    for pair in (False, True):
        assert ours.num_special_tokens_to_add(pair) == theirs.num_special_tokens_to_add(pair)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ALL)
def test_encoding(kind: str, options: dict[str, Any], folder_of: Callable[[str], Path]) -> None:
    ours, theirs = load(folder_of(kind))
    for text in TEXTS:
        assert_equal(ours(text, **options), theirs(text, **options))
    assert_equal(ours(BATCH, **options), theirs(BATCH, **options))
    if "return_overflowing_tokens" not in options:
        for first, second in PAIRS:
            assert_equal(ours(first, second, **options), theirs(first, second, **options))
    firsts, seconds = [pair[0] for pair in PAIRS], [pair[1] for pair in PAIRS]
    assert_equal(ours(firsts, seconds, **options), theirs(firsts, seconds, **options))


@pytest.mark.parametrize("options", PADDING.values(), ids=PADDING)
@pytest.mark.parametrize("kind", PADDED)
def test_padding(kind: str, options: dict[str, Any], folder_of: Callable[[str], Path]) -> None:
    ours, theirs = load(folder_of(kind))
    texts = BATCH
    if options == PADDING["model's length"] and ours.model_max_length > 1e20:
        texts = BATCH[:1]  # no length to pad to: nothing is padded
    assert_equal(ours(texts, **options), theirs(texts, **options))


@pytest.mark.parametrize("kind", ALL)
def test_words_pairs_and_tokens(kind: str, folder_of: Callable[[str], Path]) -> None:
    ours, theirs = load(folder_of(kind))
    rows = [text.split() for text in TEXTS[2:6]]
    assert_equal(ours(rows, is_split_into_words=True), theirs(rows, is_split_into_words=True))
    assert_equal(ours(rows[0], is_split_into_words=True), theirs(rows[0], is_split_into_words=True))
    assert_equal(
        ours(BATCH[:2], text_target=BATCH[2:4]),
        theirs(BATCH[:2], text_target=BATCH[2:4]),
    )
    for text in TEXTS:
        assert ours.tokenize(text) == theirs.tokenize(text)
        assert ours.tokenize(text, add_special_tokens=True) == theirs.tokenize(text, add_special_tokens=True)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        encoding, theirs_encoding = ours([text]), theirs([text])
        assert encoding.tokens(0) == theirs_encoding.tokens(0)
        assert encoding.word_ids(0) == theirs_encoding.word_ids(0)
        assert encoding.sequence_ids(0) == theirs_encoding.sequence_ids(0)
        assert encoding[0].ids == encoding.input_ids[0]


@pytest.mark.parametrize("kind", ALL)
def test_decoding(kind: str, folder_of: Callable[[str], Path]) -> None:
    ours, theirs = load(folder_of(kind))
    rows = [theirs(text)["input_ids"] for text in TEXTS]
    rng = np.random.default_rng(0)
    rows += [rng.integers(0, len(theirs), 40).tolist() for _ in range(30)]
    for skip in (False, True):
        for clean in (None, False, True):
            options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": clean}
            for row in rows:
                assert ours.decode(row, **options) == theirs.decode(row, **options)
            assert ours.batch_decode(rows, **options) == theirs.batch_decode(rows, **options)
            square = np.array(rows[-30:])
            assert ours.batch_decode(torch.tensor(square), **options) == theirs.batch_decode(
                square, **options
            )
            assert ours.decode(square[0], **options) == theirs.decode(square[0], **options)
        assert ours.convert_ids_to_tokens(rows[3], skip) == theirs.convert_ids_to_tokens(rows[3], skip)
    tokens = theirs.convert_ids_to_tokens(rows[4])
    assert ours.convert_ids_to_tokens(torch.tensor(rows[4])) == tokens
    assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    assert ours.convert_tokens_to_ids("no such token") == theirs.convert_tokens_to_ids("no such token")
    assert ours.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(tokens)
    assert ours.decode(5) == theirs.decode(5)
    assert ours.convert_ids_to_tokens(5) == theirs.convert_ids_to_tokens(5)


@pytest.mark.parametrize("kind", PADDED)
@pytest.mark.parametrize(
    "options",
    [
        {}, {"padding": "max_length", "max_length": 40}, {"pad_to_multiple_of": 4},
        {"padding_side": "left", "return_tensors": "pt"},
    ],
)  # fmt: skip
def test_pad(kind: str, options: dict[str, Any], folder_of: Callable[[str], Path]) -> None:
    ours, theirs = load(folder_of(kind))
    examples = [theirs(text) for text in BATCH[:4]]
    assert_equal(
        ours.pad([dict(one) for one in examples], **options),
        theirs.pad([dict(one) for one in examples], **options),
    )
    assert_equal(
        ours.pad({"input_ids": [[5, 6], [7]]}, **options), theirs.pad({"input_ids": [[5, 6], [7]]}, **options)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"add_bos_token": True, "add_eos_token": True}, {"add_bos_token": False}, {"padding_side": "right"},
        {"pad_token": "▁the"}, {"model_max_length": 6}, {"truncation_side": "right"}, {"eos_token": "<new>"},
        {"extra_special_tokens": ["<a>", "<b>"]}, {"split_special_tokens": True},
    ],
    ids=str,
)  # fmt: skip
def test_options_of_loading(options: dict[str, Any], folders: dict[str, Path]) -> None:
    ours = AutoTokenizer.from_pretrained(folders["llama"], **options)
    theirs = transformers.AutoTokenizer.from_pretrained(folders["llama"], **options)
    for text in (*TEXTS, "<a> and <b><new>"):
        assert_equal(ours(text, truncation=True), theirs(text, truncation=True))
        assert_equal(ours(text, text), theirs(text, text))
    assert_equal(ours(BATCH, padding=True), theirs(BATCH, padding=True))
    assert ours.all_special_ids == theirs.all_special_ids
    assert ours.special_tokens_map == theirs.special_tokens_map


def test_settings_can_change(folders: dict[str, Path]) -> None:
    ours = AutoTokenizer.from_pretrained(folders["no_pad"])
    theirs = transformers.AutoTokenizer.from_pretrained(folders["no_pad"])
    changes: list[Callable[[Any], Any]] = [
        lambda t: setattr(t, "pad_token", t.eos_token),
        lambda t: setattr(t, "padding_side", "left"),
        lambda t: setattr(t, "truncation_side", "left"),
        lambda t: setattr(t, "eos_token_id", 2),
        lambda t: setattr(t, "add_eos_token", True),
        lambda t: setattr(t, "add_bos_token", True),
        lambda t: setattr(t, "model_max_length", 9),
        lambda t: t.add_special_tokens({"pad_token": "[PAD]", "extra_special_tokens": ["<x>"]}),
        lambda t: t.add_tokens(["word", "other word"]),
    ]
    texts = [*BATCH, "a word, other word [PAD]<x>"]
    for change in changes:
        assert change(ours) == change(theirs)
        options = {"padding": ours.pad_token is not None, "truncation": True, "max_length": 12}
        assert_equal(ours(texts, **options), theirs(texts, **options))
        assert_equal(ours(texts, truncation=True), theirs(texts, truncation=True))
        assert (ours.pad_token_id, ours.eos_token_id, len(ours)) == (
            theirs.pad_token_id,
            theirs.eos_token_id,
            len(theirs),
        )
        row = theirs(texts[-1])["input_ids"]
        assert ours.decode(row, skip_special_tokens=True) == theirs.decode(row, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ALL)
def test_saved_is_loaded_equal(kind: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    ours, _ = load(folder_of(kind))
    ours(
        BATCH[:2], padding="max_length" if kind != "no_pad" else False, truncation=True, max_length=11
    )  # leaves no trace
    files = ours.save_pretrained(tmp_path)
    assert all(Path(file).is_file() for file in files)
    for again in (
        AutoTokenizer.from_pretrained(tmp_path),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
    ):
        assert again.get_vocab() == ours.get_vocab()
        assert again.special_tokens_map == ours.special_tokens_map
        assert again.all_special_ids == ours.all_special_ids
        assert again.chat_template == ours.chat_template
        for name in ("padding_side", "truncation_side", "model_input_names", "model_max_length"):
            assert getattr(again, name) == getattr(ours, name)
        for text in TEXTS:
            assert_equal(ours(text), again(text))
            assert ours.decode(ours(text).input_ids) == again.decode(ours(text).input_ids)
        assert_equal(ours([TEXTS[2]], [TEXTS[3]]), again([TEXTS[2]], [TEXTS[3]]))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("GPT2Tokenizer", "byte_level"),
        ("Qwen2TokenizerFast", "byte_level"),
        ("LlamaTokenizer", "llama"),
        ("LlamaTokenizerFast", "byte_level"),
        ("BertTokenizerFast", "wordpiece"),
        ("T5Tokenizer", "unigram"),
        ("PreTrainedTokenizerFast", "byte_level"),
    ],
)
def test_what_a_class_implies(name: str, kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folders[kind] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(f'{{"tokenizer_class": "{name}"}}')
    ours = AutoTokenizer.from_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for attribute in ("special_tokens_map", "padding_side", "model_input_names", "model_max_length"):
        assert getattr(ours, attribute) == getattr(theirs, attribute)
