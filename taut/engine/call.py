"""`Call`: what is asked of `generate`, as requests; everything about it that can be wrong is found here."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taut.engine.beams import Beams
from taut.engine.draft_model import Assistant
from taut.engine.drafts import Drafter
from taut.engine.dynamic_cache import DynamicCache
from taut.engine.engine import Engine
from taut.engine.generation import GenerationConfig, check_known
from taut.engine.grammar import Constraint, ForcedTokens
from taut.engine.guidance import Guidance
from taut.engine.lookup import Lookup
from taut.engine.output import GenerateOutput, rectangle, returned, steps
from taut.engine.processors import Forced, LengthDecay, Read, ReadNgrams
from taut.engine.prompts import read_prompts
from taut.engine.request import Group, LogitsProcessor, Request
from taut.engine.resident import Resident
from taut.engine.sources import read_beginnings, read_sources
from taut.engine.stops import RowText, StopRow
from taut.engine.together import check_assistant, check_encoder, check_past, check_together
from taut.errors import RequestError

# transformers' arguments of `generate` that are not options, with what to do in Taut.
REFUSED: Mapping[str, str] = {
    "assistant_tokenizer": "an assistant_model guesses in the model's own tokens; use one of its tokenizer",
    "custom_generate": "custom generation code is not run",
    "inputs_embeds": "generation starts from token ids; pass input_ids",
    "position_ids": "positions follow from attention_mask; leave position_ids out",
}
ARGUMENTS = (
    "input_ids", "inputs", "attention_mask", "generation_config", "logits_processor", "stopping_criteria",
    "prefix_allowed_tokens_fn", "streamer", "tokenizer",
)  # fmt: skip
OF_ENCODERS = ("decoder_input_ids", "decoder_attention_mask", "encoder_outputs")
TAKEN = (
    *OF_ENCODERS,
    "assistant_model",
    "past_key_values",
    "response_format",
    "token_type_ids",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)
IGNORED = ("synced_gpus", "trust_remote_code", "use_model_defaults", "labels")


@dataclass
class Call:
    """One call of `generate`: the rows as `given` `[prompts, width]`, and the requests that they make."""

    given: Tensor
    requests: list[Request]
    config: GenerationConfig
    pad: int | None
    past: DynamicCache | None = None
    assistant: Any = None

    def collect(self) -> Tensor | GenerateOutput:
        """What `generate` returns, once all requests have finished."""
        rows, config = returned(self.requests), self.config
        tokens = [row.tokens for row in rows]
        pad = self._pad(min(map(len, tokens)) < max(map(len, tokens)))
        device = self.given.device
        given = self.given.repeat_interleave(len(rows) // len(self.given), dim=0)
        sequences = torch.cat((given, rectangle(tokens, pad, torch.int64, device)), dim=1)
        if self.past is not None:
            each = len(rows) // len(self.requests)
            prompts = [self.requests[at // each].prompt for at in range(len(rows))]
            whole = [[*prompt, *new][:-1] for prompt, new in zip(prompts, tokens, strict=True)]
            self.past.become(whole, sequences.shape[1] - 1)
        if not config.return_dict_in_generate:
            return sequences
        output = GenerateOutput(sequences, finish_reasons=tuple(row.reason for row in rows))
        output.past_key_values = self.past
        if config.output_scores:
            output.scores = steps([request.scores for request in self.requests], pad)
            if config.renormalize_logits:
                output.scores = tuple(step.log_softmax(dim=-1) for step in output.scores)
        if config.output_logits:
            output.logits = steps([request.logits for request in self.requests], pad)
        if config.beams > 1:
            output.beam_indices = rectangle([row.beams for row in rows], -1, torch.int32, device)
            if config.output_scores:
                output.sequences_scores = torch.tensor([row.score for row in rows], device=device)
        if config.logprobs is not None:
            output.logprobs = tuple(request.token_logprobs for request in self.requests)
        return output

    def _pad(self, needed: bool) -> int:
        if self.pad is not None:
            return self.pad
        ends = self.config.eos_token_ids
        if needed:
            given = self.config.pad_token_id
            why = "not set" if given is None else f"{given}, which is no token"
            warnings.warn(
                f"pad_token_id is {why}: rows that ended early are filled up with "
                + (f"the end-of-sequence token {ends[0]}" if ends else "0")
                + "; pass pad_token_id to choose another",
                stacklevel=5,
            )
        return ends[0] if ends else 0


def prepare(
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
    first: int = 0,
) -> Call:
    """Everything about a call that can be wrong is found here. `first`: the place of its first row among all
    that share its seed."""
    if both:
        raise RequestError("input_ids and inputs are both given; they mean the same: pass one")
    _check_arguments(options)
    options = {name: value for name, value in options.items() if name not in IGNORED}
    types = options.pop("token_type_ids", None)
    if types is not None and bool(torch.as_tensor(types).any()):
        raise RequestError("token_type_ids are not all 0, but the model has no token types; leave them out")
    if seed is not None:
        options["seed"] = seed
    negative = options.pop("negative_prompt_ids", None), options.pop("negative_prompt_attention_mask", None)
    assistant, past = options.pop("assistant_model", None), options.pop("past_key_values", None)
    response_format = options.pop("response_format", None)
    beginning = {name: options.pop(name, None) for name in OF_ENCODERS}
    config = settled(model, generation_config, options)
    check_assistant(model, assistant, config)
    check_together(config, negative[0] is not None)
    check_encoder(model, config, assistant, beginning)

    pad = config.pad_token_id if config.pad_token_id is not None and config.pad_token_id >= 0 else None
    if inputs is None and beginning["encoder_outputs"] is None:
        if config.bos_token_id is None:
            raise RequestError(
                "no input_ids, and the model has no BOS token to start from. Next step: pass input_ids, or "
                "bos_token_id"
            )
        inputs = [[config.bos_token_id]]
    read = functools.partial(
        read_prompts,
        pad=pad,
        ends=config.eos_token_ids,
        vocab=model.config.vocab_size,
        device=torch.device(model.device),
    )
    sources: list[Any] = []
    if model.config.encoder is None:
        given, prompts = read(inputs, attention_mask)
    else:
        given, prompts, sources = _pairs(model, config, inputs, attention_mask, read, **beginning)
    negatives: list[list[int]] = [[]]
    if negative[0] is not None:
        _, negatives = read(*negative, name="negative_prompt_ids")
        if len(negatives) not in (1, len(prompts)):
            raise RequestError(
                f"negative_prompt_ids has {len(negatives)} rows for {len(prompts)} prompts; give one each, "
                "or one for all"
            )

    check_past(past, prompts, config)
    # Beams return several rows of one request.
    copies = 1 if config.beams > 1 else config.num_return_sequences or 1
    seeds = _seeds(config, len(prompts) * copies, first * copies)
    if config.stops and tokenizer is None:
        raise RequestError(
            f"stop_strings={list(config.stops)} are matched on text. Next step: pass tokenizer= to generate"
        )
    if response_format is not None and tokenizer is None:
        raise RequestError("response_format is about text. Next step: pass tokenizer= to generate")
    processors = _listed("logits_processor", logits_processor)
    criteria = _listed("stopping_criteria", stopping_criteria)
    keep = bool(config.return_dict_in_generate)
    width, context = given.shape[1], model.config.context
    forced = config.forced_bos_token_id is not None
    requests = []
    for index, row_seed in enumerate(seeds):
        row = index // copies
        prompt = prompts[row]
        new = config.new_tokens(width, len(prompt), context)
        allowed = ()
        if prefix_allowed_tokens_fn is not None:
            allowed = (functools.partial(_only_allowed, prefix_allowed_tokens_fn, row),)
        read = sources[row] if sources else prompt
        text = RowText(tokenizer, config.stops, skip_special_tokens=False) if config.stops else None
        stop = StopRow(text, criteria, given[row : row + 1]) if text or criteria else None
        requests.append(
            Request(
                prompt=list(prompt),
                params=config.sampling(new, width, row_seed, int(len(prompt) == 1 and forced)),
                logits_processors=(*allowed, *_own_processors(config, len(prompt), new, read), *processors),
                should_stop=stop,
                logprobs=config.logprobs,
                keep_scores=keep and bool(config.output_scores),
                keep_logits=keep and bool(config.output_logits),
                constraint=_constraint(response_format, tokenizer, model, config),
                group=_group(config, negatives[row % len(negatives)]),
                source=sources[row] if sources else None,
                scope=None if config.use_cache is False else (),
            )
        )
    if past is None and keep and config.use_cache is not False:
        past = DynamicCache()
    return Call(given, requests, config, pad, past, assistant)


def engine_for(model: Any, calls: Sequence[Call]) -> Engine:
    """The model's engine, with room for what calls of the same options ask for."""
    requests = [request for call in calls for request in call.requests]
    _give_drafters(model, requests, calls[0].assistant, calls[0].config)
    return Resident.of(model).engine(model, requests)


