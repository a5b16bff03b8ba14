"""`generate` and `stream`: from padded prompts to requests, through an engine, and back."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taut.engine.engine import Engine
from taut.engine.generation import GenerationConfig, check_known
from taut.engine.prompts import read_prompts
from taut.engine.request import Request
from taut.engine.resident import Resident
from taut.engine.sampler import NothingLeft
from taut.engine.stops import RowText, StopRow
from taut.engine.stream import Stream, reason
from taut.engine.streamers import Streamer
from taut.errors import RequestError

# transformers' arguments of `generate` that are not options, with what to do in Taut.
REFUSED: Mapping[str, str] = {
    "assistant_model": "assisted decoding is not supported; without it the output is the same, only slower",
    "custom_generate": "custom generation code is not run",
    "encoder_outputs": "encoder-decoder models are not supported",
    "inputs_embeds": "generation starts from token ids; pass input_ids",
    "negative_prompt_ids": "guidance is not supported",
    "negative_prompt_attention_mask": "guidance is not supported",
    "past_key_values": "the cache is made and freed by each call; pass the whole prompt as input_ids",
    "position_ids": "positions follow from attention_mask; leave position_ids out",
}
ARGUMENTS = (
    "input_ids", "inputs", "attention_mask", "generation_config", "logits_processor", "stopping_criteria",
    "prefix_allowed_tokens_fn", "streamer", "tokenizer",
)  # fmt: skip
IGNORED = ("synced_gpus", "trust_remote_code", "use_model_defaults", "labels")


@dataclass
class GenerateOutput:
    """What `generate(return_dict_in_generate=True)` returns.

    | field | meaning |
    |---|---|
    | `sequences` | `[rows, width + new]` int64: the given rows, padding included, then the new tokens |
    | `scores`, `logits` | with `output_scores` / `output_logits`: for each step `[rows, vocab]` float32, \
processed / raw; a row that has ended holds 0 for the pad token and -inf for all others |
    | `finish_reasons` | one a row: "stop", "length", "stop_string", "time" or "cancelled" |
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    finish_reasons: tuple[str, ...] = ()

    def __getitem__(self, key: str | int) -> Any:
        return getattr(self, key if isinstance(key, str) else self.keys()[key])

    def keys(self) -> list[str]:
        """Names of the fields that are there."""
        return [name for name in self.__dataclass_fields__ if getattr(self, name) is not None]


def generate(
    model: Any,
    input_ids: Tensor | Sequence[Sequence[int]] | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    inputs: Tensor | Sequence[Sequence[int]] | None = None,
    attention_mask: Tensor | None = None,
    logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] | None = None,
    stopping_criteria: Sequence[Callable[..., Any]] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, Tensor], Sequence[int]] | None = None,
    streamer: Streamer | None = None,
    tokenizer: Any = None,
    seed: int | Sequence[int] | None = None,
    **kwargs: Any,
) -> Tensor | GenerateOutput:
    """Continues each row of `input_ids`.

    `input_ids`: `[rows, width]` integers, padded left, right or anywhere as `attention_mask` says, or lists
    of token ids of any length. Masked tokens are dropped, so a row gives what it gives alone. Without a
    mask, pad tokens are masked where the pad token is not also an end-of-sequence token. Without
    `input_ids`, a row starts from the BOS token.

    Options come from `kwargs` (any field of `GenerationConfig`), then `generation_config`, then the
    model's own, then transformers' defaults.

    Rows are processed one by one by the user's functions: `logits_processor` entries get
    (ids `[1, length]` without padding, scores `[1, vocab]`) and return scores; `stopping_criteria` entries
    get (the row as it would be returned `[1, width + new]`, its scores so far or None) and return a bool
    or a bool tensor; `prefix_allowed_tokens_fn` gets (row, ids `[length]`) and returns the tokens allowed
    next. Classes of transformers work as they are.

    `stop_strings` need `tokenizer`; a row ends with the token that completes one. `seed` (an int, or one
    for each returned row) fixes what `do_sample` draws; without it, it comes from torch's default
    generator. `streamer` gets the prompt and then the tokens of a single row.

    Returns `[rows * num_return_sequences, width + new]` int64 on the device of `input_ids`: the rows as
    given, then the new tokens, rows that ended early filled up with the pad token; or a `GenerateOutput`
    with `return_dict_in_generate`. Raises `RequestError` for what can't be served and `NumericsError`
    where logits are not finite.
    """
    call = _prepare(
        model,
        input_ids if input_ids is not None else inputs,
        both=input_ids is not None and inputs is not None,
        attention_mask=attention_mask,
        generation_config=generation_config,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
        tokenizer=tokenizer,
        seed=seed,
        options=kwargs,
    )
    if streamer is not None and len(call.requests) != 1:
        raise RequestError(
            f"a streamer shows one row, but the call makes {len(call.requests)}; generate rows one by one "
            "with a streamer each, or leave the streamer out"
        )
    try:
        _run(Resident.of(model).engine(model, call.requests), call, streamer)
    except BaseException as error:
        if hasattr(streamer, "fail"):
            streamer.fail(error)
        raise
    if streamer is not None:
        streamer.end()
    return call.collect()


