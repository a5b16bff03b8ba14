"""The tokenizer: text to ids and back, in the shape of transformers' fast tokenizers."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import CodeType
from typing import Any

import tokenizers
from tokenizers import AddedToken
from torch import Tensor

from taut.errors import TokenizerError
from taut.tokenizer.chat import choose_template, render_chat, split_batch
from taut.tokenizer.checks import encoder_inputs, one_of, show, to_python
from taut.tokenizer.encoding import BatchEncoding
from taut.tokenizer.save import save_tokenizer
from taut.tokenizer.template import compile_template
from taut.tokenizer.vocabulary import Vocabulary

NO_LIMIT = int(1e30)  # `model_max_length` when no file gives one
SIDES = ("left", "right")
_PADDING = ("longest", "max_length", "do_not_pad")
_TRUNCATION = ("longest_first", "only_first", "only_second", "do_not_truncate")

# What `clean_up_tokenization_spaces` replaces, in order.
_CLEANING = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
    (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip


class Tokenizer(Vocabulary):
    """Text to token ids and back. Made by `AutoTokenizer.from_pretrained`.

    | attribute | meaning |
    |---|---|
    | `bos_token`, `eos_token_id`, ... | special tokens and their ids, None where there is none; can be set |
    | `padding_side`, `truncation_side` | "left" or "right" |
    | `model_max_length` | tokens that the model takes; 1e30 where the files don't say |
    | `model_input_names` | the keys a call returns by default |
    | `chat_template` | a Jinja template, or a dict of named ones |
    | `add_bos_token`, `add_eos_token` | whether encoding adds them; setting one replaces the file's rule |
    | `backend_tokenizer` | the `tokenizers.Tokenizer` that does the work |

    It can be used from several threads at once, and pickled.
    """

    is_fast = True

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
        backend.no_padding()
        backend.no_truncation()
        super().__init__(backend, special_tokens or {}, extra_special_tokens, add_bos_token, add_eos_token)
        self._templates: dict[str, CodeType] = {}  # compiled, by their source
        self.name_or_path = name_or_path
        self.chat_template = dict(chat_template) if isinstance(chat_template, Mapping) else chat_template
        self.padding_side = padding_side
        self.truncation_side = truncation_side
        if not isinstance(model_max_length, (int, float, type(None))):
            raise TokenizerError(f"model_max_length must be a number, not {show(model_max_length)}")
        self.model_max_length = NO_LIMIT if model_max_length is None else int(min(model_max_length, NO_LIMIT))
        if not isinstance(model_input_names, (list, tuple)):
            raise TokenizerError(f"model_input_names must be a list, not {show(model_input_names)}")
        self.model_input_names = list(model_input_names)
        self.made_of_it: dict[Any, Any] = {}  # by those who need it in another form
        self.clean_up_tokenization_spaces = bool(clean_up_tokenization_spaces)
        self.split_special_tokens = bool(split_special_tokens)

    # The lock and what was made of the tokenizer stay behind when it goes to another process.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_templates": {}, "made_of_it": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return (
            f"Tokenizer({self.name_or_path!r}, {type(self._backend.model).__name__}, {len(self)} tokens, "
            f"padding_side={self.padding_side!r}, special_tokens={self.special_tokens_map})"
        )

    # ---- settings

    @property
    def padding_side(self) -> str:
        return self._padding_side

    @padding_side.setter
    def padding_side(self, side: str) -> None:
        self._padding_side = one_of("padding_side", side, SIDES)

    @property
    def truncation_side(self) -> str:
        return self._truncation_side

    @truncation_side.setter
    def truncation_side(self, side: str) -> None:
        self._truncation_side = one_of("truncation_side", side, SIDES)

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
        options = {
            "add_special_tokens": add_special_tokens,
            "padding": padding,
            "truncation": truncation,
            "max_length": max_length,
            "stride": stride,
            "is_split_into_words": is_split_into_words,
            "pad_to_multiple_of": pad_to_multiple_of,
            "padding_side": padding_side,
            "return_tensors": return_tensors,
            "return_token_type_ids": return_token_type_ids,
            "return_attention_mask": return_attention_mask,
            "return_overflowing_tokens": return_overflowing_tokens,
            "return_special_tokens_mask": return_special_tokens_mask,
            "return_offsets_mapping": return_offsets_mapping,
            "return_length": return_length,
            "split_special_tokens": split_special_tokens,
            "verbose": verbose,
        }
        if text_target is None:
            return self._encode(text, text_pair, **options)
        with self._target_mode():
            labels = self._encode(text_target, None, **options)
        if text is None:
            return labels
        encoding = self._encode(text, text_pair, **options)
        encoding["labels"] = labels["input_ids"]
        return encoding

    def _target_mode(self) -> AbstractContextManager[None]:
        """While it is open, texts are encoded as what a model is to write."""
        return nullcontext()

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
        inputs, batched = encoder_inputs(text, text_pair, is_split_into_words)
        pad, cut = self._strategies(padding, truncation, max_length, stride, pad_to_multiple_of, padding_side)
        split = self.split_special_tokens if split_special_tokens is None else bool(split_special_tokens)
        with self._lock:  # these are settings of the backend, and other threads use it too
            self._backend.encode_special_tokens = split
            if cut is None:
                self._backend.no_truncation()
            else:
                self._backend.enable_truncation(**cut)
            if pad is None:
                self._backend.no_padding()
            else:
                self._backend.enable_padding(**pad)
            try:
                inputs, words = self._prepare(inputs, is_split_into_words, split)
                encodings = self._backend.encode_batch(
                    inputs, is_pretokenized=words, add_special_tokens=add_special_tokens
                )
            except BaseException as error:  # the Rust library raises plain exceptions, and panics
                if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                    raise TokenizerError(f"the text can't be encoded: {error}") from error
                raise
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
            data = {k: rows[0] if rows and isinstance(rows[0], list) else rows for k, rows in data.items()}
        return BatchEncoding(data, encodings).convert_to_tensors(return_tensors)

    def _prepare(self, inputs: list[Any], words: bool, split_special_tokens: bool) -> tuple[list[Any], bool]:
        """What the backend gets of the texts, and whether these are words already."""
        return inputs, words

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
        one_of("padding", pad, _PADDING)
        one_of("truncation", cut, _TRUNCATION)
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
                "direction": one_of("padding_side", padding_side or self.padding_side, SIDES),
                "pad_id": self.pad_token_id,
                "pad_token": self.pad_token,
                "pad_type_id": self.pad_token_type_id,
                "length": length if pad == "max_length" else None,
                "pad_to_multiple_of": pad_to_multiple_of,
            }
        if cut == "do_not_truncate":
            return padding_settings, None
        if not 0 <= stride < max(length, 1):
            raise TokenizerError(f"stride={stride} does not fit max_length={length}: it must be smaller")
        if padding_settings and pad_to_multiple_of and length % pad_to_multiple_of:
            raise TokenizerError(
                f"truncation to {length} tokens and padding to a multiple of {pad_to_multiple_of} contradict "
                "each other; choose a max_length that is a multiple"
            )
        settings = {
            "max_length": length,
            "stride": stride,
            "strategy": cut,
            "direction": self.truncation_side,
        }
        return padding_settings, settings

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
                f"pad takes a dict with 'input_ids', or a list of such dicts, not {show(encoded)}"
            )
        data = {key: to_python(value) for key, value in encoded.items()}
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
        ids = to_python(token_ids)
        if isinstance(ids, Mapping):
            ids = to_python(ids.get("input_ids"))
        if isinstance(ids, (list, tuple)) and ids and isinstance(to_python(ids[0]), (list, tuple)):
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
        """Renders a conversation (or a list of them) with the model's chat template, straight to ids.

        A conversation is a list of `{"role": ..., "content": ...}`. `tools` are JSON schemas or functions
        with type hints and docstrings. `add_generation_prompt` ends with the start of the assistant's answer;
        `continue_final_message` leaves the last message open instead. `variables` go to the template, as do
        the special tokens. The template writes its own special tokens, so none are added: BOS is never
        doubled. Returns a BatchEncoding; ids with `return_dict=False`; text with `tokenize=False`.
        Raises TokenizerError for malformed messages, and for a template that is missing, fails, or exceeds
        its bounds on time and output (see `taut.tokenizer.template`).
        """
        if variables.pop("sanitize_control_tokens", False):
            raise TokenizerError(
                "sanitize_control_tokens is not supported; remove special tokens from the messages "
                "(tokenizer.all_special_tokens lists them)"
            )
        return_dict = return_dict and tokenize
        if return_assistant_tokens_mask and not return_dict:
            raise TokenizerError("return_assistant_tokens_mask needs tokenize=True and return_dict=True")
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            raise TokenizerError(
                "continue_final_message can't be combined with add_generation_prompt or "
                "return_assistant_tokens_mask"
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

    def _saved_settings(self) -> dict[str, Any]:
        """What `tokenizer_config.json` says of this kind of tokenizer alone."""
        # The class that takes tokenizer.json as it is; those of single families rebuild parts of it.
        return {"tokenizer_class": "PreTrainedTokenizerFast"}


def _padded(row: Sequence[int], length: int, fill: int, side: str) -> list[int]:
    padding = [fill] * (length - len(row))
    return padding + list(row) if side == "left" else list(row) + padding


def _span_mask(row: tokenizers.Encoding, spans: list[tuple[int, int]]) -> list[int]:
    """1 for each token that shares a character with one of the spans."""
    # The offsets of a byte-level token leave out its spaces: one of spaces alone ends where it begins.
    places = [(min(first, last - 1), last) for first, last in row.offsets]
    return [int(any(start < last and first < stop for start, stop in spans)) for first, last in places]
