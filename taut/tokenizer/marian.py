"""Marian's tokenizer: a SentencePiece model for each side of a translation, one vocabulary for both."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, processors

from taut.errors import TokenizerError
from taut.tokenizer.checks import show
from taut.tokenizer.save import save_tokenizer
from taut.tokenizer.sentencepiece import SPACE, build_sentencepiece, read_sentencepiece
from taut.tokenizer.tokenizer import Tokenizer

SOURCE, TARGET, VOCABULARY = "source.spm", "target.spm", "vocab.json"
SETTINGS = ("source_lang", "target_lang")
# What the class implies where files say nothing.
SPECIAL_TOKENS = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


class MarianTokenizer(Tokenizer):
    """Text is cut into pieces by the SentencePiece model of its side; one vocabulary numbers those of both.

    `text_target` is cut by the target's model. A text may begin with the code of the language to translate
    it to, such as `>>fra<<`; `supported_language_codes` lists those that the vocabulary has. Punctuation is
    taken as it is written: the normalizer of Moses, which transformers applies where `sacremoses` is
    installed, is no part of this.
    """

    _fixed_template = "its texts have an end"

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        folder: Path,
        *,
        source_lang: str | None = None,
        target_lang: str | None = None,
        **settings: Any,
    ):
        self.source_lang, self.target_lang = source_lang, target_lang
        paths = [folder / SOURCE, folder / TARGET]
        self._files = {path.name: path.read_bytes() for path in paths}
        self._cutters = [build_sentencepiece(read_sentencepiece(path)) for path in paths]
        self._cutter = self._cutters[0]
        super().__init__(backend, **settings)

    @property
    def supported_language_codes(self) -> list[str]:
        """The codes that a text may begin with."""
        codes = (token for token in self.get_vocab() if token.startswith(">>") and token.endswith("<<"))
        return sorted(codes, key=self._backend.token_to_id)

    def add_tokens(
        self, tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False
    ) -> int:
        added = super().add_tokens(tokens, special_tokens)
        self._teach()
        return added

    def _register(self, tokens: Any) -> None:
        super()._register(tokens)
        self._teach()

    def _teach(self) -> None:
        """Text is cut around the tokens that are never split, each part as a text of its own."""
        tokens = [
            AddedToken(token.content, normalized=False, special=token.special, **_flags(token))
            for _, token in sorted(self.added_tokens_decoder.items())
        ]
        with self._lock:
            for cutter in self._cutters:
                cutter.add_tokens(tokens)

    @contextmanager
    def _target_mode(self) -> Iterator[None]:
        with self._lock:  # which model cuts is a setting, and other threads cut too
            self._cutter = self._cutters[1]
            try:
                yield
            finally:
                self._cutter = self._cutters[0]

    def _encode(self, text: Any, text_pair: Any, **options: Any) -> Any:
        if options["return_offsets_mapping"]:
            raise TokenizerError(
                "return_offsets_mapping: Marian's tokenizer doesn't know where its tokens stand"
            )
        return super()._encode(text, text_pair, **options)

    def _prepare(self, inputs: list[Any], words: bool, split_special_tokens: bool) -> tuple[list[Any], bool]:
        def pieces(text: Any) -> list[str]:
            return [piece for one in (text if words else [text]) for piece in self._cut(one)]

        def is_pair(row: Any) -> bool:
            return isinstance(row, tuple) and not (words and all(isinstance(word, str) for word in row))

        self._cutter.encode_special_tokens = split_special_tokens
        return [tuple(map(pieces, row)) if is_pair(row) else pieces(row) for row in inputs], True

    def _cut(self, text: str) -> list[str]:
        code = []
        if text.startswith(">>") and (end := text.find("<<")) != -1:
            code, text = [text[: end + 2]], text[end + 2 :]
        return code + self._cutter.encode(text, add_special_tokens=False).tokens

    def save_pretrained(self, folder: str | Path) -> tuple[str, ...]:
        """Writes `source.spm`, `target.spm`, `vocab.json`, `tokenizer_config.json` and
        `special_tokens_map.json`, which transformers and Taut load back equal; returns their paths."""
        vocabulary = self._backend.get_vocab(with_added_tokens=False)
        ordered = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
        files = {**self._files, VOCABULARY: json.dumps(ordered, indent=2, ensure_ascii=False) + "\n"}
        return save_tokenizer(self, Path(folder), files)

    def _saved_settings(self) -> dict[str, Any]:
        added = {
            str(index): {
                "content": token.content,
                "normalized": token.normalized,
                "special": token.special,
                **_flags(token),
            }
            for index, token in sorted(self.added_tokens_decoder.items())
        }
        return {
            "tokenizer_class": "MarianTokenizer",
            "added_tokens_decoder": added,
            **{name: getattr(self, name) for name in SETTINGS},
        }


def _flags(token: AddedToken) -> dict[str, bool]:
    return {flag: getattr(token, flag) for flag in ("single_word", "lstrip", "rstrip")}


def marian_backend(
    path: Path, vocabulary: Mapping[str, Any], special_tokens: Mapping[str, str | AddedToken | None]
) -> tokenizers.Tokenizer:
    """Numbers pieces, ends a text, and makes text of pieces. Raises TokenizerError."""
    for token, index in vocabulary.items():
        if not isinstance(index, int) or not 0 <= index < 2**31:
            raise TokenizerError(f"{path}: the id of {show(token)} is {index!r}; expected a whole number")
    for name in ("unk_token", "eos_token"):
        if str(special_tokens.get(name)) not in vocabulary:
            raise TokenizerError(f"{path}: it lacks the {name} {show(special_tokens.get(name))}")
    unknown, end = str(special_tokens["unk_token"]), str(special_tokens["eos_token"])
    backend = tokenizers.Tokenizer(models.WordLevel(dict(vocabulary), unk_token=unknown))
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A $B {end}", special_tokens=[(end, vocabulary[end])]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend
