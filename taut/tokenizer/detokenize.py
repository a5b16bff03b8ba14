"""Text out of tokens one at a time: the pieces joined are exactly what decoding all tokens at once gives."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from taut.errors import TokenizerError

if TYPE_CHECKING:
    from taut.tokenizer.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Decodes a growing sequence of token ids.

    `push(id)` returns the text that has become final with this token (often "", as when a character's bytes
    are spread over several tokens), `finish()` what was held back. All pieces joined equal
    `tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)`, whatever the ids. The cost of a push
    does not depend on how many came before it.

    What is held back depends on the tokenizer's decoder: with a byte-level one, the bytes of an unfinished
    character; with byte fallback (`<0xE4>`), a run of byte tokens until it ends, since one invalid byte
    changes the text of the whole run; with an unusual decoder whose text can change later, everything.
    Raises TokenizerError for an id that is not in the vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self.tokenizer = tokenizer
        self._skip = tokenizer._skipped_ids() if skip_special_tokens else frozenset()
        self._text = _reader(tokenizer)
        self._clean = [_Replacer(old, new) for old, new in tokenizer._cleaning()]
        self._finished = False

    def push(self, token_id: int) -> str:
        """The text that is final now that `token_id` follows."""
        if self._finished:
            raise TokenizerError("the detokenizer is finished; make a new one for a new sequence")
        token_id, token = self.tokenizer._known_id(token_id)
        if token_id in self._skip:
            return ""
        return self._cleaned(self._text.push(token_id, token))

    def finish(self) -> str:
        """The rest of the text; no token can follow."""
        if self._finished:
            return ""
        self._finished = True
        text = self._text.finish()
        for replacer in self._clean:
            text = replacer.push(text) + replacer.finish()
        return text

    def _cleaned(self, text: str) -> str:
        for replacer in self._clean:
            if not text:
                break
            text = replacer.push(text)
        return text


class _Reader(Protocol):
    def push(self, token_id: int, token: str) -> str: ...

    def finish(self) -> str: ...


class _Bytes:
    """Byte-level decoders: each token is bytes, and only an unfinished character is held back."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}

    def push(self, token_id: int, token: str) -> str:
        try:
            spelled = bytes([self._byte_of[character] for character in token])
        except KeyError:  # an added token that is not written in the byte alphabet
            spelled = token.encode()
        return self._decoder.decode(spelled)

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Window:
    """Decoders that look at most one token back: the text of a token is what it adds to that of the token
    before it, decoded together."""

    def __init__(self, tokenizer: Tokenizer, hold_bytes: bool):
        self._backend = tokenizer.backend_tokenizer
        self._hold_bytes = hold_bytes
        self._context: list[int] = []  # the last token whose text is out
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, token_id: int, token: str) -> str:
        self._pending.append(token_id)
        if self._hold_bytes and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return ""
        text = self._decode()
        self._context = [token_id]
        self._context_text = self._backend.decode(self._context, skip_special_tokens=False)
        self._pending.clear()
        return text

    def finish(self) -> str:
        return self._decode() if self._pending else ""

    def _decode(self) -> str:
        text = self._backend.decode(self._context + self._pending, skip_special_tokens=False)
        return text[len(self._context_text) :]


class _Whole:
    """Any other decoder: nothing is final before the end."""

    def __init__(self, tokenizer: Tokenizer):
        self._backend = tokenizer.backend_tokenizer
        self._ids: list[int] = []

    def push(self, token_id: int, token: str) -> str:
        self._ids.append(token_id)
        return ""

    def finish(self) -> str:
        return self._backend.decode(self._ids, skip_special_tokens=False)


def _reader(tokenizer: Tokenizer) -> _Reader:
    steps = _steps(tokenizer.backend_tokenizer.decoder)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _Bytes()
    # An empty token is no context: a decoder that strips the start would strip what follows it.
    if tokenizer.backend_tokenizer.token_to_id("") is not None or not _looks_one_back(steps, tokenizer):
        return _Whole(tokenizer)
    return _Window(tokenizer, hold_bytes="ByteFallback" in kinds)


def _steps(decoder: Any) -> list[dict[str, Any]]:
    """The steps of a decoder, those of a sequence in order."""
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return state["decoders"] if state["type"] == "Sequence" else [state]


def _looks_one_back(steps: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> bool:
    """Whether the text of some tokens begins the text of these and more, and what is added depends on one
    token before it. (Byte fallback breaks the first until a run of bytes ends, and is allowed here.)"""
    fused = False
    for step in steps:
        kind = step["type"]
        if kind == "Fuse":
            fused = True
        elif kind == "Replace":
            pattern = step["pattern"].get("String", "")
            if not pattern or (fused and len(pattern) > 1):
                return False
        elif kind == "Strip":
            if fused and (step["stop"] > 0 or step["start"] > 1):
                return False
        elif kind == "ByteFallback":
            if fused:
                return False
        elif kind == "BPEDecoder":
            # The suffix becomes a space unless it ends the text, so it must end a token wherever it stands.
            suffix = step["suffix"]
            if len(steps) > 1 or any(suffix in token[: -len(suffix)] for token in tokenizer.get_vocab()):
                return False
        elif kind in ("Metaspace", "WordPiece"):
            if len(steps) > 1:
                return False
        else:
            return False
    return True


class _Replacer:
    """`str.replace` on a text that comes in pieces."""

    def __init__(self, old: str, new: str):
        self._old, self._new = old, new
        self._held = ""

    def push(self, text: str) -> str:
        *before, last = (self._held + text).split(self._old)
        keep = next(
            (
                size
                for size in range(min(len(self._old) - 1, len(last)), 0, -1)
                if self._old.startswith(last[-size:])
            ),
            0,
        )
        self._held = last[len(last) - keep :]
        return self._new.join([*before, last[: len(last) - keep]])

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


def byte_alphabet() -> str:
    """The character that stands for each byte in a byte-level vocabulary, in the order of the bytes:
    printable Latin-1 for itself, the rest from U+0100 on (Radford et al. 2019, the GPT-2 code)."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    others = iter(range(256))
    return "".join(chr(byte) if byte in printable else chr(256 + next(others)) for byte in range(256))