def stream(
    model: Any,
    input_ids: Tensor | Sequence[Sequence[int]] | None = None,
    generation_config: GenerationConfig | None = None,
    *,
    attention_mask: Tensor | None = None,
    logits_processor: Sequence[Callable[[Tensor, Tensor], Tensor]] | None = None,
    stopping_criteria: Sequence[Callable[..., Any]] | None = None,
    tokenizer: Any = None,
    skip_special_tokens: bool = True,
    seed: int | None = None,
    **kwargs: Any,
) -> Stream:
    """Continues one row and gives it piece by piece: text where `tokenizer` is given, else token ids.

    The result is an iterator and an asynchronous iterator (`for`, or `async for`, which runs each step in
    a thread). Closing it, or leaving the loop, frees its pages. Arguments are those of `generate`; what is
    wrong with them is raised here, before the first piece.
    """
    call = _prepare(
        model,
        input_ids,
        attention_mask=attention_mask,
        generation_config=generation_config,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        tokenizer=tokenizer,
        seed=seed,
        options=kwargs,
    )
    if len(call.requests) != 1:
        raise RequestError(f"stream gives one row, but the call makes {len(call.requests)}; use generate")
    text = RowText(tokenizer, call.config.stops, skip_special_tokens) if tokenizer is not None else None
    return Stream(Resident.of(model).engine(model, call.requests), call.requests[0], text, model)


# -- running -------------------------------------------------------------------------------------------


def _run(engine: Engine, call: _Call, streamer: Streamer | None) -> None:
    """Serves the call's requests to their end; on any error, all are cancelled. Other threads may have
    requests in the engine too, and their steps move these along."""
    if streamer is not None:
        if hasattr(streamer, "stop_at"):
            streamer.stop_at(call.config.stops)
        streamer.put(call.given.cpu())
    left, shown = call.requests, 0
    try:
        for request in call.requests:
            engine.submit(request)
        while left:
            engine.step_for(left[0], len(left[0].output))
            left = [request for request in left if not request.finished]
            for row, request in enumerate(call.requests):
                if isinstance(request.error, NothingLeft):
                    raise NothingLeft([row])  # it was sampled alone, as row 0
                if request.error is not None:
                    raise request.error
            if streamer is not None:
                for token in call.requests[0].output[shown:]:
                    streamer.put(torch.tensor([token]))
                    shown += 1
                if getattr(streamer, "closed", False):
                    return
    finally:
        for request in call.requests:
            engine.cancel(request)


# -- from arguments to requests and back ---------------------------------------------------------------


