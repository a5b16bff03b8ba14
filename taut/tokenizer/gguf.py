"""Builds the tokenizer that a GGUF file describes in its metadata (byte-level BPE, SentencePiece BPE)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Punctuation, Split
from tokenizers.pre_tokenizers import Sequence as Steps

from taut.errors import TokenizerError, nearest
from taut.tokenizer.sentencepiece import SPACE, Kind, Piece, Pieces, build_sentencepiece

_SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # the spelling of the format
    "pad_token": "padding_token_id",
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}


def tokenizer_from_gguf(
    path: Path, metadata: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The backend, and the settings of `Tokenizer` that the metadata gives (special tokens, BOS and EOS
    flags, chat template). Raises TokenizerError for what is missing, malformed or not supported."""
    data = _Metadata(path, metadata)
    tokens = data.list("ggml.tokens", str)
    if not tokens:
        raise TokenizerError(f"{path}: tokenizer.ggml.tokens is empty")
    kinds = data.list("ggml.token_type", int, [Kind.NORMAL] * len(tokens))
    if len(kinds) != len(tokens):
        raise TokenizerError(f"{path}: {len(tokens)} tokens but {len(kinds)} in tokenizer.ggml.token_type")
    special = {name: data.token(f"ggml.{key}", tokens) for name, key in _SPECIAL_IDS.items()}
    model = data.get("ggml.model", str)
    if model not in _MODELS:
        raise TokenizerError(
            f"{path}: tokenizer.ggml.model is {model!r}; known: {', '.join(_MODELS)}{nearest(model, _MODELS)}"
        )
    backend, adds_bos = _MODELS[model](data, tokens, kinds)
    templates = {
        key.removeprefix("tokenizer.chat_template."): text
        for key, text in metadata.items()
        if key.startswith("tokenizer.chat_template.") and isinstance(text, str)
    }
    template = data.get("chat_template", str, None)
    return backend, {
        "special_tokens": special,
        "extra_special_tokens": [],
        "chat_template": {"default": template, **templates}
        if template and templates
        else template or templates or None,
        "add_bos_token": data.get("ggml.add_bos_token", bool, adds_bos),
        "add_eos_token": data.get("ggml.add_eos_token", bool, False),
    }


class _Metadata:
    """The keys under `tokenizer.`, checked as they are read."""

    def __init__(self, path: Path, values: Mapping[str, Any]):
        self.path, self._values = path, values

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        value = self._values.get(f"tokenizer.{key}", default)
        if value is ...:
            raise TokenizerError(
                f"{self.path}: the metadata has no tokenizer.{key}; take the tokenizer from the original "
                "repository instead: AutoTokenizer.from_pretrained(...)"
            )
        if value is not default and not isinstance(value, kind):
            raise TokenizerError(
                f"{self.path}: tokenizer.{key} must be {kind.__name__}, not {type(value).__name__}"
            )
        return value

    def list(self, key: str, kind: type, default: Any = ...) -> Any:
        values = self.get(key, list, default)
        if values is not default and not all(isinstance(value, kind) for value in values):
            raise TokenizerError(f"{self.path}: tokenizer.{key} must be a list of {kind.__name__}")
        return values

    def token(self, key: str, tokens: Sequence[str]) -> str | None:
        index = self.get(key, int, None)
        if index is not None and not 0 <= index < len(tokens):
            raise TokenizerError(
                f"{self.path}: tokenizer.{key} is {index}, but there are {len(tokens)} tokens"
            )
        return None if index is None else tokens[index]


# ---- byte-level BPE

