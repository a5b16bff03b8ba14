"""`GenerationConfig`: the options of `generate` under transformers' names."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from taut.engine.request import SamplingParams
from taut.errors import RequestError, nearest

FILE = "generation_config.json"

# Tokens generated when neither max_new_tokens nor max_length is set anywhere, as in transformers.
DEFAULT_NEW_TOKENS = 20

# transformers' own values for what neither the call nor the checkpoint sets.
DEFAULTS: Mapping[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_assistant_tokens": 20,
}

# transformers' options that Taut does not have, with the values at which they do nothing. Any other value
# is an error, since the output would not be what was asked for.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "constraints": (None,),
    "dola_layers": (None,),
    "force_words_ids": (None,),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "penalty_alpha": (None, 0.0),
    "token_healing": (None, False),
    "top_h": (None,),
    "watermarking_config": (None,),
}

# transformers' options that change speed or memory only: kept, written back, and without effect.
WITHOUT_EFFECT = frozenset({
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight",
    "assistant_lookbehind", "cache_config", "cache_implementation", "compile_config",
    "continuous_batching_config", "disable_compile",
    "is_assistant", "low_memory", "max_cache_len", "num_assistant_tokens_schedule", "prefill_chunk_size",
    "remove_invalid_values", "speculation_type", "target_lookbehind",
    "transformers_version", "use_mtp", "_from_model_config", "_commit_hash",
})  # fmt: skip


# What `generation_config.json` of models that hear says beside that; `taut.engine.transcribe` gives each its
# meaning.
OF_SPEECH = frozenset({
    "alignment_heads", "compression_ratio_threshold", "condition_on_prev_tokens", "forced_decoder_ids",
    "is_multilingual", "lang_to_id", "language", "logprob_threshold", "max_initial_timestamp_index",
    "median_filter_width", "no_speech_threshold", "no_timestamps_token_id", "prev_sot_token_id",
    "prompt_condition_type", "return_timestamps", "task", "task_to_id",
})  # fmt: skip


@dataclass(init=False, repr=False)
class GenerationConfig:
    """Options of `generate`, by transformers' names. None: not set here; the checkpoint's value holds, then
    transformers' default.

    | field | meaning |
    |---|---|
    | `max_new_tokens`, `max_length` | most tokens to generate; most with the padded prompt. The first wins |
    | `min_new_tokens`, `min_length` | no end-of-sequence token before so many, counted likewise |
    | `max_time` | seconds after which a row ends |
    | `stop_strings` | a text or several that end a row; `generate` then needs `tokenizer=` |
    | `do_sample` | draw tokens; otherwise the most likely is taken |
    | `temperature`, `top_k`, `top_p`, `min_p`, `typical_p`, `epsilon_cutoff`, `eta_cutoff` | shape what is \
