"""Tokenizers of encoder-decoders: SentencePiece pieces under the ids, templates and languages of families."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from taut.errors import TokenizerError
from taut.tokenizer import AutoTokenizer, IncrementalDetokenizer

from .conftest import CORPUS, TEXTS
from .test_against_transformers import assert_equal
from .test_sentencepiece import comparable, train

T5 = {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
FAIRSEQ = {"model_type": "unigram"}
LANGUAGES = ("mbart", "mbart50")
# Each family: the file, how its model is trained, tokenizer_config.json, how far its ids are shifted.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "t5": ("spiece.model", T5, {"tokenizer_class": "T5Tokenizer", "extra_ids": 7}, 0),
    "t5 of 100": ("spiece.model", T5, {"tokenizer_class": "T5Tokenizer"}, 0),
    "mt5": ("spiece.model", T5, {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}, 0),
    "pegasus": ("spiece.model", T5, {"tokenizer_class": "PegasusTokenizer"}, 103),
    "mbart": ("sentencepiece.bpe.model", FAIRSEQ, {"tokenizer_class": "MBartTokenizer"}, 1),
    "mbart50": (
        "sentencepiece.bpe.model", FAIRSEQ,
        {"tokenizer_class": "MBart50Tokenizer", "src_lang": "fr_XX", "tgt_lang": "gl_ES"}, 1,
    ),
    "xlm-roberta": ("sentencepiece.bpe.model", FAIRSEQ, {"tokenizer_class": "XLMRobertaTokenizer"}, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """The folder of a family, and its SentencePiece model."""
    made: dict[str, tuple[Path, Any]] = {}

    def make(family: str) -> tuple[Path, Any]:
        if family not in made:
            file, options, config, _ = FAMILIES[family]
            path = tmp_path_factory.mktemp(family)
            made[family] = path, train(path / file, **options)
            (path / "tokenizer_config.json").write_text(json.dumps(config))
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_the_familys(family: str, folder: Callable[[str], tuple[Path, Any]]) -> None:
    path, model = folder(family)
    shift = FAMILIES[family][-1]
    ours = AutoTokenizer.from_pretrained(path)
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.vocab_size == theirs.vocab_size
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)
    assert (ours.model_input_names, ours.padding_side) == (theirs.model_input_names, theirs.padding_side)
    for text in filter(lambda text: comparable(family, text), [*TEXTS, *CORPUS]):
        ids = [ours.unk_token_id if i == model.unk_id() else i + shift for i in model.encode(text)]
        assert ours(text, add_special_tokens=False).input_ids == ids, text
    for text in ("The quick dog", "a<mask> b", "the</s>end<pad>", "<extra_id_3> a <extra_id_0>"):
        assert_equal(ours(text), theirs(text))
        assert_equal(ours(text, "the pair"), theirs(text, "the pair"))
        assert_equal(ours(text, text_target="lazy dog"), theirs(text, text_target="lazy dog"))
    batch = ["The quick dog", "a"]
    assert_equal(
        ours(batch, text_target=batch, padding=True, return_tensors="pt"),
        theirs(batch, text_target=batch, padding=True, return_tensors="pt"),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding(family: str, folder: Callable[[str], tuple[Path, Any]]) -> None:
    ours = AutoTokenizer.from_pretrained(folder(family)[0])
    theirs = transformers.AutoTokenizer.from_pretrained(folder(family)[0])
    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        ids = torch.randint(len(ours), (12,), generator=draw).tolist()
        assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True)
        detokenizer = IncrementalDetokenizer(ours)
        pieces = "".join(map(detokenizer.push, ids)) + detokenizer.finish()
        assert pieces == ours.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_is_loaded_equal(
    family: str, folder: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    ours = AutoTokenizer.from_pretrained(folder(family)[0])
    ours.save_pretrained(tmp_path)
    for again in (
        AutoTokenizer.from_pretrained(tmp_path),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(ours)),
    ):
        assert again.get_vocab() == ours.get_vocab()
        assert again.special_tokens_map == ours.special_tokens_map
        assert set(again.all_special_ids) == set(ours.all_special_ids)
        for text in ("The quick dog", "a<mask> b", "the</s>end"):
            assert_equal(ours(text, text_target="lazy"), again(text, text_target="lazy"))
            assert_equal(ours(text, "pair"), again(text, "pair"))


@pytest.mark.parametrize("family", LANGUAGES)
def test_languages(family: str, folder: Callable[[str], tuple[Path, Any]]) -> None:
    path, _ = folder(family)
    options = {"src_lang": "ro_RO", "tgt_lang": "de_DE"}
    ours = AutoTokenizer.from_pretrained(path, **options)
    theirs = transformers.AutoTokenizer.from_pretrained(path, **options)
    assert ours.lang_code_to_id == theirs.lang_code_to_id
    changes: list[tuple[str, str]] = [("src_lang", "zh_CN"), ("tgt_lang", "it_IT"), ("src_lang", "en_XX")]
    for name, code in changes:
        setattr(ours, name, code)
        setattr(theirs, name, code)
        assert (ours.src_lang, ours.tgt_lang) == (theirs.src_lang, theirs.tgt_lang)
        assert_equal(ours("the dog", text_target="dog"), theirs("the dog", text_target="dog"))
        assert_equal(ours(text_target="dog"), theirs(text_target="dog"))
        assert_equal(ours("the dog"), theirs("the dog"))  # the target's language is gone again


def test_languages_of_a_tokenizer_json(folder: Callable[[str], tuple[Path, Any]], tmp_path: Path) -> None:
    """The file's template has one language for good; the settings decide."""
    transformers.AutoTokenizer.from_pretrained(folder("mbart50")[0]).save_pretrained(tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path, src_lang="ja_XX")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, src_lang="ja_XX")
    assert_equal(ours("the dog", text_target="dog"), theirs("the dog", text_target="dog"))
    assert ours.tgt_lang == "gl_ES"


