"""Reads SentencePiece `.model` files and builds the same tokenizer on the `tokenizers` library.

The file is a protobuf message (google/sentencepiece, src/sentencepiece_model.proto); the few fields needed
are read from its wire format, without the protobuf or sentencepiece packages. GGUF files hold the same
pieces.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE, Unigram
from tokenizers.pre_tokenizers import Split

from taut.errors import TokenizerError

SPACE = "▁"  # what a space becomes, U+2581
_NEVER = -1e4  # a score that no way through a text with real pieces can have


class Kind(IntEnum):
    """What a piece is for; GGUF numbers its token types the same."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    text: str
    score: float = 0.0
    kind: int = Kind.NORMAL


@dataclass(frozen=True)
class Pieces:
    """A SentencePiece model: its vocabulary in the order of the ids, and how text is normalised before it."""

    pieces: Sequence[Piece]
    unigram: bool
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    add_prefix: bool = True  # a space before the text
    remove_extra_spaces: bool = False  # at both ends, and all but one of a run
    charsmap: bytes = field(default=b"", repr=False)

    def text(self, index: int) -> str | None:
        """The piece with this id; None where the model has none (-1)."""
        return self.pieces[index].text if 0 <= index < len(self.pieces) else None


def read_sentencepiece(path: Path) -> Pieces:
    """The model in a `.model` file. Raises TokenizerError when it is corrupt, or neither unigram nor BPE."""
    try:
        message = _Message(path.read_bytes())
        pieces = [_piece(_Message(data)) for data in message.all(1)]
        if not pieces:
            raise ValueError("it has no pieces")
        trainer, normalizer = _Message(message.bytes(2)), _Message(message.bytes(3))
        model_type, suffix = trainer.int(3, 1), trainer.int(24, 0)
        pieces_read = Pieces(
            pieces=pieces,
            unigram=model_type == 1,
            unk_id=trainer.int(40, 0),
            bos_id=trainer.int(41, 1),
            eos_id=trainer.int(42, 2),
            pad_id=trainer.int(43, -1),
            add_prefix=bool(normalizer.int(3, 1)),
            remove_extra_spaces=bool(normalizer.int(4, 1)),
            charsmap=normalizer.bytes(2),
        )
    except (ValueError, IndexError, struct.error) as error:
        raise TokenizerError(
            f"{path}: not a SentencePiece model, or a damaged one ({error}); download it again, "
            "or use a repository with a tokenizer.json"
        ) from error
    if model_type not in (1, 2):
        kind = {3: "word", 4: "char"}.get(model_type, model_type)
        raise TokenizerError(f"{path}: the SentencePiece model type is {kind}; supported: unigram, bpe")
    if suffix:
        raise TokenizerError(
            f"{path}: the SentencePiece model puts spaces after words (treat_whitespace_as_suffix), "
            "which is not supported; use a repository with a tokenizer.json"
        )
    return pieces_read


def build_sentencepiece(model: Pieces) -> Tokenizer:
    """The tokenizer of `model`. As with the tokenizer.json files of Llama 2 and Mistral, the text after a
    special token gets the space before it too."""
    byte_fallback = any(piece.kind == Kind.BYTE for piece in model.pieces)
    unk = model.text(model.unk_id)
    if model.unigram:
        # Only normal pieces may be found in text; the others keep their ids.
        vocab = [(p.text, p.score if p.kind == Kind.NORMAL else _NEVER) for p in model.pieces]
        backend = Tokenizer(
            Unigram(vocab, unk_id=model.unk_id if unk is not None else None, byte_fallback=byte_fallback)
        )
    else:
        ids: dict[str, int] = {}
        for index, piece in enumerate(model.pieces):
            ids.setdefault(piece.text, index)
        backend = Tokenizer(
            BPE(ids, _merges(model.pieces), unk_token=unk, fuse_unk=True, byte_fallback=byte_fallback)
        )
    if model.unigram and byte_fallback:  # "<0x41>" written in a text is not the byte
        backend.pre_tokenizer = Split(Regex("<(?=0x[0-9A-F]{2}>)"), "isolated")
    backend.normalizer = _normalizer(model)
    backend.decoder = _decoder(model, byte_fallback)
    backend.add_tokens(
        [
            AddedToken(piece.text, normalized=False, special=piece.kind == Kind.CONTROL)
            for piece in model.pieces
            if piece.kind == Kind.CONTROL or (piece.kind == Kind.USER_DEFINED and not _is_spaces(piece.text))
        ]
    )
    return backend


def _is_spaces(text: str) -> bool:
    """Runs of spaces are found by merging, as the text they stand in has its spaces replaced."""
    return set(text) == {SPACE}


def _merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """The pairs to merge, best first. SentencePiece merges the pair whose result has the best score, so each
    split of a piece into two is a merge with the rank of the piece."""
    scores: dict[str, float] = {}
    for piece in pieces:
        if piece.kind == Kind.NORMAL or (piece.kind == Kind.USER_DEFINED and _is_spaces(piece.text)):
            scores.setdefault(piece.text, piece.score)
    ranked = sorted(scores, key=lambda text: -scores[text])  # stable: among equals the lower id first
    return [
        (text[:cut], text[cut:])
        for text in ranked
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]


def _normalizer(model: Pieces) -> Any:
    steps: list[Any] = []
    if model.charsmap:
        try:
            steps.append(normalizers.Precompiled(model.charsmap))
        except Exception as error:  # the Rust library raises plain exceptions
            raise TokenizerError(
                f"the character map of the SentencePiece model is corrupt: {error}"
            ) from error
    if model.remove_extra_spaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _decoder(model: Pieces, byte_fallback: bool) -> Any:
    steps: list[Any] = [decoders.Replace(SPACE, " ")]
    if byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if model.add_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _piece(message: _Message) -> Piece:
    return Piece(message.bytes(1).decode(), message.float(2, 0.0), message.int(3, Kind.NORMAL))


class _Message:
    """The fields of one protobuf message (protobuf.dev/programming-guides/encoding). Raises ValueError."""

    def __init__(self, data: bytes):
        self._fields: dict[int, list[Any]] = {}
        for number, value in _fields(data):
            self._fields.setdefault(number, []).append(value)

    def all(self, number: int) -> list[bytes]:
        values = self._fields.get(number, [])
        if not all(isinstance(value, bytes) for value in values):
            raise ValueError(f"field {number} is not a message or string")
        return values

    def bytes(self, number: int) -> bytes:
        return (self.all(number) or [b""])[-1]

    def int(self, number: int, default: int) -> int:
        value = self._fields.get(number, [default])[-1]
        if isinstance(value, bytes):
            raise ValueError(f"field {number} is not a number")
        return value - 2**64 if value >= 2**63 else value  # a negative int32 is written as 64 bits

    def float(self, number: int, default: float) -> float:
        value = self._fields.get(number)
        return default if value is None else struct.unpack("<f", struct.pack("<I", value[-1]))[0]


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Each field of a message as (number, value): an int for varints and fixed-size fields, else bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise ValueError(f"no field number at byte {at}")
        if wire == 0:
            value, at = _varint(data, at)
        elif wire in (1, 2, 5):
            size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            if size > len(data) - at:
                raise ValueError(f"a field of {size} bytes at byte {at} of {len(data)}")
            raw = data[at : at + size]
            value, at = (raw if wire == 2 else int.from_bytes(raw, "little")), at + size
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at `at` and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number without end at byte {at}")
