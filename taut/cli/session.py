"""A loaded model and its tokenizer, as the commands use them: prompts to ids, ids to streamed text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from taut.auto import AnyLanguageModel
from taut.cli.facts import Clock, Facts
from taut.engine.generate import stream
from taut.engine.generation import GenerationConfig
from taut.engine.stream import Stream
from taut.errors import TokenizerError
from taut.hub import default_model, resolve
from taut.modeling import CausalLM, Seq2SeqLM
from taut.quant.config import named
from taut.tokenizer import AutoTokenizer, Tokenizer


@dataclass(frozen=True)
class Options:
    """What `generate` and `chat` were asked for; None: what the model's own files say."""

    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None
    local_files_only: bool = False
    load_in: str | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0

    @staticmethod
    def of(parameters: Mapping[str, Any]) -> Options:
        """The options among a command's parameters."""
        known = {field.name for field in fields(Options)}
        given = {name: value for name, value in parameters.items() if name in known}
        return Options(**{**given, "stop": tuple(given.get("stop") or ())})

    def generation(self) -> GenerationConfig:
        """The options as `generate` takes them; `RequestError` for a value out of range.

        A temperature of 0 means the likeliest token each time. Any other option of sampling asks for
        sampling.
        """
        shaping = (self.temperature, self.top_p, self.top_k, self.min_p)
        sample = None if all(value is None for value in shaping) else self.temperature != 0
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=sample,
            temperature=self.temperature or None,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop_strings=self.stop or None,
            seed=self.seed,
        )


class Answer:
    """The text of one answer, piece by piece as it becomes final, and its times on `clock`. `close()` stops
    it and frees its cache."""

    def __init__(self, stream: Stream):
        request = stream.request
        self.stream = stream
        self.clock = Clock(len(request.prompt if request.source is None else request.source))

    def __iter__(self) -> Iterator[str]:
        output = self.stream.request.output
        self.clock.start()
        for piece in self.stream:
            self.clock.reach(len(output))
            yield piece
        self.clock.reach(len(output))

    def close(self) -> None:
        self.stream.close()


class Session:
    """A model and its tokenizer, loaded once."""

    def __init__(self, name: str, model: CausalLM | Seq2SeqLM, tokenizer: Tokenizer, load_seconds: float):
        self.name = Path(name).name if Path(name).exists() else name
        self.model, self.tokenizer, self.load_seconds = model, tokenizer, load_seconds

    @staticmethod
    def load(model: str | None, options: Options) -> Session:
        """Loads `model`, or the default one. Options are checked first, so that a wrong one costs nothing;
        errors are those of the hub, the files, the tokenizer and the options."""
        options.generation()
        packing = None if options.load_in is None else named(options.load_in)
        name = model or default_model()
        started = time.perf_counter()
        path = resolve(name, revision=options.revision, local_files_only=options.local_files_only)
        tokenizer = AutoTokenizer.from_pretrained(str(path))
        loaded = AnyLanguageModel.from_pretrained(
            str(path), dtype=options.dtype, device_map=options.device, quantization_config=packing
        )
        return Session(name, loaded, tokenizer, time.perf_counter() - started)

    def need_chat_template(self, what: str) -> None:
        """Raises `TokenizerError` when the model can't hold a conversation, which `what` needs."""
        if not self.tokenizer.chat_template:
            raise TokenizerError(
                f"{self.name} has no chat template, which {what} needs; continue plain text instead "
                "(taut generate), or use an instruction-tuned model"
            )

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins."""
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    def raw_ids(self, text: str) -> list[int]:
        """Token ids of `text` as it is, with the special tokens that the tokenizer puts around a text."""
        return self.tokenizer.encode(text)

    def answer(
        self, ids: list[int], options: Options, new_tokens: int, response_format: Any = None
    ) -> Answer:
        """The continuation of `ids`, or what an encoder-decoder says to them, of a format if one is given: at
        most `options.max_new_tokens`, or `new_tokens` when that is unset, and never more than the context
        holds. It comes as it is found, so without beams, whatever the model's files say. `RequestError` for a
        prompt that leaves no room."""
        if options.max_new_tokens is None:
            used = len(ids) if self.model.config.encoder is None else 1
            room = self.model.config.context - used
            options = replace(options, max_new_tokens=max(1, min(new_tokens, room)))
        return Answer(
            stream(
                self.model,
                [ids],
                generation_config=options.generation(),
                num_beams=1,
                tokenizer=self.tokenizer,
                response_format=response_format,
            )
        )

    def facts(self, clock: Clock) -> Facts:
        return Facts.of(self.load_seconds, str(self.model.device), clock)
