"""Tokenizers of characters that frames are scored for, against transformers'."""

from __future__ import annotations

import json
import random

import pytest
import transformers

from taut import AutoTokenizer
from taut.errors import TokenizerError

USUAL = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAOINSHRDLUMWCFGYPBVK'XJQZ"]
CASES = {
    "usual": (USUAL, {}),
    "lower": (USUAL, {"do_lower_case": True}),
    # What a person writes who tunes a model for another language: no beginning and end among the characters.
    "own": (
        [*"abcdefgh ijklß", "|", "[UNK]", "[PAD]"],
        {"unk_token": "[UNK]", "pad_token": "[PAD]", "word_delimiter_token": "|"},
    ),
    "other-space": (
        ["_", *"ABC", "<pad>", "ch", "<unk>"],
        {"word_delimiter_token": "_", "replace_word_delimiter_char": "-"},
    ),
}
TEXTS = ["HELLO WORLD", "hello world", "A  <s>B<pad>", "chacha a", "abc, ß|é", ""]


def pair(name: str, tmp_path):
    tokens, options = CASES[name]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    theirs = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), **options)
    theirs.save_pretrained(tmp_path)
    return theirs, AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_texts_and_special_tokens_equal_the_oracles(name, tmp_path):
    theirs, ours = pair(name, tmp_path)
    assert len(ours) == len(theirs) and ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
    got, want = (t(TEXTS[:3], padding=True, return_tensors="pt") for t in (ours, theirs))
    assert got.input_ids.tolist() == want.input_ids.tolist()
    assert got.attention_mask.tolist() == want.attention_mask.tolist()


@pytest.mark.parametrize("name", CASES)
def test_frames_become_the_oracles_text_and_offsets(name, tmp_path):
    theirs, ours = pair(name, tmp_path)
    generator = random.Random(1)
    rows = []
    for _ in range(20):  # runs of the same id, blanks and delimiters among them
        often = [theirs.pad_token_id, theirs.word_delimiter_token_id, *range(len(theirs))]
        rows.append([i for i in generator.choices(often, k=15) for _ in range(generator.randint(1, 3))])
    rows = [row[:15] for row in rows]
    for options in (
        {},
        {"skip_special_tokens": True},
        {"group_tokens": False},
        {"spaces_between_special_tokens": True},
        {"clean_up_tokenization_spaces": True},
    ):
        assert ours.batch_decode(rows, **options) == theirs.batch_decode(rows, **options)
        assert ours.decode(rows[0], **options) == theirs.decode(rows[0], **options)
    options = {"output_char_offsets": True, "output_word_offsets": True}
    got, want = ours.batch_decode(rows, **options), theirs.batch_decode(rows, **options)
    assert got["text"] == want.text
    assert got["char_offsets"] == want.char_offsets
    assert got["word_offsets"] == want.word_offsets


def test_saving_and_many_languages(tmp_path):
    theirs, ours = pair("own", tmp_path)
    ours.save_pretrained(tmp_path / "saved")
    for again in (
        reader.from_pretrained(tmp_path / "saved") for reader in (AutoTokenizer, transformers.AutoTokenizer)
    ):
        assert again.get_vocab() == theirs.get_vocab()
        assert again("abc l")["input_ids"] == theirs("abc l")["input_ids"]
        assert again.decode([0, 0, 1, 17, 17, 1]) == theirs.decode([0, 0, 1, 17, 17, 1])
    languages = {
        "eng": {"<pad>": 0, "a": 1, "|": 2, "<unk>": 3},
        "deu": {"<pad>": 0, "ß": 1, "|": 2, "<unk>": 3},
    }
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "vocab.json").write_text(json.dumps(languages))
    with pytest.raises(TokenizerError, match=r"target_lang is None; pass target_lang= with one of eng, deu"):
        AutoTokenizer.from_pretrained(tmp_path / "many")
    german = AutoTokenizer.from_pretrained(tmp_path / "many", target_lang="deu")
    assert german.decode(german("ß ß")["input_ids"]) == "ß ß"
    german.save_pretrained(tmp_path / "german")
    assert AutoTokenizer.from_pretrained(tmp_path / "german", target_lang="eng").decode([1]) == "a"


def test_what_is_wrong_is_named(tmp_path):
    _, ours = pair("usual", tmp_path)
    with pytest.raises(TokenizerError, match="token id 99 is not in the vocabulary"):
        ours.decode([0, 99])
    (tmp_path / "vocab.json").write_text('{"a": "b"}')
    with pytest.raises(TokenizerError, match="the id of str 'a' is 'b'; expected a whole number"):
        AutoTokenizer.from_pretrained(tmp_path)
