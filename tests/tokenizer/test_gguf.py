"""Tokenizers from GGUF metadata: SmolLM2's own file, and small files written here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import pre_tokenizers

from taut.errors import TokenizerError
from taut.tokenizer import AutoTokenizer, Tokenizer
from taut.tokenizer.gguf import _PRE, tokenizer_from_gguf

from .conftest import TEXTS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
EMBEDDING = np.zeros((4, 32), np.float32)


def write(path: Path, architecture: str = "llama", **values: Any) -> Path:
    """A GGUF file with the tokenizer metadata `values`, under `tokenizer.` with `__` for a dot."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_vocab_size(max(len(values.get("ggml__tokens", ())), 1))
    writer.add_layer_norm_rms_eps(1e-5)
    add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for key, value in values.items():
        add[type(value)](f"tokenizer.{key.replace('__', '.')}", value)
    writer.add_tensor("token_embd.weight", EMBEDDING)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def metadata(values: dict[str, Any]) -> dict[str, Any]:
    return {f"tokenizer.{key.replace('__', '.')}": value for key, value in values.items()}


def byte_level_values(folder: Path, pre: str) -> dict[str, Any]:
    """The metadata that a byte-level tokenizer.json becomes."""
    state = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocab = state.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    added = {index: token.special for index, token in state.get_added_tokens_decoder().items()}

    merges = json.loads(state.to_str())["model"]["merges"]
    return {
        "ggml__model": "gpt2",
        "ggml__pre": pre,
        "ggml__tokens": tokens,
        "ggml__token_type": [
            NORMAL if index not in added else CONTROL if added[index] else USER_DEFINED
            for index in range(len(tokens))
        ],
        "ggml__merges": [" ".join(pair) for pair in merges],
        "ggml__bos_token_id": 1,
        "ggml__eos_token_id": 2,
        "ggml__padding_token_id": 0,
        "ggml__unknown_token_id": 0,
    }


def theirs_of(path: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def assert_same(ours: Tokenizer, theirs: Any, texts: list[str]) -> None:
    for text in texts:
        assert dict(ours(text)) == dict(theirs(text)), text
        ids = ours(text).input_ids
        for skip in (False, True):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip), text


def corpus() -> list[str]:
    """Text of many kinds: this repository's own files, every block of Unicode, runs, mixtures."""
    root = Path(__file__).parents[2]
    texts = [*TEXTS, *(path.read_text() for path in sorted((root / "taut").glob("*.py")))]
    blocks = (*range(32, 0xD700, 96), 0x1F600, 0x1F900)
    texts += ["".join(map(chr, range(start, start + 96))) for start in blocks]
    texts += [" " * n + "x" + "\n" * n + "\t" * n + "1" * n + "!" * n for n in range(1, 40)]
    return texts + [a + b + c for a in "a1! " for b in (" ", "  ", "\n", "\t") for c in ("b", "22", "世")]


def test_smollm2(smollm: Path) -> None:
    ours, theirs = AutoTokenizer.from_pretrained(smollm), theirs_of(smollm)
    # The file says that digits stand alone ("smollm"); transformers does not know this name and joins a space
    # with the digit after it. SmolLM2's own tokenizer.json has these two steps:
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert_same(ours, theirs, corpus())
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template
    assert ours.tokenize("a  1") == ["a", "ĠĠ", "1"]
    messages = [{"role": "user", "content": "Hi <|im_end|> 12"}, {"role": "assistant", "content": "Yes."}]
    for options in ({}, {"add_generation_prompt": True}, {"tokenize": False}):
        rendered = ours.apply_chat_template(messages, **options)
        assert rendered == theirs.apply_chat_template(messages, **options)


def test_smollm2_saved_is_loaded_equal(smollm: Path, tmp_path: Path) -> None:
    ours = AutoTokenizer.from_pretrained(smollm)
    ours.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # as beside a saved model
    for loader in (transformers.AutoTokenizer, AutoTokenizer):
        again = loader.from_pretrained(tmp_path)
        assert_same(ours, again, TEXTS)
        assert again.get_vocab() == ours.get_vocab()
        assert again.special_tokens_map == ours.special_tokens_map
        assert again.chat_template == ours.chat_template


@pytest.mark.parametrize("pre", ["default", "gpt-2", "llama-bpe", "qwen2", "tekken", "gpt-4o", "qwen35"])
def test_pre_tokenizers_against_transformers(pre: str, folders: dict[str, Path], tmp_path: Path) -> None:
    values = {**byte_level_values(folders["byte_level"], pre), "ggml__add_bos_token": False}
    path = write(tmp_path / "tiny.gguf", **values)
    ours, theirs = AutoTokenizer.from_pretrained(path), theirs_of(path)
    if pre in ("qwen2", "qwen35"):  # as in these models' own tokenizer.json; transformers forgets it here
        theirs.backend_tokenizer.normalizer = tokenizers.normalizers.NFC()
    if pre in ("llama-bpe", "tekken"):
        theirs.backend_tokenizer.model.ignore_merges = True
    assert_same(ours, theirs, corpus())


