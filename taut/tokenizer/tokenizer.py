"""The tokenizer: text to ids and back in the shape of transformers' fast tokenizers, on the `tokenizers` library."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, processors
from torch import Tensor

from taut.errors import TokenizerError, nearest
from taut.tokenizer.chat import choose_template, render_chat, split_batch
from taut.tokenizer.encoding import BatchEncoding
from taut.tokenizer.save import save_tokenizer
from taut.tokenizer.template import compile_template

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
NO_LIMIT = int(1e30)  # `model_max_length` when no file gives one
SIDES = ("left", "right")
_PADDING = ("longest", "max_length", "do_not_pad")
_TRUNCATION = ("longest_first", "only_first", "only_second", "do_not_truncate")

# What `clean_up_tokenization_spaces` replaces, in order.
_CLEANING = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
    (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


def _special(name: str) -> property:
    return property(lambda self: self._get_special(name), lambda self, token: self._set_special(name, token))


def _special_id(name: str) -> property:
    return property(
        lambda self: self._get_special_id(name), lambda self, index: self._set_special_id(name, index)
    )


class Tokenizer:
    """Text to token ids and back. Made by `AutoTokenizer.from_pretrained`.

    | attribute | meaning |
    |---|---|
    | `bos_token`, `eos_token`, `pad_token`, `unk_token`, ... and `..._id` | special tokens, None where there is none; both can be set |
    | `padding_side`, `truncation_side` | "left" or "right" |
    | `model_max_length` | tokens that the model takes; 1e30 where the files don't say |
    | `model_input_names` | the keys a call returns by default |
    | `chat_template` | a Jinja template, or a dict of named ones |
    | `add_bos_token`, `add_eos_token` | whether encoding adds them; setting one replaces the special-token template of the file |
    | `backend_tokenizer` | the `tokenizers.Tokenizer` that does the work |

    It can be used from several threads at once, and pickled.
    """

    is_fast = True

    bos_token, bos_token_id = _special("bos_token"), _special_id("bos_token")
    eos_token, eos_token_id = _special("eos_token"), _special_id("eos_token")
    unk_token, unk_token_id = _special("unk_token"), _special_id("unk_token")
    sep_token, sep_token_id = _special("sep_token"), _special_id("sep_token")
    pad_token, pad_token_id = _special("pad_token"), _special_id("pad_token")
    cls_token, cls_token_id = _special("cls_token"), _special_id("cls_token")
    mask_token, mask_token_id = _special("mask_token"), _special_id("mask_token")

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str | AddedToken | None] | None = None,
        extra_special_tokens: Sequence[str | AddedToken] = (),
        name_or_path: str = "",
        chat_template: str | Mapping[str, str] | None = None,
        padding_side: str = "right",
        truncation_side: str = "right",
        model_max_length: int | None = None,
        model_input_names: Sequence[str] = ("input_ids", "attention_mask"),
        clean_up_tokenization_spaces: bool = False,
        split_special_tokens: bool = False,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
    ):
        self._backend = backend
        self._lock = threading.RLock()
        self._templates: dict[str, CodeType] = {}
        self._special: dict[str, str] = {}
        self._extra: list[str] = [str(token) for token in extra_special_tokens]
        backend.no_padding()
        backend.no_truncation()
        named = {name: token for name, token in (special_tokens or {}).items() if token is not None}
        self._register([*named.values(), *extra_special_tokens])
        self._special.update({name: str(token) for name, token in named.items()})
        self.name_or_path = name_or_path
        self.chat_template = dict(chat_template) if isinstance(chat_template, Mapping) else chat_template
        self.padding_side = padding_side
        self.truncation_side = truncation_side
        self.model_max_length = NO_LIMIT if model_max_length is None else int(model_max_length)
        self.model_input_names = list(model_input_names)
        self.clean_up_tokenization_spaces = bool(clean_up_tokenization_spaces)
        self.split_special_tokens = bool(split_special_tokens)
        ids = backend.encode("").ids  # nothing but what the template of the file adds
        self._add_bos = ids[:1] == [self.bos_token_id] if add_bos_token is None else bool(add_bos_token)
        self._add_eos = ids[-1:] == [self.eos_token_id] if add_eos_token is None else bool(add_eos_token)
        if add_bos_token is not None or add_eos_token is not None or backend.post_processor is None:
            self._update_post_processor()

    # The lock and the compiled templates stay behind when a tokenizer goes to another process.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_templates": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return (
            f"Tokenizer({self.name_or_path!r}, {type(self._backend.model).__name__}, {len(self)} tokens, "
            f"padding_side={self.padding_side!r}, special_tokens={self.special_tokens_map})"
        )

    # ---- special tokens

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The named special tokens that are set."""
        return dict(self._special)

    @property
    def extra_special_tokens(self) -> list[str]:
        """Special tokens without a name of their own."""
        return list(self._extra)

    additional_special_tokens = extra_special_tokens

    @property
    def all_special_tokens(self) -> list[str]:
        """Named and extra special tokens, each once."""
        return list(dict.fromkeys([*self._special.values(), *self._extra]))

    @property
    def all_special_ids(self) -> list[int]:
        return [self._backend.token_to_id(token) for token in self.all_special_tokens]

    def add_special_tokens(self, tokens: Mapping[str, Any], replace_extra_special_tokens: bool = True) -> int:
        """Sets named special tokens (`{"pad_token": "[PAD]"}`) or the list under "extra_special_tokens", adding
        to the vocabulary what it lacks. Returns how many were added: the model's embedding has to grow by that."""
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
            _check_token(token)
        with self._lock:
            add = self._backend.add_special_tokens if special_tokens else self._backend.add_tokens
            return add(tokens)

    def _register(self, tokens: Iterable[str | AddedToken]) -> None:
        """Makes `tokens` special in the backend; those it does not have get the next ids."""
        have = {token.content for token in self._backend.get_added_tokens_decoder().values() if token.special}
        missing = []
        for token in tokens:
            _check_token(token)
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
        _check_token(token)
        if self._backend.token_to_id(str(token)) is None:
            raise TokenizerError(
                f"{name} can't be {str(token)!r}: it is not in the vocabulary; choose a token that is, such as "
                f"tokenizer.eos_token, or add it with tokenizer.add_special_tokens({{{name!r}: {str(token)!r}}})"
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

    # ---- settings

    @property
    def padding_side(self) -> str:
        return self._padding_side

    @padding_side.setter
    def padding_side(self, side: str) -> None:
        self._padding_side = _one_of("padding_side", side, SIDES)

    @property
    def truncation_side(self) -> str:
        return self._truncation_side

    @truncation_side.setter
    def truncation_side(self, side: str) -> None:
        self._truncation_side = _one_of("truncation_side", side, SIDES)

    # ---- vocabulary

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
        """The ids of tokens; a token that is not in the vocabulary has the id of the unknown token, or None."""
        if isinstance(tokens, str):
            index = self._backend.token_to_id(tokens)
            return self._get_special_id("unk_token") if index is None else index
        if tokens is None or not isinstance(tokens, Iterable):
            raise TokenizerError(f"tokens must be a string or a list of strings, not {_show(tokens)}")
        tokens = list(tokens)
        for token in tokens:
            if not isinstance(token, str):
                raise TokenizerError(f"a token must be a string, not {_show(token)}")
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> str | list[str]:
        """The tokens of an id or of a list of ids; raises TokenizerError for an id not in the vocabulary."""
        ids = _to_python(ids)
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
            raise TokenizerError(f"a token id must be an int, not {_show(token_id)}")
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

    # ---- encoding

    def __call__(
        self,
        text: Any = None,
        text_pair: Any = None,
        text_target: Any = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        is_split_into_words: bool = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        split_special_tokens: bool | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Encodes a text or a list of texts.

        One text gives flat rows, a list gives lists of rows; with `return_tensors="pt"` (or "np") int64
        tensors `[rows, length]`. `text_pair` gives each text a second one; `text_target` becomes `labels`.
        `padding`: True or "longest", "max_length", False. `truncation`: True or "longest_first",
        "only_first", "only_second", False; `max_length` alone truncates too. Without `max_length`, the
        longest length is `model_max_length`. Raises TokenizerError.
        """
        options = dict(
            add_special_tokens=add_special_tokens, padding=padding, truncation=truncation, max_length=max_length,
            stride=stride, is_split_into_words=is_split_into_words, pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side, return_tensors=return_tensors,
            return_token_type_ids=return_token_type_ids, return_attention_mask=return_attention_mask,
            return_overflowing_tokens=return_overflowing_tokens,
            return_special_tokens_mask=return_special_tokens_mask,
            return_offsets_mapping=return_offsets_mapping, return_length=return_length,
            split_special_tokens=split_special_tokens, verbose=verbose,
        )  # fmt: skip
        if text_target is None:
            return self._encode(text, text_pair, **options)
        labels = self._encode(text_target, None, **options)
        if text is None:
            return labels
        encoding = self._encode(text, text_pair, **options)
        encoding["labels"] = labels["input_ids"]
        return encoding

    def _encode(
        self,
        text: Any,
        text_pair: Any,
        *,
        add_special_tokens: bool,
        padding: bool | str,
        truncation: bool | str | None,
        max_length: int | None,
        stride: int,
        is_split_into_words: bool,
        pad_to_multiple_of: int | None,
        padding_side: str | None,
        return_tensors: str | None,
        return_overflowing_tokens: bool,
        split_special_tokens: bool | None,
        verbose: bool,
        **returned: bool | None,
    ) -> BatchEncoding:
        inputs, batched = _inputs(text, text_pair, is_split_into_words)
        pad, cut = self._strategies(padding, truncation, max_length, stride, pad_to_multiple_of, padding_side)
        split = self.split_special_tokens if split_special_tokens is None else bool(split_special_tokens)
        with self._lock:  # these are settings of the backend, and other threads use it too
            self._backend.encode_special_tokens = split
            if cut is None:
                self._backend.no_truncation()
            else:
                self._truncate(cut)
            if pad is None:
                self._backend.no_padding()
            else:
                self._backend.enable_padding(**pad)
            try:
                encodings = self._backend.encode_batch(
                    inputs, is_pretokenized=is_split_into_words, add_special_tokens=add_special_tokens
                )
            except Exception as error:  # the Rust library raises plain exceptions
                raise TokenizerError(f"the text can't be encoded: {error}") from error
        sample = list(range(len(encodings)))
        if return_overflowing_tokens:
            sample = [i for i, one in enumerate(encodings) for _ in (one, *one.overflowing)]
            encodings = [row for one in encodings for row in (one, *one.overflowing)]
        data = self._rows(encodings, **returned)
        if return_overflowing_tokens:
            data["overflow_to_sample_mapping"] = sample
        if verbose and cut is None:
            self._warn_if_long(encodings)
        if return_tensors is None and not batched and not return_overflowing_tokens:
            data = {key: rows[0] for key, rows in data.items()}
        return BatchEncoding(data, encodings).convert_to_tensors(return_tensors)

    def _rows(
        self,
        encodings: list[tokenizers.Encoding],
        *,
        return_token_type_ids: bool | None,
        return_attention_mask: bool | None,
        return_special_tokens_mask: bool,
        return_offsets_mapping: bool,
        return_length: bool,
    ) -> dict[str, list[Any]]:
        def wanted(given: bool | None, name: str) -> bool:
            return name in self.model_input_names if given is None else given

        data: dict[str, list[Any]] = {"input_ids": [row.ids for row in encodings]}
        if wanted(return_token_type_ids, "token_type_ids"):
            data["token_type_ids"] = [row.type_ids for row in encodings]
        if wanted(return_attention_mask, "attention_mask"):
            data["attention_mask"] = [row.attention_mask for row in encodings]
        if return_special_tokens_mask:
            data["special_tokens_mask"] = [row.special_tokens_mask for row in encodings]
        if return_offsets_mapping:
            data["offset_mapping"] = [row.offsets for row in encodings]
        if return_length:
            data["length"] = [len(row.ids) for row in encodings]
        return data

    def _strategies(
        self,
        padding: bool | str,
        truncation: bool | str | None,
        max_length: int | None,
        stride: int,
        pad_to_multiple_of: int | None,
        padding_side: str | None,
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The backend's padding and truncation settings, None where there is to be none."""
        if max_length is not None and (not isinstance(max_length, int) or max_length < 0):
            raise TokenizerError(f"max_length must be an int of at least 0, not {max_length!r}")
        if max_length is not None and padding is False and truncation is None:
            truncation = True
        pad = {True: "longest", False: "do_not_pad", None: "do_not_pad"}.get(padding, padding)
        cut = {True: "longest_first", False: "do_not_truncate", None: "do_not_truncate"}.get(
            truncation, truncation
        )
        _one_of("padding", pad, _PADDING)
        _one_of("truncation", cut, _TRUNCATION)
        length = max_length
        if length is None and self.model_max_length <= 1e20:
            length = self.model_max_length
        if length is None:  # nothing says how long
            pad = "do_not_pad" if pad == "max_length" else pad
            cut = "do_not_truncate"
        padding_settings = None
        if pad != "do_not_pad":
            if self.pad_token is None:
                raise TokenizerError(
                    "padding needs a pad token and this tokenizer has none; set one, for example "
                    "tokenizer.pad_token = tokenizer.eos_token"
                )
            padding_settings = {
                "direction": _one_of("padding_side", padding_side or self.padding_side, SIDES),
                "pad_id": self.pad_token_id,
                "pad_token": self.pad_token,
                "pad_type_id": self.pad_token_type_id,
                "length": length if pad == "max_length" else None,
                "pad_to_multiple_of": pad_to_multiple_of,
            }
        if cut == "do_not_truncate":
            return padding_settings, None
        if padding_settings and pad_to_multiple_of and length % pad_to_multiple_of:
            raise TokenizerError(
                f"truncation to {length} tokens and padding to a multiple of {pad_to_multiple_of} contradict each "
                "other; choose a max_length that is a multiple"
            )
        settings = {
            "max_length": length,
            "stride": stride,
            "strategy": cut,
            "direction": self.truncation_side,
        }
        return padding_settings, settings

    def _truncate(self, settings: dict[str, Any]) -> None:
        try:
            self._backend.enable_truncation(**settings)
        except Exception as error:  # the Rust library raises plain exceptions
            raise TokenizerError(
                f"stride={settings['stride']} and max_length={settings['max_length']} don't fit together: {error}"
            ) from error

    def _warn_if_long(self, encodings: list[tokenizers.Encoding]) -> None:
        longest = max((len(row.ids) for row in encodings), default=0)
        if longest > self.model_max_length:
            warnings.warn(
                f"the text has {longest} tokens, but the model takes {self.model_max_length}; "
                "pass truncation=True to shorten it",
                stacklevel=4,
            )

    def encode(
        self, text: Any, text_pair: Any = None, add_special_tokens: bool = True, **options: Any
    ) -> list[int] | Tensor:
        """The ids of a text; the options are those of a call."""
        return self(text, text_pair, add_special_tokens=add_special_tokens, **options)["input_ids"]

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **options: Any
    ) -> list[str]:
        """The tokens of a text, as the vocabulary spells them."""
        return self(text, pair, add_special_tokens=add_special_tokens, **options).tokens()

    def pad(
        self,
        encoded: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> BatchEncoding:
        """Pads rows that are already encoded: a dict of rows or a list of dicts, as a data loader collects.

        `input_ids`, `attention_mask`, `token_type_ids` and `special_tokens_mask` are padded; what else is
        there stays. Raises TokenizerError."""
        if isinstance(encoded, (list, tuple)) and encoded and isinstance(encoded[0], Mapping):
            encoded = {key: [example[key] for example in encoded] for key in encoded[0]}
        if not isinstance(encoded, Mapping) or "input_ids" not in encoded:
            raise TokenizerError(
                f"pad takes a dict with 'input_ids', or a list of such dicts, not {_show(encoded)}"
            )
        data = {key: _to_python(value) for key, value in encoded.items()}
        single = not data["input_ids"] or not isinstance(data["input_ids"][0], (list, tuple))
        if single:
            data = {key: [value] for key, value in data.items()}
        rows = data["input_ids"]
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in self.model_input_names
        if return_attention_mask:
            data.setdefault("attention_mask", [[1] * len(row) for row in rows])
        settings, _ = self._strategies(padding, False, max_length, 0, pad_to_multiple_of, padding_side)
        if settings is not None:
            length = settings["length"] if settings["length"] is not None else max(map(len, rows))
            if pad_to_multiple_of:
                length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
            fills = {
                "input_ids": self.pad_token_id,
                "attention_mask": 0,
                "token_type_ids": 0,
                "special_tokens_mask": 1,
            }
            for key, fill in fills.items():
                if key in data:
                    data[key] = [_padded(row, length, fill, settings["direction"]) for row in data[key]]
        if single and return_tensors is None:
            data = {key: rows[0] for key, rows in data.items()}
        return BatchEncoding(data).convert_to_tensors(return_tensors)

    # ---- decoding

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str | list[str]:
        """The text of an id, a row of ids (list, array, tensor), or a list of rows; for rows a list of texts.

        `clean_up_tokenization_spaces` takes out the spaces before punctuation that WordPiece leaves; it does
        nothing for BPE. Raises TokenizerError for an id not in the vocabulary."""
        ids = _to_python(token_ids)
        if isinstance(ids, Mapping):
            ids = _to_python(ids.get("input_ids"))
        if isinstance(ids, (list, tuple)) and ids and isinstance(_to_python(ids[0]), (list, tuple)):
            return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces) for row in ids]
        ids = [self._known_id(one)[0] for one in (ids if isinstance(ids, (list, tuple)) else [ids])]
        text = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        for old, new in self._cleaning(clean_up_tokenization_spaces):
            text = text.replace(old, new)
        return text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """The texts of several rows of ids; always a list."""
        texts = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces)
        return [texts] if isinstance(texts, str) else texts

    def _cleaning(self, asked: bool | None = None) -> tuple[tuple[str, str], ...]:
        clean = self.clean_up_tokenization_spaces if asked is None else asked
        return _CLEANING if clean and type(self._backend.model).__name__ != "BPE" else ()

    # ---- chat

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Sequence[dict[str, Any] | Callable[..., Any]] | None = None,
        documents: Sequence[dict[str, str]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> Any:
        """Renders a conversation (or a list of conversations) with the model's chat template, straight to ids.

        A conversation is a list of `{"role": ..., "content": ...}`. `tools` are JSON schemas or functions with
        type hints and docstrings. `add_generation_prompt` ends with the start of the assistant's answer;
        `continue_final_message` leaves the last message open instead. `variables` go to the template, as do
        the special tokens. The template writes its own special tokens, so none are added: BOS is never
        doubled. Returns a BatchEncoding; ids with `return_dict=False`; text with `tokenize=False`.
        Raises TokenizerError for malformed messages, and for a template that is missing, fails, or exceeds its
        bounds on time and output (see `taut.tokenizer.template`).
        """
        if variables.pop("sanitize_control_tokens", False):
            raise TokenizerError(
                "sanitize_control_tokens is not supported; pass split_special_tokens=True in tokenizer_kwargs to "
                "encode special tokens of the whole conversation as text"
            )
        return_dict = return_dict and tokenize
        if return_assistant_tokens_mask and not return_dict:
            raise TokenizerError("return_assistant_tokens_mask needs tokenize=True and return_dict=True")
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            raise TokenizerError(
                "continue_final_message can't be combined with add_generation_prompt or return_assistant_tokens_mask"
            )
        source = choose_template(self.chat_template, chat_template, tools)
        code = self._templates.get(source)
        if code is None:
            code = compile_template(source)
            if len(self._templates) >= 16:
                self._templates.clear()
            self._templates[source] = code
        conversations, batched = split_batch(conversation)
        rendered = [
            render_chat(
                code,
                source,
                one,
                tools=tools,
                documents=documents,
                variables={**self.special_tokens_map, **variables},
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                want_spans=return_assistant_tokens_mask,
            )
            for one in conversations
        ]
        texts = [one.text for one in rendered]
        if not tokenize:
            return texts if batched else texts[0]
        encoding = self(
            texts if batched else texts[0],
            **{
                "padding": padding,
                "truncation": truncation,
                "max_length": max_length,
                "add_special_tokens": False,
                "return_tensors": None if return_assistant_tokens_mask else return_tensors,
                **(tokenizer_kwargs or {}),
            },
        )
        if return_assistant_tokens_mask:
            masks = [
                _span_mask(row, one.spans) for row, one in zip(encoding.encodings, rendered, strict=True)
            ]
            encoding["assistant_masks"] = masks if batched else masks[0]
            if return_tensors is not None and not batched:
                encoding.update({key: [row] for key, row in encoding.items()})
            encoding.convert_to_tensors(return_tensors)
        return encoding if return_dict else encoding["input_ids"]

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """The template that `apply_chat_template` would render."""
        return choose_template(self.chat_template, chat_template, tools)

    # ---- saving

    def save_pretrained(self, folder: str | Path) -> tuple[str, ...]:
        """Writes `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and the chat templates,
        which transformers and Taut load back equal; returns their paths."""
        return save_tokenizer(self, Path(folder))


def _inputs(text: Any, pair: Any, words: bool) -> tuple[list[Any], bool]:
    """What the backend encodes, and whether it was a batch."""
    if text is None:
        raise TokenizerError("the text is None; pass a string or a list of strings")
    batched = isinstance(text, (list, tuple))
    if words:
        batched = batched and bool(text) and isinstance(text[0], (list, tuple))
    rows = list(text) if batched else [text]
    pairs = None
    if pair is not None:
        if batched != (
            isinstance(pair, (list, tuple))
            and (not words or (bool(pair) and isinstance(pair[0], (list, tuple))))
        ):
            raise TokenizerError("text and text_pair must both be one text, or both be lists of texts")
        pairs = list(pair) if batched else [pair]
        if len(pairs) != len(rows):
            raise TokenizerError(f"{len(rows)} texts but {len(pairs)} in text_pair; each text needs one")
    for index, row in enumerate(rows):
        _check_text(row, "text", index, batched, words)
    for index, row in enumerate(pairs or ()):
        _check_text(row, "text_pair", index, batched, words)
    if pairs is None or (not batched and not pair):  # as in transformers, a single empty pair is none
        return [tuple(row) if not words and isinstance(row, list) else row for row in rows], batched
    return list(zip(rows, pairs, strict=True)), batched


def _check_text(row: Any, name: str, index: int, batched: bool, words: bool) -> None:
    where = f"{name}[{index}]" if batched else name
    if words:
        if not isinstance(row, (list, tuple)) or not all(isinstance(word, str) for word in row):
            raise TokenizerError(
                f"{where} must be a list of words with is_split_into_words, not {_show(row)}"
            )
        return
    is_pair = name == "text" and isinstance(row, (list, tuple)) and len(row) == 2
    texts = row if is_pair and batched else [row]
    for one in texts:
        if not isinstance(one, str):
            raise TokenizerError(f"{where} must be a string, not {_show(one)}")
        try:
            one.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"{where} is not valid text: {error.reason} at character {error.start}; "
                "repair it with text.encode('utf-8', 'replace').decode()"
            ) from error


