"""SentencePiece models, read without the sentencepiece package, give its ids and its text."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taut.errors import TokenizerError
from taut.tokenizer import AutoTokenizer, IncrementalDetokenizer
from taut.tokenizer.sentencepiece import Kind, read_sentencepiece

from .conftest import CORPUS, TEXTS

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
              "remove_extra_whitespaces": False, "character_coverage": 0.98},
    "t5": {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    "unigram_bytes": {"model_type": "unigram", "byte_fallback": True, "normalization_rule_name": "nmt_nfkc",
                      "character_coverage": 0.98},
    "gemma": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
              "add_dummy_prefix": False, "remove_extra_whitespaces": False,
              "user_defined_symbols": ["<turn>", "▁▁", "▁▁▁", "▁▁▁▁", "\n\n"]},
    "bpe": {"model_type": "bpe", "normalization_rule_name": "nfkc_cf", "control_symbols": ["<ctl>"]},
}  # fmt: skip


def train(path: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS * 3 for line in text.split("\n") if line),
        model_writer=written, vocab_size=520 if options.get("byte_fallback") else 300, hard_vocab_limit=False,
        minloglevel=2, num_threads=1, **options,
    )  # fmt: skip
    path.write_bytes(written.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="module", params=MODELS)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Any, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    name = "spiece.model" if request.param == "t5" else "tokenizer.model"
    return request.param, train(folder / name, **MODELS[request.param]), folder


def comparable(name: str, text: str) -> bool:
    """Text in which no special token is spelled: here these are found, in SentencePiece only symbols are."""
    return not any(token in text for token in ("<s>", "</s>", "<unk>", "<pad>", "<ctl>"))


def test_ids_and_text(trained: tuple[str, Any, Path]) -> None:
    name, theirs, folder = trained
    ours = AutoTokenizer.from_pretrained(folder)
    assert [ours.convert_ids_to_tokens(index) for index in range(len(ours))] == [
        theirs.id_to_piece(index) for index in range(theirs.get_piece_size())
    ]
    texts = [*TEXTS, *CORPUS, "the <turn> then <turn>", "   ".join(CORPUS), "a  b   c    d", "<0x41> byte"]
    for text in filter(lambda text: comparable(name, text), texts):
        ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == ids, text
        assert (
            ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids).replace(" \u2047 ", "")
            or 0 in ids
        )
    assert (ours.bos_token, ours.eos_token) == (
        theirs.id_to_piece(theirs.bos_id()) if theirs.bos_id() >= 0 else None,
        theirs.id_to_piece(theirs.eos_id()),
    )
    expected = theirs.encode("the dog", add_bos=name != "t5", add_eos=name == "t5")
    assert ours.encode("the dog") == expected


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cn", "Mn", "Cf"]), max_size=40))
def test_any_text(trained: tuple[str, Any, Path], text: str) -> None:
    name, theirs, folder = trained
    if name in ("llama", "gemma") and comparable(name, text):
        ours = AutoTokenizer.from_pretrained(folder)
        ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == ids
        assert ours.decode(ids) == theirs.decode(ids)
        detokenizer = IncrementalDetokenizer(ours)
        assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == ours.decode(ids, True)


def test_saved_for_transformers(trained: tuple[str, Any, Path], tmp_path: Path) -> None:
    _, _, folder = trained
    ours = AutoTokenizer.from_pretrained(folder)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert dict(ours(text)) == dict(theirs(text))
        assert ours.decode(ours(text).input_ids) == theirs.decode(ours(text).input_ids)


def test_settings_and_added_tokens_beside_the_model(tmp_path: Path) -> None:
    train(tmp_path / "tokenizer.model", **MODELS["llama"])
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": True,
        "pad_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    size = len(AutoTokenizer.from_pretrained(tmp_path))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<b>": size + 1, "<a>": size}))
    ours = AutoTokenizer.from_pretrained(tmp_path)
    assert ours.padding_side == "left"
    assert ours.encode("x<a>")[-2:] == [size, 2]
    assert ours.get_vocab()["<b>"] == size + 1
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<b>": size + 5}))
    with pytest.raises(TokenizerError, match=rf"'<b>' should have id {size + 5} but gets {size}"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_pieces(tmp_path: Path) -> None:
    theirs = train(tmp_path / "tokenizer.model", **MODELS["gemma"])
    model = read_sentencepiece(tmp_path / "tokenizer.model")
    assert [piece.text for piece in model.pieces] == [theirs.id_to_piece(i) for i in range(len(model.pieces))]
    assert [piece.score for piece in model.pieces] == [theirs.get_score(i) for i in range(len(model.pieces))]
    assert [p.kind == Kind.BYTE for p in model.pieces] == [
        theirs.is_byte(i) for i in range(len(model.pieces))
    ]
    assert (model.unk_id, model.bos_id, model.eos_id, model.pad_id) == (
        theirs.unk_id(), theirs.bos_id(), theirs.eos_id(), theirs.pad_id()
    )  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it has no pieces"),
        (b"\x00\x01\x02", "not a SentencePiece model"),
        (b"not a protobuf at all, but text", "not a SentencePiece model"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "not a SentencePiece model"),
        (b"\x0a" + b"\xff" * 20, "not a SentencePiece model"),
        (b"IQ== 0\nIg== 1\n", "it has no pieces"),  # a tiktoken file goes by the same name
    ],
)
def test_files_that_are_none(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(TokenizerError, match=rf"tokenizer\.model: .*{message}"):
        AutoTokenizer.from_pretrained(tmp_path)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    if not (tmp_path / "whole").is_file():
        train(tmp_path / "whole", **MODELS["t5"])
    whole = (tmp_path / "whole").read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    path.write_bytes(
        whole[:at] if cut else whole[:at] + data.draw(st.binary(min_size=1, max_size=3)) + whole[at + 1 :]
    )
    try:
        AutoTokenizer.from_pretrained(tmp_path).encode("the text")
    except TokenizerError as error:
        assert "tokenizer.model" in str(error) or "SentencePiece" in str(error)


@pytest.mark.parametrize("kind", ["word", "char"])
def test_models_without_subwords(kind: str, tmp_path: Path) -> None:
    train(tmp_path / "tokenizer.model", model_type=kind)
    with pytest.raises(TokenizerError, match=f"type is {kind}; supported: unigram, bpe"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_siglip_reads_its_texts_as_the_oracle_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "spiece.model", **MODELS["t5"])
    # It asks for protobuf, and needs none.
    monkeypatch.setattr("transformers.models.siglip.tokenization_siglip.requires_backends", lambda *_: None)
    theirs = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "SiglipTokenizer"}')
    ours = AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.model_max_length, ours.pad_token) == (64, "</s>")
    for text in ("A photo of two CATS.", "the dog  (and the fox)!", "", "dog's", *CORPUS[:3]):
        assert ours.encode(text) == theirs.encode(text), text