@pytest.mark.parametrize("pre", sorted({name for entry in _PRE for name in entry.names}))
def test_every_pre_tokenizer_keeps_the_text(pre: str, folders: dict[str, Path]) -> None:
    values = byte_level_values(folders["no_pad"], pre)
    backend, settings = tokenizer_from_gguf(Path("x.gguf"), metadata(values))
    ours = Tokenizer(backend, **settings)
    for text in TEXTS:
        composed = "e\u0301" in text  # some compose characters first
        ids = ours(text, add_special_tokens=False).input_ids
        assert composed or ours.decode(ids) == text
    assert (ours.encode("a")[0] == ours.bos_token_id) is settings["add_bos_token"]


def spm_values(add_bos: bool | None = None) -> dict[str, Any]:
    words = ["▁the", "the", "th", "he", "▁a", "▁t", "ab", "▁ab", "aa", "▁b", "is", "▁is", "▁▁", "▁▁▁▁", "▁th"]
    letters = [*"abcdefghijklmnopqrstuvwxyz.,!0123456789", "▁"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<tool>", *words, *letters]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, USER_DEFINED, *[NORMAL] * (len(words) + len(letters))]
    scores = [0.0] * 260 + [-float(index) for index in range(len(words) + len(letters))]
    values = {
        "ggml__model": "llama", "ggml__tokens": tokens, "ggml__token_type": kinds, "ggml__scores": scores,
        "ggml__bos_token_id": 1, "ggml__eos_token_id": 2, "ggml__unknown_token_id": 0,
    }  # fmt: skip
    return values if add_bos is None else {**values, "ggml__add_bos_token": add_bos}


@pytest.mark.parametrize("add_bos", [None, True, False])
def test_sentencepiece_against_transformers(add_bos: bool | None, tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.gguf", **spm_values(add_bos))
    ours, theirs = AutoTokenizer.from_pretrained(path), theirs_of(path)
    # transformers puts the space only before the whole text, and not if it starts with one; SentencePiece and
    # llama.cpp do otherwise, so these texts have neither.
    texts = [text for text in TEXTS if not text.startswith(" ") and "<" not in text]
    texts += ["the abs", "is that so  is it    aab", "aaaaabababthethe", "<0x41> literally"]
    assert_same(ours, theirs, texts)
    assert ours.encode("the") == ([] if add_bos is False else [1]) + [ours.get_vocab()["▁the"]]
    assert ours.decode(ours.encode("  two spaces, 世 <tool>"), True) == "  two spaces, 世 <tool>"
    assert ours.tokenize("ab<tool>ab") == ["▁ab", "<tool>", "▁ab"]


def test_names_of_templates_and_more_special_tokens(tmp_path: Path) -> None:
    values = {**spm_values(), "chat_template": "A", "chat_template__tool_use": "B", "ggml__cls_token_id": 2}
    ours = AutoTokenizer.from_pretrained(write(tmp_path / "tiny.gguf", **values))
    assert ours.chat_template == {"default": "A", "tool_use": "B"}
    assert ours.cls_token == "</s>"


def _without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.pop(key)


def _with(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("ggml__model"), "no tokenizer.ggml.model"),
        (_without("ggml__tokens"), "no tokenizer.ggml.tokens"),
        (_without("ggml__scores"), "no tokenizer.ggml.scores"),
        (_with(ggml__model="gpt3"), "'gpt3'; known: gpt2, llama; nearest: gpt2"),
        (_with(ggml__model="gpt2", ggml__pre="qwen22"), "'qwen22'; known: default, .*nearest: qwen2"),
        (_with(ggml__model="gpt2", ggml__merges=["t x y"]), "the merge 't x y' .* does not join two tokens"),
        (_with(ggml__bos_token_id=10**6), "bos_token_id is 1000000, but there are"),
        (_with(ggml__scores=[1.0]), "tokens but 1 in tokenizer.ggml.scores"),
        (_with(ggml__token_type=[1]), "tokens but 1 in tokenizer.ggml.token_type"),
        (_with(ggml__eos_token_id="two"), "eos_token_id must be int, not str"),
        (_with(ggml__tokens=[1, 2]), "tokens must be a list of str"),
    ],
)  # fmt: skip
def test_metadata_that_is_wrong(change: Callable[[dict[str, Any]], None], message: str) -> None:
    values = spm_values()
    change(values)
    with pytest.raises(TokenizerError, match=rf"x\.gguf: .*{message}"):
        tokenizer_from_gguf(Path("x.gguf"), metadata(values))