drawn from |
    | `num_beams` | beam search with so many beams; with `do_sample`, beams are drawn |
    | `length_penalty` | of beams: the power of the length that a score is divided by |
    | `early_stopping` | of beams: when to end (True, False or "never") |
    | `num_beam_groups`, `diversity_penalty` | beams in groups that avoid each other's tokens |
    | `guidance_scale` | moves away from what follows `negative_prompt_ids`; 1 for none |
    | `repetition_penalty`, `no_repeat_ngram_size` | against repetition, prompt included |
    | `encoder_repetition_penalty` | makes tokens likelier that the encoder read; 1 for off |
    | `encoder_no_repeat_ngram_size` | no n-gram of this size is one that the encoder read; 0 for off |
    | `presence_penalty`, `frequency_penalty` | OpenAI's: subtracted for generated tokens, once / per count |
    | `bad_words_ids`, `suppress_tokens` | token sequences, single tokens that may not be generated |
    | `begin_suppress_tokens` | tokens that may not be the first |
    | `forced_bos_token_id`, `forced_eos_token_id` | the token after a prompt of one token; the last one |
    | `exponential_decay_length_penalty` | `(start, factor)`: makes an end likelier after so many tokens |
    | `sequence_bias`, `logit_bias` | `{token ids: bias}` (or pairs), `{token id: bias}` |
    | `num_assistant_tokens` | most tokens that an `assistant_model` guesses at a time (20) |
    | `prompt_lookup_num_tokens` | guess up to so many tokens from what stands in the row already |
    | `max_matching_ngram_size` | of a lookup: 1 looks for single tokens too, otherwise for pairs |
    | `renormalize_logits` | returned scores are log-probabilities |
    | `seed` | an int, or one for each returned row; None: from torch's default generator |
    | `num_return_sequences` | rows returned for each prompt; needs `do_sample` or so many beams |
    | `logprobs` | keep each token's log-probability, and of so many most likely ones, for the output |
    | `return_dict_in_generate`, `output_scores`, `output_logits` | what `generate` returns |
    | `use_cache` | False: rows share no pages with others, nor with calls before or after; same output |
    | `pad_token_id`, `bos_token_id`, `eos_token_id` | ids; `eos_token_id` may be several |
    | `decoder_start_token_id` | what the decoder of an encoder-decoder starts with; or one for each row |
    | `extra` | further keys of the file, such as those `OF_SPEECH`: kept and written back |

    Raises `RequestError` for an unknown option or a value out of range.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    max_time: float | None = None
    stop_strings: str | Sequence[str] | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    num_beam_groups: int | None = None
    diversity_penalty: float | None = None
    guidance_scale: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    encoder_repetition_penalty: float | None = None
    encoder_no_repeat_ngram_size: int | None = None
    bad_words_ids: Sequence[Sequence[int]] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    exponential_decay_length_penalty: Sequence[float] | None = None
    sequence_bias: Any = None
    logit_bias: Mapping[int, float] | None = None
    num_assistant_tokens: int | None = None
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int | None = None
    renormalize_logits: bool | None = None
    seed: int | Sequence[int] | None = None
    num_return_sequences: int | None = None
    return_dict_in_generate: bool | None = None
    output_scores: bool | None = None
    output_logits: bool | None = None
    logprobs: int | None = None
    use_cache: bool | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | Sequence[int] | None = None
    decoder_start_token_id: int | Sequence[int] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __init__(self, **options: Any) -> None:
        object.__setattr__(self, "extra", dict(options.pop("extra", None) or {}))
        for name in OPTIONS:
            object.__setattr__(self, name, None)
        for name, value in options.items():
            check_known(name, OF_SPEECH)
            setattr(self, name, value)
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an option; transformers' options that Taut lacks are held in `extra` (and refused by
        `generate` where they would change the output)."""
        if name in OPTIONS or name == "extra":
            object.__setattr__(self, name, value)
        else:
            check_known(name, (*self.extra, *OF_SPEECH))
            self.extra[name] = value

    def __getattr__(self, name: str) -> Any:
        extra = self.__dict__.get("extra", {})
        if name in extra:
            return extra[name]
        if name in UNSUPPORTED or name in WITHOUT_EFFECT:
            return None
        raise AttributeError(f"GenerationConfig has no option {name!r}{nearest(name, OPTIONS)}")

    def __repr__(self) -> str:
        return f"GenerationConfig({', '.join(f'{k}={v!r}' for k, v in self.to_dict().items())})"

    # -- files -------------------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationConfig:
        """A config from the keys of a `generation_config.json`; keys nobody knows are kept in `extra`."""
        known = {name: value for name, value in values.items() if name in OPTIONS}
        if known.get("logit_bias") is not None:
            known["logit_bias"] = {_key(token): bias for token, bias in known["logit_bias"].items()}
        extra = {name: value for name, value in values.items() if name not in OPTIONS}
        return cls(extra=extra, **known)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> GenerationConfig:
        """The config in `folder/generation_config.json`, or in that file when `folder` names it."""
        path = Path(folder)
        if path.is_dir():
            path = path / FILE
        if not path.is_file():
            raise RequestError(
                f"{path}: no such file. Next step: name a folder that holds {FILE}, or use "
                "`model.generation_config`, which every loaded model has"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RequestError(f"{path}: not readable as JSON: {error}") from error
        if not isinstance(values, dict):
            raise RequestError(f"{path}: holds a {type(values).__name__}; expected a JSON object")
        try:
            return cls.from_dict(values)
        except RequestError as error:
            raise RequestError(f"{path}: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Writes `folder/generation_config.json` (the folder is made if need be) and returns its path."""
        self.validate()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path, temporary = folder / FILE, folder / (FILE + ".tmp")
        temporary.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return path

    def to_dict(self) -> dict[str, Any]:
        """Everything that is set, in a shape that JSON holds; `from_dict` gives an equal config."""
        values = {name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None}
        if isinstance(self.sequence_bias, Mapping):
            values["sequence_bias"] = [[list(ids), bias] for ids, bias in self.sequence_bias.items()]
        for name, value in values.items():
            if isinstance(value, tuple):
                values[name] = list(value)
        return {**self.extra, **values}

    # -- meaning -----------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raises `RequestError` for the first option whose value is out of range."""
        for name, (expected, right) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not right(value):
                raise RequestError(f"{name} is {value!r}; expected {expected}")
        if self.do_sample and self.temperature is not None and self.temperature == 0:
            raise RequestError("temperature is 0; for the most likely token each time set do_sample=False")
        _stops(self.stop_strings)
        _sequences(self.sequence_bias)

    def require_supported(self) -> None:
        """Raises `RequestError` for an option of transformers that Taut lacks and that changes output."""
        for name, value in self.extra.items():
            neutral = UNSUPPORTED.get(name)
            if neutral is None or any(value is one or value == one for one in neutral):
                continue
            raise RequestError(
                f"{name} is {value!r}, which Taut does not support; without effect: "
                f"{', '.join(map(repr, neutral))}. Supported: greedy decoding, sampling and beams, with what "
                f"GenerationConfig documents. Next step: set {name}={neutral[-1]!r}"
            )
        if self.extra.get("cache_implementation") == "quantized":
            raise RequestError(
                "cache_implementation is 'quantized', which Taut does not support; leave it out"
            )

    def over(self, base: GenerationConfig, **options: Any) -> GenerationConfig:
        """This config with `options` set, None too, and what is then unset taken from `base`, then from
        transformers' defaults. Neither config is changed."""
        merged = {**DEFAULTS, **base._set(), **self._set(), **options}
        extra = {**base.extra, **self.extra}
        return GenerationConfig(extra=extra, **merged)

    def _set(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None}

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids; empty when there are none."""
        if self.eos_token_id is None:
            return ()
        ids = (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id
        return tuple(token for token in ids if token >= 0)  # some files say -1 for none

    @property
    def beams(self) -> int:
        """Beams that are followed at a time; 1 where there is no beam search."""
        return self.num_beams or 1

    @property
    def guided(self) -> bool:
        """Whether guidance changes anything."""
        return self.guidance_scale not in (None, 1.0)

    @property
    def forced_end(self) -> tuple[int, ...]:
        """Tokens that alone may be the last; empty for any."""
        given = self.forced_eos_token_id
        return () if given is None else (given,) if isinstance(given, int) else tuple(given)

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings; empty when there are none."""
        return _stops(self.stop_strings)

    def new_tokens(self, width: int, length: int, context: int) -> int:
        """Most tokens to generate for a prompt of `length` tokens in rows of `width` (padding included).

        Never more than fit into the context of `context` positions. Raises `RequestError` when the prompt
        leaves no room.
        """
        if length >= context:
            raise RequestError(
                f"the prompt has {length} tokens and the model's context is {context}, which leaves no room "
                f"for new ones. Next step: shorten the prompt to at most {context - 1} tokens "
                "(truncation=True, max_length=...) or use a model with a longer context"
            )
        if self.max_new_tokens is not None:
            wanted = self.max_new_tokens
        elif self.max_length is not None:
            wanted = self.max_length - width
            if wanted < 1:
                raise RequestError(
                    f"max_length is {self.max_length} and the prompt is already {width} tokens wide. "
                    "Next step: raise max_length, or set max_new_tokens, which does not count the prompt"
                )
        else:
            return min(DEFAULT_NEW_TOKENS, context - length)
        if wanted > context - length:
            warnings.warn(
                f"{wanted} new tokens after a prompt of {length} exceed the model's context of {context}; "
                f"generation ends after {context - length}",
                stacklevel=5,
            )
        return min(wanted, context - length)

    def sampling(self, max_new_tokens: int, width: int, seed: int, begin: int = 0) -> SamplingParams:
        """The options of one row of `width` prompt tokens (padding included), as the engine takes them;
        `begin`: which new token is the first that isn't forced.

        Raises `RequestError` for options that Taut does not support.
        """
        self.require_supported()
        single = {ids[0]: bias for ids, bias in _sequences(self.sequence_bias).items() if len(ids) == 1}
        for token, bias in (self.logit_bias or {}).items():
            single[token] = single.get(token, 0.0) + bias
        least = max((self.min_length or 0) - width, 0) if self.min_new_tokens is None else self.min_new_tokens
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            greedy=not self.do_sample,
            temperature=_or(self.temperature, 1.0),
            top_k=_or(self.top_k, 0),
            top_p=_or(self.top_p, 1.0),
            min_p=_or(self.min_p, 0.0),
            typical_p=_or(self.typical_p, 1.0),
            epsilon_cutoff=_or(self.epsilon_cutoff, 0.0),
            eta_cutoff=_or(self.eta_cutoff, 0.0),
            # Beams need a token that does not end the row, whatever is cut.
            min_tokens_to_keep=1 if self.beams == 1 else 1 + max(len(self.eos_token_ids), 1),
            renormalize=bool(self.renormalize_logits),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            no_repeat_ngram_size=_or(self.no_repeat_ngram_size, 0),
            logit_bias=single,
            sequence_bias={i: bias for i, bias in _sequences(self.sequence_bias).items() if len(i) > 1},
            bad_words=tuple(tuple(word) for word in self.bad_words_ids or ()),
            suppress_tokens=tuple(self.suppress_tokens or ()),
            begin_suppress_tokens=tuple(self.begin_suppress_tokens or ()),
            begin_index=begin,
            seed=seed,
            min_new_tokens=least,
            eos_token_ids=self.eos_token_ids,
            stop_strings=self.stops,
            max_time=self.max_time,
        )