@dataclass
class _Call:
    """One call of `generate`: `given [rows, width]` (each row once a returned sequence), its requests."""

    given: Tensor
    requests: list[Request]
    config: GenerationConfig
    pad: int | None

    def collect(self) -> Tensor | GenerateOutput:
        longest = max(len(request.output) for request in self.requests)
        pad = self._pad(any(len(request.output) < longest for request in self.requests))
        new = [request.output + [pad] * (longest - len(request.output)) for request in self.requests]
        tail = torch.tensor(new, dtype=torch.int64, device=self.given.device).view(len(new), longest)
        sequences = torch.cat((self.given, tail), dim=1)
        if not self.config.return_dict_in_generate:
            return sequences
        scores = logits = None
        if self.config.output_scores:
            scores = self._steps([request.scores for request in self.requests], longest, pad)
            if self.config.renormalize_logits:
                scores = tuple(step.log_softmax(dim=-1) for step in scores)
        if self.config.output_logits:
            logits = self._steps([request.logits for request in self.requests], longest, pad)
        return GenerateOutput(sequences, scores, logits, tuple(map(reason, self.requests)))

    def _steps(self, kept: list[list[Tensor]], longest: int, pad: int) -> tuple[Tensor, ...]:
        """Kept `[vocab]` rows as one `[rows, vocab]` a step."""
        if not longest:
            return ()
        some = next(row[0] for row in kept if row)
        over = torch.full_like(some, -torch.inf)
        if 0 <= pad < over.shape[0]:
            over[pad] = 0.0
        return tuple(
            torch.stack([row[step] if step < len(row) else over for row in kept]) for step in range(longest)
        )

    def _pad(self, needed: bool) -> int:
        if self.pad is not None:
            return self.pad
        ends = self.config.eos_token_ids
        if needed:
            warnings.warn(
                "pad_token_id is not set: rows that ended early are filled up with "
                + (f"the end-of-sequence token {ends[0]}" if ends else "0")
                + "; pass pad_token_id to choose another",
                stacklevel=5,
            )
        return ends[0] if ends else 0