@pytest.mark.parametrize(
    ("model_type", "family"), [("t5", "t5 of 100"), ("pegasus", "pegasus"), ("mbart", "mbart")]
)
def test_class_of_a_folder_that_names_none(
    model_type: str, family: str, folder: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    path, _ = folder(family)
    file = FAMILIES[family][0]
    (tmp_path / file).write_bytes((path / file).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    ours, named = AutoTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(path)
    assert ours.get_vocab() == named.get_vocab()
    assert_equal(ours("the dog", "dog"), named("the dog", "dog"))


def test_bad_input(folder: Callable[[str], tuple[Path, Any]]) -> None:
    path, _ = folder("mbart")
    with pytest.raises(TokenizerError, match=r"src_lang is 'en'; known: ar_AR, .*"):
        AutoTokenizer.from_pretrained(path, src_lang="en")
    ours = AutoTokenizer.from_pretrained(path)
    with pytest.raises(TokenizerError, match=r"tgt_lang is 'ro'; known: ar_AR, "):
        ours.tgt_lang = "ro"
    with pytest.raises(TokenizerError, match="add_eos_token are no settings of this tokenizer"):
        ours.add_eos_token = False
    with pytest.raises(TokenizerError, match="add_eos_token are no settings of this tokenizer"):
        AutoTokenizer.from_pretrained(path, add_bos_token=True)
    with pytest.raises(TokenizerError, match="src_lang is an option of MBart50Tokenizer and MBartTokenizer"):
        AutoTokenizer.from_pretrained(folder("t5")[0], src_lang="en_XX")


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of other texts, and a vocabulary that lacks some of their pieces."""
    path = tmp_path_factory.mktemp("marian")
    sides = [
        train(path / "source.spm", model_type="unigram", pad_id=-1, bos_id=-1),
        train(path / "target.spm", model_type="unigram", pad_id=-1, bos_id=-1, max_sentencepiece_length=3),
    ]
    pieces = [side.id_to_piece(i) for side in sides for i in range(side.get_piece_size()) if i % 7]
    tokens = dict.fromkeys(["</s>", "<unk>", *pieces, "你", ">>fra<<", ">>deu_Latn<<", "<pad>"])
    (path / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    config = {"tokenizer_class": "MarianTokenizer", "source_lang": "eng", "target_lang": "mul"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


CODES = (
    ">>fra<< the dog",
    ">>deu_Latn<<the dog",
    ">>none<< dog",
    "the >>fra<< dog",
    ">>fra",
    ">> <<",
    " >>fra<<",
)
SPECIAL = ("the</s> dog<pad>x", "<unk>", "a <new>", ">>fra<< a</s>b")


@pytest.mark.filterwarnings("ignore:Recommended")
def test_marian(marian: Path, tmp_path: Path) -> None:
    ours = AutoTokenizer.from_pretrained(marian)
    theirs = transformers.AutoTokenizer.from_pretrained(marian)
    for _ in range(2):  # as loaded, then as saved and loaded again
        names = "eos_token unk_token pad_token model_max_length vocab_size padding_side special_tokens_map"
        for name in (*names.split(), "source_lang", "target_lang", "supported_language_codes"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert ours.get_vocab() == theirs.get_vocab()
        assert len(ours) == len(theirs)
        for text in filter(lambda text: comparable("", text), [*TEXTS, *CORPUS, *CODES, *SPECIAL]):
            for options in ({}, {"add_special_tokens": False}, {"truncation": True, "max_length": 5}):
                assert_equal(ours(text, **options), theirs(text, **options))
            assert_equal(ours(text, text_target=text), theirs(text, text_target=text))
            assert_equal(ours(text, "dog"), theirs(text, "dog"))
        for text in (*SPECIAL, *CODES):
            assert_equal(ours(text), theirs(text))
        batch = ["The quick dog", "", ">>fra<< a"]
        options = {"text_target": batch, "padding": True, "return_tensors": "pt"}
        assert_equal(ours(batch, **options), theirs(batch, **options))
        assert_equal(
            ours(["the", "dog"], is_split_into_words=True), theirs(["the", "dog"], is_split_into_words=True)
        )
        draw = torch.Generator().manual_seed(1)
        for _ in range(20):
            ids = torch.randint(len(ours), (12,), generator=draw).tolist()
            text = ours.decode(ids, skip_special_tokens=True)
            assert text.strip() == theirs.decode(ids, skip_special_tokens=True)
            detokenizer = IncrementalDetokenizer(ours)
            assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == text
        assert ours.add_tokens(["<new>"]) == theirs.add_tokens(["<new>"])
        ours.save_pretrained(tmp_path)
        ours, theirs = pickle.loads(pickle.dumps(ours)), transformers.AutoTokenizer.from_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == ours.get_vocab()
    for text in (*TEXTS, *CODES, *SPECIAL):
        assert_equal(again(text, text_target=text), ours(text, text_target=text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target.spm": None}, r"source\.spm without target\.spm; download it again"),
        ({"vocab.json": "{}"}, r"vocab\.json: it lacks the unk_token str '<unk>'"),
        ({"vocab.json": '{"<unk>": "a"}'}, r"vocab\.json: the id of str '<unk>' is 'a'"),
        ({"source.spm": "none"}, r"source\.spm: not a SentencePiece model"),
        ({"tokenizer_config.json": '{"separate_vocabs": true}'}, "separate_vocabs.* is not supported"),
    ],
)
def test_marian_bad_files(change: dict[str, str | None], message: str, marian: Path, tmp_path: Path) -> None:
    for file in marian.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for file, text in change.items():
        (tmp_path / file).unlink() if text is None else (tmp_path / file).write_text(text)
    with pytest.raises(TokenizerError, match=message):
        AutoTokenizer.from_pretrained(tmp_path)


def test_marian_bad_options(marian: Path) -> None:
    with pytest.raises(TokenizerError, match="src_lang is an option of MBart50Tokenizer and MBartTokenizer"):
        AutoTokenizer.from_pretrained(marian, src_lang="en_XX")
    with pytest.raises(TokenizerError, match="no settings of this tokenizer: its texts have an end"):
        AutoTokenizer.from_pretrained(marian, add_eos_token=False)
    with pytest.raises(TokenizerError, match="doesn't know where its tokens stand"):
        AutoTokenizer.from_pretrained(marian)("a", return_offsets_mapping=True)
