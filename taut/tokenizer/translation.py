"""Tokenizers of translation models that write the language of a text beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from taut.errors import TokenizerError, nearest
from taut.tokenizer.layouts import MBART, MBART50
from taut.tokenizer.tokenizer import Tokenizer

# The languages of each class, the one that is meant where nothing says which, and where a text has its code.
_LANGUAGES = {"MBart50Tokenizer": (MBART50, "before"), "MBartTokenizer": (MBART, "after")}
_DEFAULT = "en_XX"
CLASSES = tuple(_LANGUAGES)


class TranslationTokenizer(Tokenizer):
    """A tokenizer whose texts carry the code of their language: mBART's behind the end of text, mBART-50's
    before the text.

    `src_lang` is the language of texts, `tgt_lang` that of `text_target` (None: the same); both can be set.
    `lang_code_to_id[code]` is what `generate` takes as `forced_bos_token_id`.
    """

    _fixed_template = "its texts have an end and the code of their language"

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        tokenizer_class: str,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        extra_special_tokens: Sequence[str | AddedToken] = (),
        **settings: Any,
    ):
        self._class = tokenizer_class
        self._languages, self._place = _LANGUAGES[tokenizer_class]
        self._src_lang: str | None = None
        languages = [code for code in self._languages if backend.token_to_id(code) is not None]
        extra = list({str(token): token for token in [*languages, *extra_special_tokens]}.values())
        super().__init__(backend, extra_special_tokens=extra, **settings)
        self.src_lang = _DEFAULT if src_lang is None else src_lang
        self.tgt_lang = tgt_lang

    @property
    def src_lang(self) -> str:
        return self._src_lang

    @src_lang.setter
    def src_lang(self, code: str) -> None:
        self._src_lang = self._known_language("src_lang", code)
        self._write_language(code)

    @property
    def tgt_lang(self) -> str | None:
        return self._tgt_lang

    @tgt_lang.setter
    def tgt_lang(self, code: str | None) -> None:
        self._tgt_lang = None if code is None else self._known_language("tgt_lang", code)

    @property
    def lang_code_to_id(self) -> dict[str, int]:
        """The token of each language."""
        ids = {code: self._backend.token_to_id(code) for code in self._languages}
        return {code: index for code, index in ids.items() if index is not None}

    @contextmanager
    def reading(self, code: str) -> Iterator[None]:
        """While it is open, texts are in another language than `src_lang`."""
        with self._lock:  # the template is a setting of the backend, and other threads use it too
            self._write_language(self._known_language("src_lang", code))
            try:
                yield
            finally:
                self._write_language(self.src_lang)

    @contextmanager
    def _target_mode(self) -> Iterator[None]:
        with self.reading(self.tgt_lang or self.src_lang):
            yield

    def _known_language(self, name: str, code: str) -> str:
        """A language of the family, or one that was added as a special token."""
        known = self.extra_special_tokens
        if code not in known:
            raise TokenizerError(f"{name} is {code!r}; known: {', '.join(known)}{nearest(str(code), known)}")
        return code

    def _write_language(self, code: str) -> None:
        eos = self.eos_token
        around = (code, "$A", eos) if self._place == "before" else ("$A", eos, code)
        at = around.index("$A") + 1
        known = [(token, self._backend.token_to_id(token)) for token in (code, eos)]
        with self._lock:
            self._backend.post_processor = processors.TemplateProcessing(
                single=list(around), pair=[*around[:at], "$B", *around[at:]], special_tokens=known
            )

    def _saved_settings(self) -> dict[str, Any]:
        return {"tokenizer_class": self._class, "src_lang": self.src_lang, "tgt_lang": self.tgt_lang}
