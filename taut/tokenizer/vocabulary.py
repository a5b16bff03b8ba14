"""The vocabulary side of a tokenizer: special tokens, ids and tokens, what encoding adds around a text."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, processors

from taut.errors import TokenizerError, nearest
from taut.tokenizer.checks import check_token, show, to_python

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _special(name: str) -> property:
    return property(lambda self: self._get_special(name), lambda self, token: self._set_special(name, token))


def _special_id(name: str) -> property:
    return property(
        lambda self: self._get_special_id(name), lambda self, index: self._set_special_id(name, index)
    )


class Vocabulary:
    """Tokens, their ids, and which of them are special, over a `tokenizers.Tokenizer`.

    `bos_token`, `eos_token`, `unk_token`, `sep_token`, `pad_token`, `cls_token`, `mask_token` and each one's
    `..._id` are None where there is none, and can be set to a token of the vocabulary.
    """

    bos_token, bos_token_id = _special("bos_token"), _special_id("bos_token")
    eos_token, eos_token_id = _special("eos_token"), _special_id("eos_token")
    unk_token, unk_token_id = _special("unk_token"), _special_id("unk_token")
    sep_token, sep_token_id = _special("sep_token"), _special_id("sep_token")
    pad_token, pad_token_id = _special("pad_token"), _special_id("pad_token")
    cls_token, cls_token_id = _special("cls_token"), _special_id("cls_token")
    mask_token, mask_token_id = _special("mask_token"), _special_id("mask_token")
    # Why encoding always adds the same tokens, where it does.
    _fixed_template: str | None = None

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str | AddedToken | None],
        extra_special_tokens: Sequence[str | AddedToken],
        add_bos_token: bool | None,
        add_eos_token: bool | None,
    ):
        self._backend = backend
        self._lock = threading.RLock()  # the backend has settings, and threads share it
        named = {name: token for name, token in special_tokens.items() if token is not None}
        self._special: dict[str, str] = {name: str(token) for name, token in named.items()}
        self._extra: list[str] = [str(token) for token in extra_special_tokens]
        self._register([*named.values(), *extra_special_tokens])
        ids = backend.encode("").ids  # nothing but what the template of the file adds
        self._add_bos = ids[:1] == [self.bos_token_id] if add_bos_token is None else bool(add_bos_token)
        self._add_eos = ids[-1:] == [self.eos_token_id] if add_eos_token is None else bool(add_eos_token)
        unset = backend.post_processor is None and self._fixed_template is None
        if add_bos_token is not None or add_eos_token is not None or unset:
            self._update_post_processor()

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named special tokens that are set, those that every tokenizer can have first."""
        names = [name for name in SPECIAL_TOKENS if name in self._special]
        return {name: self._special[name] for name in dict.fromkeys([*names, *self._special])}

    @property
    def extra_special_tokens(self) -> list[str]:
        """Special tokens without a name of their own."""
        return list(self._extra)

    additional_special_tokens = extra_special_tokens

    @property
    def all_special_tokens(self) -> list[str]:
        """Named and extra special tokens, each once."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self._extra]))

    @property
    def all_special_ids(self) -> list[int]:
        return [self._backend.token_to_id(token) for token in self.all_special_tokens]

    def add_special_tokens(self, tokens: Mapping[str, Any], replace_extra_special_tokens: bool = True) -> int:
        """Sets named special tokens (`{"pad_token": "[PAD]"}`) or the list under "extra_special_tokens",
        adding to the vocabulary what it lacks. Returns how many were added: the model's embedding has to
        grow by that."""
        size = len(self)
        for name, token in tokens.items():
            if name in ("extra_special_tokens", "additional_special_tokens"):
                if not isinstance(token, (list, tuple)):
                    raise TokenizerError(f"{name} must be a list of tokens, not {token!r}")
                self._register(token)
                kept = [] if replace_extra_special_tokens else self._extra
                self._extra = list(dict.fromkeys([*kept, *map(str, token)]))
            elif name in SPECIAL_TOKENS or name in self._special:
                self._register([token])
                self._special[name] = str(token)
            else:
                known = (*SPECIAL_TOKENS, "extra_special_tokens")
                raise TokenizerError(
                    f"{name!r} is no special token; known: {', '.join(known)}{nearest(name, known)}"
                )
        return len(self) - size

    def add_tokens(
        self, tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False
    ) -> int:
        """Adds tokens that are never split; returns how many were new."""
        tokens = [tokens] if isinstance(tokens, (str, AddedToken)) else list(tokens)
        for token in tokens:
            check_token(token)
        with self._lock:
            add = self._backend.add_special_tokens if special_tokens else self._backend.add_tokens
            return add(tokens)

    def _register(self, tokens: Iterable[str | AddedToken]) -> None:
        """Makes `tokens` special in the backend; those it does not have get the next ids."""
        have = {token.content for token in self._backend.get_added_tokens_decoder().values() if token.special}
        missing = []
        for token in tokens:
            check_token(token)
            if str(token) not in have:
                have.add(str(token))
                missing.append(
                    AddedToken(token, special=True, normalized=False) if isinstance(token, str) else token
                )
        if missing:
            with self._lock:
                self._backend.add_special_tokens(missing)

    def _get_special(self, name: str) -> str | None:
        return self._special.get(name)

    def _set_special(self, name: str, token: str | AddedToken | None) -> None:
        if token is None:
            self._special.pop(name, None)
            return
        check_token(token)
        if self._backend.token_to_id(str(token)) is None:
            raise TokenizerError(
                f"{name} can't be {str(token)!r}: it is not in the vocabulary; choose a token that is, such "
                f"as tokenizer.eos_token, or add it: "
                f"tokenizer.add_special_tokens({{{name!r}: {str(token)!r}}})"
            )
        self._register([token])
        self._special[name] = str(token)

    def _get_special_id(self, name: str) -> int | None:
        token = self._special.get(name)
        return None if token is None else self._backend.token_to_id(token)

    def _set_special_id(self, name: str, token_id: int | None) -> None:
        self._set_special(name, None if token_id is None else self._known_id(token_id)[1])

    def __getattr__(self, name: str) -> Any:
        # Special tokens that only some models name, such as `image_token` and `image_token_id`.
        special = self.__dict__.get("_special", {})
        if name in special:
            return special[name]
        if name.removesuffix("_id") in special:
            return self._get_special_id(name.removesuffix("_id"))
        raise AttributeError(f"a tokenizer has no attribute {name!r}{nearest(name, dir(type(self)))}")

    @property
    def pad_token_type_id(self) -> int:
        return 0

    @property
    def add_bos_token(self) -> bool:
        return self._add_bos

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        self._add_bos = bool(value)
        self._update_post_processor()

    @property
    def add_eos_token(self) -> bool:
        return self._add_eos

    @add_eos_token.setter
    def add_eos_token(self, value: bool) -> None:
        self._add_eos = bool(value)
        self._update_post_processor()

    def _update_post_processor(self) -> None:
        if self._fixed_template is not None:
            raise TokenizerError(
                f"add_bos_token and add_eos_token are no settings of this tokenizer: {self._fixed_template}; "
                "pass add_special_tokens=False to leave out what encoding adds"
            )
        bos = self._special.get("bos_token") if self._add_bos else None
        eos = self._special.get("eos_token") if self._add_eos else None
        self._add_bos, self._add_eos = bos is not None, eos is not None

        def part(sequence: str, kind: int) -> list[str]:
            tokens = [bos, sequence, eos]
            return [f"{token}:{kind}" for token in tokens if token is not None]

        known = [(token, self._backend.token_to_id(token)) for token in (bos, eos) if token is not None]
        with self._lock:
            self._backend.post_processor = processors.TemplateProcessing(
                single=part("$A", 0), pair=part("$A", 0) + part("$B", 1), special_tokens=known
            )

    @property
    def backend_tokenizer(self) -> tokenizers.Tokenizer:
        return self._backend

    @property
    def vocab_size(self) -> int:
        """Tokens of the model's own vocabulary, without added ones."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        """Tokens in all, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        return True

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id."""
        return self._backend.get_vocab(with_added_tokens=True)

    @property
    def vocab(self) -> dict[str, int]:
        return self.get_vocab()

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        return self._backend.get_added_tokens_decoder()

    def get_added_vocab(self) -> dict[str, int]:
        """The added tokens with their ids, in the order of the ids."""
        return {token.content: index for index, token in sorted(self.added_tokens_decoder.items())}

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many special tokens encoding adds to a text (or a pair of texts)."""
        return self._backend.num_special_tokens_to_add(pair)

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> int | list[int | None] | None:
        """The ids of tokens; one that is not in the vocabulary has the id of the unknown token, or None."""
        if isinstance(tokens, str):
            index = self._backend.token_to_id(tokens)
            return self._get_special_id("unk_token") if index is None else index
        if tokens is None or not isinstance(tokens, Iterable):
            raise TokenizerError(f"tokens must be a string or a list of strings, not {show(tokens)}")
        tokens = list(tokens)
        for token in tokens:
            if not isinstance(token, str):
                raise TokenizerError(f"a token must be a string, not {show(token)}")
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> str | list[str]:
        """The tokens of an id or of a list of ids; raises TokenizerError for an id not in the vocabulary."""
        ids = to_python(ids)
        if not isinstance(ids, (list, tuple)):
            return self._known_id(ids)[1]
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        known = [self._known_id(one) for one in ids]
        return [token for index, token in known if index not in skipped]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        decoder = self._backend.decoder
        return " ".join(tokens) if decoder is None else decoder.decode(list(tokens))

    def _known_id(self, token_id: Any) -> tuple[int, str]:
        """An id and its token; raises TokenizerError if there is none."""
        if isinstance(token_id, bool) or not hasattr(token_id, "__index__"):
            raise TokenizerError(f"a token id must be an int, not {show(token_id)}")
        index = int(token_id)
        token = self._backend.id_to_token(index) if 0 <= index < 2**32 else None
        if token is None:
            raise TokenizerError(
                f"token id {index} is not in the vocabulary of {len(self)} tokens; "
                "do the tokenizer and the model belong together?"
            )
        return index, token

    def _skipped_ids(self) -> frozenset[int]:
        """The ids that `skip_special_tokens` leaves out of decoded text."""
        return frozenset(index for index, token in self.added_tokens_decoder.items() if token.special)