def _pairs(
    model: Any,
    config: GenerationConfig,
    inputs: Any,
    attention_mask: Any,
    read: Callable[..., tuple[Tensor, list[list[int]]]],
    *,
    decoder_input_ids: Any,
    decoder_attention_mask: Any,
    encoder_outputs: Any,
) -> tuple[Tensor, list[list[int]], list[Any]]:
    """What the decoder begins with, padded and without padding, and what the encoder reads."""
    encoder = model.config.encoder
    sources = read_sources(
        inputs,
        attention_mask,
        encoder_outputs,
        dim=encoder.dim,
        read=functools.partial(read, vocab=encoder.vocab_size),
    )
    given, prompts = read_beginnings(
        config,
        len(sources),
        decoder_input_ids,
        decoder_attention_mask,
        device=inputs.device if isinstance(inputs, Tensor) else torch.device(model.device),
        # Its start token often is the pad token.
        read=functools.partial(read, pad=None, ends=()),
    )
    return given, prompts, sources


def _give_drafters(model: Any, requests: list[Request], assistant: Any, config: GenerationConfig) -> None:
    """Let the call's rows be guessed for, if it asks for that."""
    drafter: Drafter | None = None
    if assistant is not None:
        drafts = Resident.of(assistant).draft_model(assistant, requests)
        drafter = Assistant(drafts, assistant, config.num_assistant_tokens)
    elif config.prompt_lookup_num_tokens is not None:
        encoder, most = model.config.encoder, config.prompt_lookup_num_tokens
        same = encoder is not None and encoder.vocab_size == model.config.vocab_size
        drafter = Lookup(most, config.max_matching_ngram_size or 2, source=same)
    for request in requests:
        request.drafter = drafter
        if drafter is None and request.constraint is not None and request.group is None:
            request.drafter = ForcedTokens()


