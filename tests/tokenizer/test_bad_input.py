"""Files, texts and options that are wrong: each a TokenizerError that names the thing and the next step."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from taut.errors import CheckpointError, TautError, TokenizerError
from taut.tokenizer import AutoTokenizer, BatchEncoding, Tokenizer

from .conftest import TEXTS


@pytest.fixture(scope="module")
def tokenizer(folders: dict[str, Path]) -> Tokenizer:
    return AutoTokenizer.from_pretrained(folders["byte_level"])


FILES: dict[str, tuple[dict[str, str | bytes], str]] = {
    "no files": (
        {},
        r"no tokenizer; looked for tokenizer\.json, tokenizer\.model, spiece\.model, .*holds: nothing",
    ),
    "other files": ({"config.json": "{}", "vocab.txt": "a"}, r"looked for .*holds: config\.json, vocab\.txt"),
    "not JSON": (
        {"tokenizer.json": "{"},
        r"tokenizer\.json: not a tokenizer that can be read.*download it again",
    ),
    "not a tokenizer": ({"tokenizer.json": '{"model": 5}'}, r"tokenizer\.json: not a tokenizer"),
    "empty": ({"tokenizer.json": ""}, r"tokenizer\.json: not a tokenizer"),
    "binary": ({"tokenizer.json": b"\xff\x00\xfe"}, r"tokenizer\.json: not a tokenizer"),
    "broken config": ({"tokenizer_config.json": "{"}, r"tokenizer_config\.json: not valid JSON"),
    "deep config": ({"tokenizer_config.json": '{"a":' * 100_000}, r"tokenizer_config\.json: not valid JSON"),
    "list as config": (
        {"tokenizer_config.json": "[]"},
        r"tokenizer_config\.json: must hold a JSON object, not list",
    ),
    "binary config": ({"tokenizer_config.json": b"\xff"}, r"tokenizer_config\.json: can't be read"),
    "bad token": (
        {"tokenizer_config.json": '{"eos_token": {"lstrip": true}}'},
        r"eos_token must be a string or have a 'content'",
    ),
    "bad extra tokens": (
        {"tokenizer_config.json": '{"extra_special_tokens": 5}'},
        "extra_special_tokens must be a list",
    ),
    "bad side": (
        {"tokenizer_config.json": '{"padding_side": "top"}'},
        "padding_side is 'top'; known: left, right",
    ),
    "bad length": (
        {"tokenizer_config.json": '{"model_max_length": "long"}'},
        "model_max_length must be a number",
    ),
    "bad names": (
        {"tokenizer_config.json": '{"model_input_names": "ids"}'},
        "model_input_names must be a list",
    ),
    "bad template": (
        {"tokenizer_config.json": '{"chat_template": 5}'},
        "chat_template must be a string or a list",
    ),
    "bad templates": (
        {"tokenizer_config.json": '{"chat_template": [{"name": "a"}]}'},
        "chat_template must be",
    ),
    "binary template": ({"chat_template.jinja": b"\xff"}, r"chat_template\.jinja: can't be read"),
    "bad id": (
        {"tokenizer_config.json": '{"added_tokens_decoder": {"x": {"content": "y"}}}'},
        "id 'x' of an added token",
    ),
    "gap": (
        {"tokenizer_config.json": '{"added_tokens_decoder": {"9999": {"content": "y"}}}'},
        "'y' should have id 9999",
    ),
    "broken map": ({"special_tokens_map.json": "nope"}, r"special_tokens_map\.json: not valid JSON"),
    "broken model config": ({"config.json": "nope"}, r"config\.json: not valid JSON"),
}


@pytest.mark.parametrize("case", FILES)
def test_files(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    files, message = FILES[case]
    if files and "vocab.txt" not in files:
        (tmp_path / "tokenizer.json").write_bytes((folders["byte_level"] / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TokenizerError, match=message) as raised:
        AutoTokenizer.from_pretrained(tmp_path)
    assert (
        str(tmp_path) in str(raised.value) or "known:" in str(raised.value) or "must be" in str(raised.value)
    )


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        AutoTokenizer.from_pretrained(tmp_path / "missing")
    (tmp_path / "text.gguf").write_bytes(b"not a GGUF file")
    with pytest.raises(TautError, match=r"text\.gguf"):
        AutoTokenizer.from_pretrained(tmp_path / "text.gguf")
    with pytest.raises(
        TokenizerError, match=r"unknown option 'paddin_side'; known: .*; nearest: padding_side"
    ):
        AutoTokenizer.from_pretrained(tmp_path, paddin_side="left")


def test_special_tokens_from_the_model_config(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folders["byte_level"] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null}')
    (tmp_path / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": [2, 0]}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 0, "pad_token_id": 0}')
    ours = AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.bos_token, ours.eos_token_id, ours.pad_token_id) == (None, 2, 0)  # null: none on purpose


CALLS: dict[str, tuple[Callable[[Tokenizer], Any], str]] = {
    "None": (lambda t: t(None), "the text is None; pass a string or a list of strings"),
    "nothing": (lambda t: t(), "the text is None"),
    "number": (lambda t: t(5), "text must be a string, not int 5"),
    "bytes": (lambda t: t(b"a"), "text must be a string, not bytes b'a'"),
    "list with None": (lambda t: t(["a", None]), r"text\[1\] must be a string, not None"),
    "list with a number": (lambda t: t(["a", 5]), r"text\[1\] must be a string, not int 5"),
    "ids": (lambda t: t([1, 2, 3]), r"text\[0\] must be a string, not int 1"),
    "lone surrogate": (lambda t: t("a\ud800"), "text is not valid text: .* at character 1; repair it"),
    "one pair": (lambda t: t(["a"], "b"), "both be one text, or both be lists"),
    "uneven pairs": (lambda t: t(["a", "b"], ["c"]), "2 texts but 1 in text_pair"),
    "pair of None": (lambda t: t(["a"], [None]), r"text_pair\[0\] must be a string, not None"),
    "words": (lambda t: t("a b", is_split_into_words=True), "must be a list of words"),
    "padding": (lambda t: t("a", padding="long"), "padding is 'long'; known: longest"),
    "truncation": (lambda t: t("a", truncation="first"), "truncation is 'first'; known: longest_first"),
    "negative length": (
        lambda t: t("a", truncation=True, max_length=-1),
        "must be an int of at least 0, not -1",
    ),
    "odd length": (
        lambda t: t("a", truncation=True, max_length=2.5),
        "must be an int of at least 0, not 2.5",
    ),
    "stride": (
        lambda t: t("a b c d", truncation=True, max_length=3, stride=3),
        "stride=3 does not fit max_length=3",
    ),
    "multiple": (
        lambda t: t("a", truncation=True, padding=True, max_length=9, pad_to_multiple_of=8),
        "contradict each other",
    ),
    "side": (lambda t: t("a", padding=True, padding_side="top"), "padding_side is 'top'; known: left, right"),
    "set side": (lambda t: setattr(t, "padding_side", "Left"), "padding_side is 'Left'; .*nearest: left"),
    "tensors": (lambda t: t("a", return_tensors="tf"), "return_tensors is 'tf'; known: pt, np"),
    "ragged": (
        lambda t: t(["a b c", "d"], return_tensors="pt"),
        "input_ids have different lengths .* pass padding=True",
    ),
    "new pad token": (
        lambda t: setattr(t, "pad_token", "[PAD]"),
        r"pad_token can't be '\[PAD\]': it is not in the vocabulary; .*add_special_tokens\({'pad_token': '",
    ),
    "number as token": (
        lambda t: setattr(t, "eos_token", 5),
        "a token must be a non-empty string, not int 5",
    ),
    "empty token": (lambda t: t.add_tokens([""]), "a token must be a non-empty string"),
    "unknown id": (lambda t: setattr(t, "eos_token_id", 10**6), "token id 1000000 is not in the vocabulary"),
    "special name": (
        lambda t: t.add_special_tokens({"pad": "x"}),
        "'pad' is no special token; known: bos_token",
    ),
    "extra tokens": (
        lambda t: t.add_special_tokens({"extra_special_tokens": "x"}),
        "must be a list of tokens",
    ),
    "decode None": (lambda t: t.decode(None), "a token id must be an int, not None"),
    "decode text": (lambda t: t.decode("text"), "a token id must be an int, not str 'text'"),
    "decode negative": (
        lambda t: t.decode([5, -100]),
        r"token id -100 is not in the vocabulary of \d+ tokens",
    ),
    "decode large": (
        lambda t: t.batch_decode([[5], [10**12]]),
        "token id 1000000000000 is not in the vocabulary",
    ),
    "decode floats": (lambda t: t.decode(torch.tensor([1.5])), "a token id must be an int, not float 1.5"),
    "tokens": (lambda t: t.convert_tokens_to_ids(None), "tokens must be a string or a list"),
    "numbers as tokens": (lambda t: t.convert_tokens_to_ids([5]), "a token must be a string, not int 5"),
    "pad rows": (lambda t: t.pad([[1, 2]]), "pad takes a dict with 'input_ids'"),
    "pad nothing": (lambda t: t.pad({"ids": [1]}), "pad takes a dict with 'input_ids'"),
    "row without text": (lambda t: BatchEncoding({"input_ids": [1]}).tokens(), "was not made from text"),
    "save into a file": (
        lambda t: t.save_pretrained(__file__),
        "is a file; a tokenizer is saved into a folder",
    ),
}


@pytest.mark.parametrize(("call", "message"), CALLS.values(), ids=CALLS)
def test_calls(call: Callable[[Tokenizer], Any], message: str, tokenizer: Tokenizer) -> None:
    before = tokenizer.special_tokens_map, tokenizer.padding_side, tokenizer("still works").input_ids
    with pytest.raises(TokenizerError, match=message):
        call(tokenizer)
    assert before == (
        tokenizer.special_tokens_map,
        tokenizer.padding_side,
        tokenizer("still works").input_ids,
    )


def test_no_pad_token(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["no_pad"])
    for call in (lambda: tokenizer(["a", "b c"], padding=True), lambda: tokenizer.pad([{"input_ids": [1]}])):
        with pytest.raises(
            TokenizerError, match=r"set one, for example tokenizer\.pad_token = tokenizer\.eos_token"
        ):
            call()
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer(["a", "b c"], padding=True, return_tensors="pt").input_ids.shape[0] == 2


def test_attributes_that_are_none(tokenizer: Tokenizer) -> None:
    with pytest.raises(AttributeError, match="no attribute 'pad_tokens'; nearest: pad_token"):
        tokenizer.pad_tokens  # noqa: B018
    encoding = tokenizer("a")
    with pytest.raises(
        AttributeError, match="no 'input_id'; it holds input_ids, attention_mask; nearest: input_ids"
    ):
        encoding.input_id  # noqa: B018


def test_empty_texts(tokenizer: Tokenizer) -> None:
    assert dict(tokenizer("")) == {"input_ids": [], "attention_mask": []}
    assert dict(tokenizer([])) == {"input_ids": [], "attention_mask": []}
    assert tokenizer("", return_tensors="pt").input_ids.shape == (1, 0)
    assert tokenizer("", return_tensors="pt").input_ids.dtype == torch.int64
    assert tokenizer(["", "a"], padding=True).input_ids[0] == [tokenizer.pad_token_id]
    assert tokenizer.decode([]) == ""
    assert tokenizer.batch_decode([[], [65]]) == ["", tokenizer.decode([65])]
    assert tokenizer.encode("") == []


def test_a_text_too_long_for_the_model_warns(tokenizer: Tokenizer) -> None:
    with pytest.warns(
        UserWarning, match="the text has 100 tokens, but the model takes 64; pass truncation=True"
    ):
        tokenizer("?!" * 50)


def test_encoding_goes_to_a_device(tokenizer: Tokenizer) -> None:
    encoding = tokenizer(["a b", "c"], padding=True, return_tensors="pt")
    assert encoding.to("meta") is encoding
    assert {value.device.type for value in encoding.values()} == {"meta"}
    assert set({**encoding}) == {"input_ids", "attention_mask"}


def test_pickled(tokenizer: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(tokenizer))
    messages = [{"role": "user", "content": "Hi"}]
    assert [dict(again(text)) for text in TEXTS] == [dict(tokenizer(text)) for text in TEXTS]
    assert again.apply_chat_template(messages) == tokenizer.apply_chat_template(messages)
    encoding = tokenizer(TEXTS, padding=True)
    copy = pickle.loads(pickle.dumps(encoding))
    assert (dict(copy), copy.tokens(3)) == (dict(encoding), encoding.tokens(3))


def test_threads_do_not_see_each_others_settings(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["byte_level"])
    options = [
        {},
        {"padding": "max_length", "max_length": 40},
        {"truncation": True, "max_length": 3},
        {"padding": True},
    ]
    expected = [dict(tokenizer(TEXTS[2:5], **one)) for one in options]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(100):
            if dict(tokenizer(TEXTS[2:5], **options[index])) != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(options))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("name", ["../../evil", "a/b", "..", ""])
def test_template_names_stay_in_the_folder(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        folders["byte_level"], chat_template={"default": "a", name: "b"}
    )
    with pytest.raises(TokenizerError, match="can't be saved under the name"):
        tokenizer.save_pretrained(tmp_path / "saved")
    assert list(tmp_path.rglob("*")) == []


def test_saved_without_stale_state(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer(TEXTS, padding="max_length", truncation=True, max_length=5)
    tokenizer.save_pretrained(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    assert (state["truncation"], state["padding"]) == (None, None)