def _check_token(token: Any) -> None:
    if not isinstance(token, (str, AddedToken)) or not str(token):
        raise TokenizerError(f"a token must be a non-empty string, not {_show(token)}")


def _one_of(name: str, value: Any, known: Sequence[str]) -> Any:
    if value not in known:
        raise TokenizerError(f"{name} is {value!r}; known: {', '.join(known)}{nearest(str(value), known)}")
    return value


def _padded(row: Sequence[int], length: int, fill: int, side: str) -> list[int]:
    padding = [fill] * (length - len(row))
    return padding + list(row) if side == "left" else list(row) + padding


def _span_mask(row: tokenizers.Encoding, spans: list[tuple[int, int]]) -> list[int]:
    """1 for each token that overlaps one of the character spans."""
    mask = [0] * len(row.ids)
    for start, stop in spans:
        first = row.char_to_token(start)
        if first is None:
            break  # truncated
        last = row.char_to_token(stop - 1)
        for index in range(first, len(mask) if last is None else last + 1):
            mask[index] = 1
    return mask


def _to_python(value: Any) -> Any:
    return value.tolist() if isinstance(value, (Tensor, np.ndarray, np.generic)) else value


def _show(value: Any) -> str:
    text = repr(value)
    return (
        "None"
        if value is None
        else f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
    )