def _constraint(given: Any, tokenizer: Any, model: Any, config: GenerationConfig) -> Constraint | None:
    if given is None or (isinstance(given, Mapping) and given.get("type") == "text"):
        return None
    return Constraint(tokenizer, given, vocab=model.config.vocab_size, ends=config.eos_token_ids)


def _group(config: GenerationConfig, negative: list[int]) -> Group | None:
    """What makes several rows of a request."""
    if config.beams > 1:
        return Beams(
            config.beams,
            returned=config.num_return_sequences or 1,
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
            groups=config.num_beam_groups or 1,
            diversity_penalty=config.diversity_penalty or 0.0,
        )
    return Guidance(config.guidance_scale, negative) if config.guided else None


def _own_processors(config: GenerationConfig, prompt: int, new: int, read: Any) -> list[LogitsProcessor]:
    """Those of options that few calls have, for a row of `prompt` tokens and at most `new` more; `read`: what
    its encoder reads, or the prompt itself."""
    made: list[LogitsProcessor] = []
    size, penalty = config.encoder_no_repeat_ngram_size, config.encoder_repetition_penalty
    if (size or penalty not in (None, 1.0)) and isinstance(read, Tensor):
        raise RequestError(
            "encoder_no_repeat_ngram_size and encoder_repetition_penalty are about the tokens that the "
            "encoder read, and the call has its states alone. Next step: pass input_ids for encoder_outputs"
        )
    if penalty not in (None, 1.0):
        made.append(Read(penalty, read))
    if size:
        made.append(ReadNgrams(size, read))
    first = config.forced_bos_token_id
    if first is not None:
        made.append(Forced(1, (first,)))
    if config.forced_end:
        made.append(Forced(prompt + new - 1, config.forced_end))
    if config.exponential_decay_length_penalty is not None and config.eos_token_ids:
        start, factor = config.exponential_decay_length_penalty
        made.append(LengthDecay(prompt + start, factor, config.eos_token_ids))
    return made


def _check_arguments(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name in REFUSED:
            if value is not None:
                raise RequestError(f"generate got {name}: {REFUSED[name]}")
        elif name not in (*IGNORED, *TAKEN):
            check_known(name, (), also_near=(*ARGUMENTS, *TAKEN))


def settled(model: Any, given: Any, options: dict[str, Any]) -> GenerationConfig:
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
        "decoder_start_token_id": model.config.decoder_start_token_id,
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


def _seeds(config: GenerationConfig, count: int, first: int) -> list[int]:
    """One seed for each returned row: as given, or derived from (seed, `first` + index); number 0 is the
    seed."""
    seed = config.seed
    if not config.do_sample:
        return [0] * count
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    if isinstance(seed, int):
        # Steps of a large odd number: seeds of a call never meet, and the sampler hashes them.
        return [(seed + index * 0xD1342543DE82EF95) % 2**64 for index in range(first, first + count)]
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