def _prepare(
    model: Any,
    inputs: Any,
    *,
    attention_mask: Any,
    generation_config: GenerationConfig | None,
    logits_processor: Any,
    stopping_criteria: Any,
    tokenizer: Any,
    seed: int | Sequence[int] | None,
    options: dict[str, Any],
    prefix_allowed_tokens_fn: Any = None,
    both: bool = False,
) -> _Call:
    """Everything about a call that can be wrong is found here."""
    if both:
        raise RequestError("input_ids and inputs are both given; they mean the same: pass one")
    _check_arguments(options)
    options = {name: value for name, value in options.items() if name not in IGNORED}
    types = options.pop("token_type_ids", None)
    if types is not None and bool(torch.as_tensor(types).any()):
        raise RequestError("token_type_ids are not all 0, but the model has no token types; leave them out")
    if seed is not None:
        options["seed"] = seed
    config = _config(model, generation_config, options)

    pad = config.pad_token_id if config.pad_token_id is not None and config.pad_token_id >= 0 else None
    if inputs is None:
        if config.bos_token_id is None:
            raise RequestError(
                "no input_ids, and the model has no BOS token to start from. Next step: pass input_ids, or "
                "bos_token_id"
            )
        inputs = [[config.bos_token_id]]
    given, prompts = read_prompts(
        inputs,
        attention_mask,
        pad=pad,
        ends=config.eos_token_ids,
        vocab=model.config.vocab_size,
        device=torch.device(model.device),
    )

    copies = config.num_return_sequences or 1
    if copies > 1 and not config.do_sample:
        raise RequestError(
            f"num_return_sequences is {copies} with greedy decoding, where all would be the same. "
            "Next step: set do_sample=True"
        )
    seeds = _seeds(config, len(prompts) * copies)
    if config.stops and tokenizer is None:
        raise RequestError(
            f"stop_strings={list(config.stops)} are matched on text. Next step: pass tokenizer= to generate"
        )
    given = given.repeat_interleave(copies, dim=0)
    processors = _listed("logits_processor", logits_processor)
    criteria = _listed("stopping_criteria", stopping_criteria)
    keep = bool(config.return_dict_in_generate)
    width, context = given.shape[1], model.config.context
    requests = []
    for index, row_seed in enumerate(seeds):
        prompt = prompts[index // copies]
        allowed = ()
        if prefix_allowed_tokens_fn is not None:
            allowed = (functools.partial(_only_allowed, prefix_allowed_tokens_fn, index // copies),)
        text = RowText(tokenizer, config.stops, skip_special_tokens=False) if config.stops else None
        requests.append(
            Request(
                prompt=list(prompt),
                params=config.sampling(config.new_tokens(width, len(prompt), context), width, row_seed),
                logits_processors=(*allowed, *processors),
                should_stop=StopRow(text, criteria, given[index : index + 1]) if text or criteria else None,
                keep_scores=keep and bool(config.output_scores),
                keep_logits=keep and bool(config.output_logits),
                scope=None if config.use_cache is False else (),
            )
        )
    return _Call(given, requests, config, pad)


def _check_arguments(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name in REFUSED:
            if value is not None:
                raise RequestError(f"generate got {name}: {REFUSED[name]}")
        elif name not in IGNORED and name != "token_type_ids":
            check_known(name, (), also_near=ARGUMENTS)


def _config(model: Any, given: Any, options: dict[str, Any]) -> GenerationConfig:
    """The call's config: options, then the config given with the call, then the model's, then defaults."""
    if given is None:
        given = GenerationConfig()
    elif not isinstance(given, GenerationConfig):
        if not callable(getattr(given, "to_dict", None)):
            raise RequestError(f"generation_config is a {type(given).__name__}; expected a GenerationConfig")
        values = given.to_dict()  # transformers' own class
        given = GenerationConfig.from_dict({k: v for k, v in values.items() if v is not None})
    options = {name: value for name, value in options.items() if name not in REFUSED}
    base = model.generation_config or GenerationConfig()
    config = given.over(base, **options)
    config.require_supported()
    fallback = {
        "eos_token_id": list(model.config.eos_token_ids) or None,
        "bos_token_id": model.config.bos_token_id,
        "pad_token_id": model.config.pad_token_id,
    }
    for name, value in fallback.items():
        if getattr(config, name) is None and name not in options:
            setattr(config, name, value)
    if config.max_new_tokens is not None and "max_length" in options and options["max_length"] is not None:
        warnings.warn(
            f"max_new_tokens={config.max_new_tokens} and max_length={config.max_length} are both set; "
            "max_new_tokens wins",
            stacklevel=5,
        )
    if config.max_new_tokens is None and config.max_length is None:
        warnings.warn(
            "neither max_new_tokens nor max_length is set: at most 20 tokens are generated", stacklevel=5
        )
    return config


def _listed(name: str, functions: Any) -> tuple[Callable[..., Any], ...]:
    """A list of functions (or one of them) as a tuple."""
    if functions is None:
        return ()
    listed = tuple(functions) if isinstance(functions, (list, tuple)) else (functions,)
    for function in listed:
        if not callable(function):
            raise RequestError(f"{name} holds {function!r}, which can't be called")
    return listed


def _seeds(config: GenerationConfig, count: int) -> list[int]:
    """One seed for each returned row: as given, or derived from (seed, index); the first is the seed."""
    seed = config.seed
    if not config.do_sample:
        return [0] * count
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    if isinstance(seed, int):
        # Steps of a large odd number: seeds of a call never meet, and the sampler hashes them.
        return [(seed + index * 0xD1342543DE82EF95) % 2**64 for index in range(count)]
    if len(seed) != count:
        raise RequestError(
            f"seed holds {len(seed)} seeds for {count} returned rows; give one each, or an int"
        )
    return list(seed)


def _only_allowed(
    allowed: Callable[[int, Tensor], Sequence[int]], row: int, ids: Tensor, scores: Tensor
) -> Tensor:
    """A logits processor that bars what `allowed(row, ids [length])` does not return."""
    tokens = allowed(row, ids[0])
    tokens = tokens if isinstance(tokens, Tensor) else torch.tensor(list(tokens), dtype=torch.int64)
    if tokens.numel() == 0:
        raise RequestError(f"prefix_allowed_tokens_fn allows no token for row {row} after {ids[0].tolist()}")
    barred = torch.ones_like(scores, dtype=torch.bool)
    barred[:, tokens.to(scores.device)] = False
    return scores.masked_fill(barred, -torch.inf)
