"""Pieces of incrementally decoded text joined are the full decode, for any ids of any tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taut.errors import TokenizerError
from taut.tokenizer import AutoTokenizer, IncrementalDetokenizer, Tokenizer

from .conftest import KINDS, TEXTS

ALL = [*KINDS, "minilm", "smollm"]
STREAMED = [kind for kind in ALL if kind != "ctc"]  # the one whose text is not final before its end


@cache
def load(path: Path) -> Tokenizer:
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture
def tokenizer_of(folder_of: Callable[[str], Path], smollm: Path) -> Callable[[str], Tokenizer]:
    return lambda kind: load(smollm if kind == "smollm" else folder_of(kind))


def pieces(tokenizer: Tokenizer, ids: list[int], skip: bool) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    out = [detokenizer.push(one) for one in ids]
    return [*out, detokenizer.finish()]


@cache
def byte_ids(tokenizer: Tokenizer) -> list[int]:
    """Tokens that spell parts of characters, where the tokenizer has any."""
    vocab = tokenizer.get_vocab()
    found = [vocab[name] for byte in range(256) if (name := f"<0x{byte:02X}>") in vocab]
    return found or [index for token, index in vocab.items() if len(token) <= 2]


@pytest.mark.parametrize("kind", ALL)
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_joined_pieces_equal_decode(
    kind: str, data: st.DataObject, tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    tokenizer = tokenizer_of(kind)
    ids = st.lists(
        st.one_of(st.integers(0, len(tokenizer) - 1), st.sampled_from(byte_ids(tokenizer)),
                  st.sampled_from(tokenizer.all_special_ids)),
        max_size=30,
    )  # fmt: skip
    texts = st.one_of(st.text(max_size=30), st.sampled_from(TEXTS), st.text("😀é世 '.ns\ufffd", max_size=12))
    row = data.draw(st.one_of(ids, texts.map(lambda text: tokenizer.encode(text))))
    skip = data.draw(st.booleans())
    assert "".join(pieces(tokenizer, row, skip)) == tokenizer.decode(row, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", STREAMED)
def test_text_comes_as_it_becomes_final(kind: str, tokenizer_of: Callable[[str], Tokenizer]) -> None:
    tokenizer = tokenizer_of(kind)
    row = tokenizer.encode(
        "the quick brown fox jumps over the lazy dog and looks back", add_special_tokens=False
    )
    out = pieces(tokenizer, row, True)
    assert sum(map(bool, out)) > len(row) // 2
    assert len(out[-1]) <= 4


@pytest.mark.parametrize("kind", ["byte_level", "llama", "smollm"])
def test_a_character_is_held_back_until_whole(kind: str, tokenizer_of: Callable[[str], Tokenizer]) -> None:
    tokenizer = tokenizer_of(kind)
    out = pieces(tokenizer, tokenizer.encode("a 🤷 世 ሴ b", add_special_tokens=False), True)
    assert "".join(out) == "a 🤷 世 ሴ b"
    assert not any("\ufffd" in piece for piece in out)


@pytest.mark.parametrize("kind", STREAMED)
def test_the_cost_of_a_push_does_not_grow(
    kind: str, tokenizer_of: Callable[[str], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of(kind)
    row = tokenizer.encode("a 世 b", add_special_tokens=False) * 400 + byte_ids(tokenizer) * 5
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    decoded = 0

    class Counting:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            nonlocal decoded
            decoded += len(ids)
            return tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    if hasattr(detokenizer._text, "_backend"):
        monkeypatch.setattr(detokenizer._text, "_backend", Counting())
    text = "".join(map(detokenizer.push, row)) + detokenizer.finish()
    assert text == tokenizer.decode(row)
    assert decoded <= 4 * len(row)


@pytest.mark.parametrize("bad", [None, "a", -1, 10**9, 2**70, 1.5, True, [1]])
def test_ids_that_are_none(bad: object, tokenizer_of: Callable[[str], Tokenizer]) -> None:
    tokenizer = tokenizer_of("byte_level")
    for use in (IncrementalDetokenizer(tokenizer).push, tokenizer.decode, tokenizer.convert_ids_to_tokens):
        if isinstance(bad, list) and use != IncrementalDetokenizer.push:
            continue
        with pytest.raises(
            TokenizerError, match=r"token id must be an int|is not in the vocabulary of \d+ tokens"
        ):
            use(bad)
    with pytest.raises(TokenizerError, match="token id"):
        tokenizer.decode([3, bad])


def test_nothing_follows_the_end(tokenizer_of: Callable[[str], Tokenizer]) -> None:
    detokenizer = IncrementalDetokenizer(tokenizer_of("byte_level"))
    detokenizer.push(5)
    detokenizer.finish()
    assert detokenizer.finish() == ""
    with pytest.raises(TokenizerError, match="make a new one"):
        detokenizer.push(5)
