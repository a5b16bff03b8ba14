"""`generate_batch`: a whole set of prompts, as fast as the engine gets through it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taut.engine.call import Call, engine_for, prepare
from taut.engine.engine import Engine
from taut.engine.generation import GenerationConfig
from taut.engine.output import Returned, returned
from taut.engine.request import Request, TokenLogprobs
from taut.errors import RequestError

# Requests that wait in the engine's queue at a time, beside those that run.
AHEAD = 512


@dataclass(frozen=True)
class Generated:
    """One answer of `generate_batch(return_dict_in_generate=True)`: its new tokens, their text where there is
    a tokenizer, why it ended, and what was asked to be kept of it."""

    tokens: list[int]
    text: str | None
    finish_reason: str | None
    score: float | None = None
    logprobs: list[TokenLogprobs] | None = None


def generate_batch(
    model: Any,
    prompts: Sequence[Any],
    generation_config: GenerationConfig | None = None,
    *,
    tokenizer: Any = None,
    skip_special_tokens: bool = True,
    seed: int | None = None,
    return_exceptions: bool = False,
    progress: bool | Callable[[float], None] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Continues each of `prompts`, however many there are, and gives the answers in their order.

    A prompt is a text, a conversation (a list of messages, for the chat template) or token ids; the first two
    need `tokenizer`. An answer is its text where there is a tokenizer, else its new token ids; a list of
    answers where `num_return_sequences` asks for several; a `Generated` with `return_dict_in_generate`.

    All options are those of `generate`. The longest prompts run first, so that the last rows to end are short
    ones; a seed gives the same answers in any order. `progress`: a bar on the terminal; default: only if
    stderr is one; or a function that is called with how many more prompts are answered. What is wrong with
    any prompt is raised before the first runs; what fails while it runs is raised too, or stands in its place
    where `return_exceptions` is set.
    """
    rows = _token_ids(prompts, tokenizer)
    if not rows:
        return []
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    calls = []
    for index, row in enumerate(rows):
        try:
            calls.append(
                prepare(
                    model,
                    [row],
                    attention_mask=None,
                    generation_config=generation_config,
                    logits_processor=kwargs.get("logits_processor"),
                    stopping_criteria=kwargs.get("stopping_criteria"),
                    prefix_allowed_tokens_fn=kwargs.get("prefix_allowed_tokens_fn"),
                    tokenizer=tokenizer,
                    seed=seed,
                    options={name: value for name, value in kwargs.items() if name not in _FUNCTIONS},
                    first=index,
                )
            )
        except RequestError as error:
            raise RequestError(f"prompt {index}: {error}") from None
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
    longest = [calls[index] for index in order]
    shares = len(rows) / sum(len(call.requests) for call in calls)  # a prompt may be several requests
    with _bar(progress, len(rows), shares) as report:
        _serve(engine_for(model, longest), longest, report, return_exceptions)
    answers = [_answer(call, tokenizer, skip_special_tokens) for call in calls]
    return answers


_FUNCTIONS = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")


def _token_ids(prompts: Sequence[Any], tokenizer: Any) -> list[list[int]]:
    if isinstance(prompts, (str, Mapping)) or not hasattr(prompts, "__iter__"):
        raise RequestError(f"prompts is a {type(prompts).__name__}; expected a list of prompts")
    rows = []
    for index, prompt in enumerate(prompts):
        chat = isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], Mapping)
        if (chat or isinstance(prompt, str)) and tokenizer is None:
            raise RequestError(f"prompt {index} is {'a conversation' if chat else 'a text'}: pass tokenizer=")
        if chat:
            rows.append(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
        elif isinstance(prompt, str):
            rows.append(tokenizer.encode(prompt))
        else:
            rows.append(prompt.tolist() if isinstance(prompt, Tensor) else list(prompt))
    return rows


def _serve(engine: Engine, calls: Sequence[Call], report: Any, return_exceptions: bool) -> None:
    """Run the calls' requests in order, not all in the queue at once; on an error, cancel those there are."""
    coming = iter([request for call in calls for request in call.requests])
    under_way: list[Request] = []
    try:
        while True:
            while len(under_way) < AHEAD and (request := next(coming, None)) is not None:
                under_way.append(engine.submit(request))
            if not under_way:
                return
            engine.step_for(under_way[0], len(under_way[0].output))
            ended = [request for request in under_way if request.finished]
            if not ended:
                continue
            under_way = [request for request in under_way if not request.finished]
            for request in ended:
                if request.error is not None and not return_exceptions:
                    raise request.error
            report(len(ended), sum(len(request.output) for request in ended))
    finally:
        for request in under_way:
            engine.cancel(request)


def _answer(call: Call, tokenizer: Any, skip_special_tokens: bool) -> Any:
    """What one prompt gave."""
    failed = next((request.error for request in call.requests if request.error is not None), None)
    if failed is not None:
        return failed

    def shown(row: Returned, request: Request) -> Any:
        text = None
        if tokenizer is not None:
            text = tokenizer.decode(row.tokens, skip_special_tokens=skip_special_tokens)
        if not call.config.return_dict_in_generate:
            return row.tokens if text is None else text
        score = row.score if call.config.beams > 1 else None
        kept = request.token_logprobs if call.config.logprobs is not None else None
        return Generated(row.tokens, text, row.reason, score, kept)

    rows = returned(call.requests)
    each = len(rows) // len(call.requests)
    answers = [shown(row, call.requests[at // each]) for at, row in enumerate(rows)]
    return answers if (call.config.num_return_sequences or 1) > 1 else answers[0]


@contextmanager
def _bar(wanted: bool | Callable[[float], None] | None, total: int, shares: float) -> Iterator[Any]:
    """What tells a bar, or a function, that so many requests are done, each a share of a prompt."""
    if callable(wanted):
        yield lambda done, tokens: wanted(done * shares)
        return
    if wanted is False or (wanted is None and not sys.stderr.isatty()):
        yield lambda done, tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = ("Generating", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, rate="")
        made = 0

        def report(done: int, tokens: int) -> None:
            nonlocal made
            made += tokens
            passed = bar.tasks[0].elapsed or 1e-9
            bar.update(task, advance=done * shares, rate=f"{made / passed:.0f} tok/s")

        yield report