OPTIONS: tuple[str, ...] = tuple(option.name for option in fields(GenerationConfig) if option.name != "extra")


def check_known(name: str, also: Collection[str], also_near: Collection[str] = ()) -> None:
    """Raises `RequestError` unless `name` is an option of Taut or transformers, or one of `also`; it names
    the nearest of these and of `also_near`."""
    if name in OPTIONS or name in UNSUPPORTED or name in WITHOUT_EFFECT or name in also:
        return
    close = nearest(name, (*OPTIONS, *UNSUPPORTED, *also, *also_near))
    raise RequestError(f"unknown generation option {name!r}{close}")


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _key(token: Any) -> Any:
    """A JSON object's key as a token id."""
    return int(token) if isinstance(token, str) and token.isdecimal() else token


def _integer(least: int) -> tuple[str, Callable[[Any], bool]]:
    return f"an integer of at least {least}", lambda v: _is_int(v) and v >= least


def _number(expected: str, right: Callable[[float], bool]) -> tuple[str, Callable[[Any], bool]]:
    return f"a number {expected}", lambda v: _is_number(v) and math.isfinite(v) and right(v)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_ids(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(_is_int(i) for i in value)


_FLAG = ("True, False or None", lambda v: isinstance(v, bool))

RANGES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "max_new_tokens": _integer(1),
    "max_length": _integer(1),
    "min_new_tokens": _integer(0),
    "min_length": _integer(0),
    "max_time": _number("of seconds, more than 0", lambda v: v > 0),
    "do_sample": _FLAG,
    "temperature": _number("of at least 0 (more than 0 with do_sample)", lambda v: v >= 0),
    "top_k": ("an integer of at least 1, or 0 for all tokens", _integer(0)[1]),
    "top_p": _number("more than 0 and at most 1 (1 for all tokens)", lambda v: 0 < v <= 1),
    "min_p": _number("from 0 to 1", lambda v: 0 <= v <= 1),
    "typical_p": _number("more than 0 and at most 1 (1 for all tokens)", lambda v: 0 < v <= 1),
    "epsilon_cutoff": _number("of at least 0 and below 1 (0 for all tokens)", lambda v: 0 <= v < 1),
    "eta_cutoff": _number("of at least 0 and below 1 (0 for all tokens)", lambda v: 0 <= v < 1),
    "num_beams": _integer(1),
    "length_penalty": _number("that is finite", lambda v: True),
    "early_stopping": ("True, False or 'never'", lambda v: isinstance(v, bool) or v == "never"),
    "num_beam_groups": _integer(1),
    "diversity_penalty": _number("of at least 0", lambda v: v >= 0),
    "guidance_scale": _number("more than 0 (1 for none)", lambda v: v > 0),
    "repetition_penalty": _number("more than 0 (1 for none)", lambda v: v > 0),
    "presence_penalty": _number("that is finite", lambda v: True),
    "frequency_penalty": _number("that is finite", lambda v: True),
    "no_repeat_ngram_size": _integer(0),
    "encoder_repetition_penalty": _number("more than 0 (1 for none)", lambda v: v > 0),
    "encoder_no_repeat_ngram_size": _integer(0),
    "bad_words_ids": (
        "a list of token id lists, none of them empty",
        lambda v: isinstance(v, Sequence) and all(_is_ids(word) and len(word) > 0 for word in v),
    ),
    "suppress_tokens": ("a list of token ids", _is_ids),
    "begin_suppress_tokens": ("a list of token ids", _is_ids),
    "forced_bos_token_id": ("a token id", _is_int),
    "forced_eos_token_id": ("a token id or a list of them", lambda v: _is_int(v) or (_is_ids(v) and v)),
    "exponential_decay_length_penalty": (
        "(start, factor): a number of new tokens, and a factor more than 0",
        lambda v: isinstance(v, Sequence) and len(v) == 2 and _is_int(v[0]) and _is_number(v[1]) and v[1] > 0,
    ),
    "logit_bias": (
        "a dict of token id -> number",
        lambda v: isinstance(v, Mapping) and all(_is_int(k) and _is_number(b) for k, b in v.items()),
    ),
    "num_assistant_tokens": _integer(1),
    "prompt_lookup_num_tokens": _integer(1),
    "max_matching_ngram_size": _integer(1),
    "renormalize_logits": _FLAG,
    "seed": ("an integer, or one for each returned row", lambda v: _is_int(v) or _is_ids(v)),
    "num_return_sequences": _integer(1),
    "return_dict_in_generate": _FLAG,
    "output_scores": _FLAG,
    "output_logits": _FLAG,
    "logprobs": _integer(0),
    "use_cache": _FLAG,
    "pad_token_id": ("a token id", _is_int),
    "bos_token_id": ("a token id", _is_int),
    **dict.fromkeys(
        ("eos_token_id", "decoder_start_token_id"),
        ("a token id or a list of them", lambda v: _is_int(v) or _is_ids(v)),
    ),
}


def _stops(value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else tuple(value or ())
    if not all(isinstance(text, str) and text for text in stops):
        raise RequestError(f"stop_strings is {value!r}; expected a text or a list of texts, none empty")
    return stops


def _sequences(value: Any) -> dict[tuple[int, ...], float]:
    """`sequence_bias`, a dict of id tuples -> bias or a list of `[ids, bias]` pairs, as a dict."""
    try:
        pairs = value.items() if isinstance(value, Mapping) else [(ids, bias) for ids, bias in value or ()]
        found = {tuple(ids): bias for ids, bias in pairs}
    except (TypeError, ValueError):
        found = {(): 0.0}
    if not all(ids and _is_ids(ids) and _is_number(bias) for ids, bias in found.items()):
        raise RequestError(
            f"sequence_bias is {value!r}; expected {{(token ids): number}} or [[[token ids], number], ...]"
        )
    return found
