"""What can't be had together in a call of `generate`, each by name and before the first step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from taut.engine.dynamic_cache import DynamicCache
from taut.engine.generation import GenerationConfig
from taut.errors import RequestError


def check_encoder(model: Any, config: GenerationConfig, assistant: Any, beginning: Mapping[str, Any]) -> None:
    """Raises `RequestError` for what only encoder-decoders take, and what they don't."""
    given = next((name for name, value in beginning.items() if value is not None), None)
    if model.config.encoder is None:
        if given is not None:
            raise RequestError(f"generate got {given}, and a {model.config.model_type} has no encoder")
        return
    if config.guided:
        raise RequestError(
            f"guidance_scale is {config.guidance_scale}, which is for decoders: beside a source, a prompt to "
            "move away from is not defined. Next step: leave it out"
        )
    if assistant is not None and beginning["encoder_outputs"] is not None:
        raise RequestError(
            "encoder_outputs are states of the model's own encoder, and the assistant_model reads token ids. "
            "Next step: pass input_ids, or leave assistant_model out"
        )


def check_past(past: Any, prompts: list[list[int]], config: GenerationConfig) -> None:
    """Raises `RequestError` unless the prompts go on from the rows of `past`."""
    if past is None:
        return
    if not isinstance(past, DynamicCache):
        raise RequestError(
            f"past_key_values is a {type(past).__name__}; expected what an earlier call gave, or an empty "
            "taut.DynamicCache()"
        )
    if config.use_cache is False:
        raise RequestError("past_key_values is given and use_cache is False; leave out one of the two")
    if past.tokens is None:
        raise RequestError(
            "past_key_values holds embeddings, and generation starts from token ids. Next step: go on from "
            "it with the model's forward"
        )
    if past.tokens and len(past.tokens) != len(prompts):
        raise RequestError(f"past_key_values has {len(past.tokens)} rows, and input_ids {len(prompts)}")
    for row, (known, prompt) in enumerate(zip(past.tokens, prompts, strict=False)):
        if prompt[: len(known)] == known:
            continue
        pairs = enumerate(zip(known, prompt, strict=False))
        at = next((at for at, (ours, given) in pairs if ours != given), len(prompt))
        if at == 0 or len(prompt) <= len(known):
            raise RequestError(
                f"row {row} of input_ids does not go on from past_key_values: they differ at token {at} of "
                f"{len(known)}. Next step: pass the whole row, from its first token, as input_ids; or leave "
                "past_key_values out, which changes no token"
            )
        # A chat template may write a turn otherwise than it was generated.
        warnings.warn(
            f"row {row} of input_ids leaves past_key_values at token {at} of {len(known)}; what follows is "
            "computed anew",
            stacklevel=5,
        )


def check_assistant(model: Any, assistant: Any, config: GenerationConfig) -> None:
    """Raises `RequestError` for guesses that can't be made."""
    lookup = config.prompt_lookup_num_tokens
    if assistant is None and lookup is None:
        return
    asked = "assistant_model" if assistant is not None else "prompt_lookup_num_tokens"
    if assistant is not None and lookup is not None:
        raise RequestError(
            f"assistant_model and prompt_lookup_num_tokens={lookup} both guess; give one of them"
        )
    if config.beams > 1 or config.guided:
        other = f"num_beams={config.beams}" if config.beams > 1 else f"guidance_scale={config.guidance_scale}"
        raise RequestError(f"{asked} guesses for single rows and does not go together with {other}")
    if assistant is None:
        return
    if not hasattr(assistant, "decoder") or not hasattr(assistant, "logits"):
        raise RequestError(
            f"assistant_model is a {type(assistant).__name__}; expected a model of "
            "taut.AutoModelForCausalLM.from_pretrained"
        )
    if (assistant.config.encoder is None) != (model.config.encoder is None):
        kinds = (
            f"{one.config.model_type} {'without' if one.config.encoder is None else 'with'} an encoder"
            for one in (assistant, model)
        )
        raise RequestError(
            f"assistant_model is a {next(kinds)} and the model a {next(kinds)}. Next step: use a smaller "
            "model of the same family, or prompt_lookup_num_tokens"
        )
    sizes = [(assistant.config.vocab_size, model.config.vocab_size)]
    if model.config.encoder is not None:
        sizes.append((assistant.config.encoder.vocab_size, model.config.encoder.vocab_size))
    for theirs, own in sizes:
        if theirs != own:
            raise RequestError(
                f"assistant_model has {theirs} tokens in its vocabulary and the model {own}: they can't "
                "share a tokenizer. Next step: use a smaller model of the same family, or "
                "prompt_lookup_num_tokens"
            )


def check_together(config: GenerationConfig, negative: bool) -> None:
    """Raises `RequestError` for options that are right each and can't be had together."""
    copies, beams, groups = config.num_return_sequences or 1, config.beams, config.num_beam_groups or 1
    if beams == 1:
        if copies > 1 and not config.do_sample:
            raise RequestError(
                f"num_return_sequences is {copies} with greedy decoding, where all would be the same. "
                "Next step: set do_sample=True, or num_beams to at least as many"
            )
        if groups > 1:
            raise RequestError(f"num_beam_groups is {groups} without beams. Next step: set num_beams")
    if negative and not config.guided:
        raise RequestError("negative_prompt_ids need guidance_scale, which is not set")
    if config.diversity_penalty and groups == 1:
        raise RequestError(
            f"diversity_penalty is {config.diversity_penalty} with one group of beams, which has no other to "
            "differ from. Next step: set num_beam_groups"
        )
    if beams > 1 and config.guided:
        raise RequestError(f"num_beams={beams} and guidance_scale={config.guidance_scale} don't go together")
    if beams > 1 and config.logprobs is not None:
        raise RequestError(
            "logprobs are kept of single rows. Next step: of beams, ask for output_scores and "
            "return_dict_in_generate"
        )
    if groups > 1 and config.do_sample:
        raise RequestError(f"num_beam_groups={groups} and do_sample=True: groups of beams are not drawn")
    if groups > 1 and not config.diversity_penalty:
        raise RequestError(
            f"num_beam_groups is {groups} and diversity_penalty 0, so that all groups would be the same. "
            "Next step: set diversity_penalty to more than 0"
        )