_Build = Callable[[], Any]

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN35 = (
    rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    rf"|{_SPACES}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENGLISH}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENGLISH}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)


def _split(*patterns: str) -> _Build:
    """Each pattern splits what the ones before it left; then bytes."""
    return lambda: Steps(
        [
            *(Split(Regex(pattern), "isolated") for pattern in patterns),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@dataclass(frozen=True)
class _Pre:
    """How text is split before merging. `whole_first`: a piece of text that is a token needs no merges."""

    names: tuple[str, ...]
    build: _Build
    whole_first: bool = False
    adds_bos: bool = False  # where the file doesn't say
    nfc: bool = False


# What each value of `tokenizer.ggml.pre` stands for: the pre-tokenizers of the models' own tokenizer.json
# files, under llama.cpp's names.
_PRE = (
    _Pre(
        ("default", "gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "mpt", "olmo", "jais",
         "gigachat", "roberta-bpe", "trillion", "granite-docling", "exaone4", "a.x-4.0", "mellum"),
        lambda: ByteLevel(add_prefix_space=False),
    ),
    _Pre(
        ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"),
        lambda: Steps([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    ),
    _Pre(
        ("command-r",),
        lambda: Steps([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]), nfc=True,
    ),
    _Pre(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
         "jina-v5-nano"),
        _split(_LLAMA3), whole_first=True, adds_bos=True,
    ),
    _Pre(("smaug-bpe", "dbrx", "chatglm-bpe", "glm4"), _split(_LLAMA3)),
    _Pre(("qwen2", "stablelm2", "deepseek-r1-qwen", "kormo", "megrez", "f2llmv2"), _split(_QWEN2), nfc=True),
    _Pre(("qwen35",), _split(_QWEN35), nfc=True),
    _Pre(("tekken",), _split(_TEKKEN), whole_first=True, adds_bos=True),
    _Pre(("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"), _split(_GPT4O)),
    _Pre(
        ("deepseek-coder",),
        _split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[\u0800-\u9FA5\uAC00-\uD7FF]+", r"\p{N}"),
    ),
    _Pre(
        ("deepseek-v3", "hunyuan-dense"),
        _split(r"\p{N}{1,3}", r"[\u4E00-\u9FA5\u3040-\u309F\u30A0-\u30FF]+", _DEEPSEEK3),
    ),
    _Pre(
        ("bloom", "poro-chat", "gpt3-finnish"),
        _split(r" ?[^(\s|[.,!?\u2026\u3002\uFF0C\u3001\u0964\u06D4\u060C])]+"),
    ),
    _Pre(
        ("falcon",),
        lambda: Steps([
            Punctuation("contiguous"), ByteLevel(add_prefix_space=False), Digits(individual_digits=False),
            Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]),
    ),
)  # fmt: skip


def _byte_level(data: _Metadata, tokens: list[str], kinds: list[int]) -> tuple[tokenizers.Tokenizer, bool]:
    name = data.get("ggml.pre", str, "default")
    known = {alias: pre for pre in _PRE for alias in pre.names}
    if name not in known:
        raise TokenizerError(
            f"{data.path}: tokenizer.ggml.pre is {name!r}; known: {', '.join(known)}{nearest(name, known)}. "
            "Take the tokenizer from the original repository instead: AutoTokenizer.from_pretrained(...)"
        )
    pre = known[name]
    vocab: dict[str, int] = {}
    for index, token in enumerate(tokens):
        vocab.setdefault(token, index)
    merges = []
    for line in data.list("ggml.merges", str):
        # The parts hold no space, except in files that write one for a token of spaces; the cut is then the
        # first that gives two tokens.
        cuts = [cut for cut, character in enumerate(line) if character == " " and 0 < cut < len(line) - 1]
        pair = next(
            ((line[:c], line[c + 1 :]) for c in cuts if line[:c] in vocab and line[c + 1 :] in vocab), None
        )
        if pair is None or pair[0] + pair[1] not in vocab:
            raise TokenizerError(
                f"{data.path}: the merge {line!r} in tokenizer.ggml.merges does not join two tokens"
            )
        merges.append(pair)
    backend = tokenizers.Tokenizer(BPE(vocab, merges, ignore_merges=pre.whole_first))
    backend.normalizer = normalizers.NFC() if pre.nfc else None
    backend.pre_tokenizer = pre.build()
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, tokens, kinds)
    return backend, pre.adds_bos


def _add_tokens(backend: tokenizers.Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == Kind.CONTROL)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (Kind.CONTROL, Kind.USER_DEFINED) and token
        ]
    )


# ---- SentencePiece BPE


def _sentencepiece(data: _Metadata, tokens: list[str], kinds: list[int]) -> tuple[tokenizers.Tokenizer, bool]:
    scores = data.list("ggml.scores", float)
    if len(scores) != len(tokens):
        raise TokenizerError(f"{data.path}: {len(tokens)} tokens but {len(scores)} in tokenizer.ggml.scores")
    # Some files write a token of spaces with spaces, which no normalised text contains.
    spelled = [SPACE * len(token) if token and not token.strip(" ") else token for token in tokens]
    model = Pieces(
        pieces=[Piece(*piece) for piece in zip(spelled, scores, kinds, strict=True)],
        unigram=False,
        unk_id=data.get("ggml.unknown_token_id", int, 0),
        add_prefix=data.get("ggml.add_space_prefix", bool, True),
        remove_extra_spaces=data.get("ggml.remove_extra_whitespaces", bool, False),
    )
    return build_sentencepiece(model), True


_MODELS: dict[str, Callable[..., tuple[tokenizers.Tokenizer, bool]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}
