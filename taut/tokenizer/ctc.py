"""Tokenizers of speech models that score characters frame by frame (CTC, Graves et al. 2006)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from taut.errors import TokenizerError
from taut.tokenizer.checks import show, to_python
from taut.tokenizer.save import CONFIG, SPECIAL, write_files
from taut.tokenizer.tokenizer import Tokenizer

VOCABULARY = "vocab.json"
CLASSES = ("Wav2Vec2CTCTokenizer", "Wav2Vec2Tokenizer")
# What the class implies where files say nothing.
SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "word_delimiter_token": "|",
}
SETTINGS = ("replace_word_delimiter_char", "do_lower_case", "target_lang")


class CTCTokenizer(Tokenizer):
    """Characters to ids and frames' best ids back to text: repeats count once, `pad_token` (the blank) not at
    all, `word_delimiter_token` is a space.

    `do_lower_case`: the vocabulary has capitals and texts are in small letters. `vocabularies`: of a model of
    many languages, the vocabulary of each; `target_lang` is the one in use.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        replace_word_delimiter_char: str = " ",
        do_lower_case: bool = False,
        target_lang: str | None = None,
        vocabularies: Mapping[str, Mapping[str, int]] | None = None,
        **settings: Any,
    ):
        super().__init__(backend, **settings)
        # Names of several characters are never taken apart.
        named = [token for token in backend.get_vocab(with_added_tokens=False) if len(token) > 1]
        self.add_tokens([AddedToken(token, lstrip=True, rstrip=True, normalized=False) for token in named])
        self.replace_word_delimiter_char = replace_word_delimiter_char
        self.do_lower_case = bool(do_lower_case)
        self.target_lang, self._vocabularies = target_lang, vocabularies

    def _encode(self, text: Any, text_pair: Any, **options: Any) -> Any:
        if self.do_lower_case:
            names = "|".join(re.escape(token) for token in self.get_added_vocab() if len(token) > 1)
            names = re.compile(f"({names})")
            text, text_pair = _upper(text, names), _upper(text_pair, names)
        return super()._encode(text, text_pair, **options)

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        *,
        group_tokens: bool = True,
        spaces_between_special_tokens: bool = False,
        output_char_offsets: bool = False,
        output_word_offsets: bool = False,
    ) -> Any:
        """The text of each frame's best id (list, array, tensor), or of several rows of them, which give a
        list.

        `group_tokens=False` for ids that are no frames, such as labels. With `output_char_offsets` or
        `output_word_offsets` a dict of `text` and `char_offsets` or `word_offsets`, each a list of `char` or
        `word`, `start_offset` and `end_offset`, in frames. Raises TokenizerError for an id not in the
        vocabulary.
        """
        ids = to_python(token_ids)
        options = {
            "group_tokens": group_tokens,
            "spaces_between_special_tokens": spaces_between_special_tokens,
            "output_char_offsets": output_char_offsets,
            "output_word_offsets": output_word_offsets,
        }
        if isinstance(ids, (list, tuple)) and ids and isinstance(to_python(ids[0]), (list, tuple)):
            return [
                self.decode(row, skip_special_tokens, clean_up_tokenization_spaces, **options) for row in ids
            ]
        tokens = [self._known_id(one)[1] for one in (ids if isinstance(ids, (list, tuple)) else [ids])]
        if skip_special_tokens:
            skipped = {*self.all_special_tokens} - {self.word_delimiter_token}
            tokens = [token for token in tokens if token not in skipped]
        runs = (
            [(token, len([*run])) for token, run in groupby(tokens)]
            if group_tokens
            else [(t, 1) for t in tokens]
        )
        pieces = self._pieces(runs)
        text = (" " if spaces_between_special_tokens else "").join(char for char, _, _ in pieces).strip()
        text = text.lower() if self.do_lower_case else text
        for old, new in self._cleaning(clean_up_tokenization_spaces):
            text = text.replace(old, new)
        if not output_char_offsets and not output_word_offsets:
            return text
        found: dict[str, Any] = {"text": text}
        if output_char_offsets:
            found["char_offsets"] = [_span("char", *piece) for piece in pieces]
        if output_word_offsets:
            found["word_offsets"] = self._words(pieces)
        return found

    def batch_decode(self, sequences: Any, *args: Any, **options: Any) -> Any:
        """The texts of several rows of ids; with offsets, one dict of lists."""
        rows = [self.decode(row, *args, **options) for row in to_python(sequences)]
        if rows and isinstance(rows[0], dict):
            return {key: [row[key] for row in rows] for key in rows[0]}
        return rows

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        return self.decode([self.convert_tokens_to_ids(token) for token in tokens])

    def _pieces(self, runs: Sequence[tuple[str, int]]) -> list[tuple[str, int, int]]:
        """Each character with the frames that it begins and ends at, blanks left out."""
        found, at = [], 0
        for token, count in runs:
            if token != self.pad_token:
                delimits = token == self.word_delimiter_token
                found.append((self.replace_word_delimiter_char if delimits else token, at, at + count))
            at += count
        return found

    def _words(self, pieces: Sequence[tuple[str, int, int]]) -> list[dict[str, Any]]:
        found = []
        for space, run in groupby(pieces, key=lambda piece: piece[0] == self.replace_word_delimiter_char):
            if not space:
                letters = [*run]
                word = "".join(char for char, _, _ in letters)
                found.append(_span("word", word, letters[0][1], letters[-1][2]))
        return found

    def save_pretrained(self, folder: str | Path) -> tuple[str, ...]:
        """Writes `vocab.json`, `tokenizer_config.json` and `special_tokens_map.json`, which transformers and
        Taut load back equal; returns their paths."""
        vocabulary = self._vocabularies or self._backend.get_vocab(with_added_tokens=False)
        config = {
            **self.special_tokens_map,
            **{name: getattr(self, name) for name in SETTINGS},
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "tokenizer_class": CLASSES[0],
        }
        files = {VOCABULARY: vocabulary, CONFIG: config, SPECIAL: self.special_tokens_map}
        texts = {
            name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in files.items()
        }
        return write_files(Path(folder), texts)


def ctc_backend(
    path: Path, vocabulary: Mapping[str, Any], language: str | None, unknown: str, delimiter: str
) -> tokenizers.Tokenizer:
    """A tokenizer of single characters from `vocab.json`'s content. Raises TokenizerError."""
    if vocabulary and all(isinstance(inner, Mapping) for inner in vocabulary.values()):
        if language not in vocabulary:
            raise TokenizerError(
                f"{path}: this model has a vocabulary for each language and target_lang is {language!r}; "
                f"pass target_lang= with one of {', '.join(vocabulary)}"
            )
        vocabulary = vocabulary[language]
    for token, index in vocabulary.items():
        if not isinstance(index, int) or not 0 <= index < 2**31:
            raise TokenizerError(f"{path}: the id of {show(token)} is {index!r}; expected a whole number")
    backend = tokenizers.Tokenizer(models.WordLevel(dict(vocabulary), unk_token=unknown))
    backend.normalizer = normalizers.Replace(" ", delimiter)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return backend


def _upper(text: Any, names: re.Pattern[str]) -> Any:
    """A text, or each of a list, in capitals but for the names of tokens."""
    if isinstance(text, (list, tuple)):
        return type(text)(_upper(one, names) for one in text)
    if not isinstance(text, str):
        return text
    return "".join(part if index % 2 else part.upper() for index, part in enumerate(names.split(text)))


def _span(name: str, value: str, start: int, end: int) -> dict[str, Any]:
    return {name: value, "start_offset": start, "end_offset": end}
