"""`generate` and `stream`: from prompts to requests, through the model's engine, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from taut.engine.call import Call, engine_for, prepare
from taut.engine.engine import Engine
from taut.engine.generation import GenerationConfig
from taut.engine.output import GenerateOutput
from taut.engine.sampler import NothingLeft
from taut.engine.stops import RowText
from taut.engine.stream import Stream
from taut.engine.streamers import Streamer
from taut.errors import RequestError


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
    with `return_dict_in_generate`. With `num_beams`, the best sequences of each prompt, the best first.

    `response_format` says what the text of a row must be, and needs `tokenizer`: `{"type": "json_schema",
    "schema": ...}`, `{"type": "json_object"}`, `{"type": "regex", "regex": ...}` or `{"type": "grammar",
    "grammar": ...}`; the row ends when it is complete (`taut.engine.grammar`).

    `guidance_scale` moves each row away from what the model says after `negative_prompt_ids` (as `input_ids`,
    a row each or one for all; without them, after the prompt's last token).

    Raises `RequestError` for what can't be served and `NumericsError` where logits are not finite.
    """
    call = prepare(
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
    if streamer is not None:
        check_streamed(call.config.beams, len(call.requests))
    try:
        serve(engine_for(model, [call]), call, streamer)
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
    call = prepare(
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
    if call.config.beams > 1:
        raise RequestError(f"num_beams is {call.config.beams}, but beams are known at the end; use generate")
    if len(call.requests) != 1:
        raise RequestError(f"stream gives one row, but the call makes {len(call.requests)}; use generate")
    text = RowText(tokenizer, call.config.stops, skip_special_tokens) if tokenizer is not None else None
    return Stream(engine_for(model, [call]), call.requests[0], text, model)


def check_streamed(beams: int, rows: int) -> None:
    """Raises `RequestError` for a call whose tokens a streamer can't show."""
    if beams > 1:
        raise RequestError(
            f"a streamer shows tokens as they come, and with num_beams={beams} they are known at the end. "
            "Next step: leave one of the two out"
        )
    if rows != 1:
        raise RequestError(
            f"a streamer shows one row, but the call makes {rows}; generate rows one by one with a streamer "
            "each, or leave the streamer out"
        )


# -- running -------------------------------------------------------------------------------------------


def serve(engine: Engine, call: Call, streamer: Streamer | None = None) -> None:
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
