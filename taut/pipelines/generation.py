"""Texts and conversations continued, rewritten, summarized and translated."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from taut.engine.call import ARGUMENTS, TAKEN
from taut.engine.generation import GenerationConfig, check_known
from taut.engine.offline import Generated
from taut.errors import RequestError
from taut.pipelines.base import Piece, Pipeline, Settings
from taut.pipelines.text import TextPipeline, as_text

# Options that mean nothing to a model that draws no tokens.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
STEPS = ("output_scores", "output_logits")


@dataclass(frozen=True)
class GenerateSettings(Settings):
    """`generate`: the options of `generate` that were given, by name or together as `generate_kwargs`; a
    `generation_config` takes the place of those that the pipeline was made with."""

    generate: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationSettings(GenerateSettings):
    """`stop_sequence`: a text or several that end an answer, and are its end; `clean_up_tokenization_spaces`:
    of decoding; `truncation`: of the tokenizer; `return_tensors`: token ids instead of text. All other
    options are those of `generate`."""

    return_tensors: bool = False
    return_text: bool | None = None
    clean_up_tokenization_spaces: bool | None = None
    truncation: bool | str | None = None
    stop_sequence: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.return_tensors and self.return_text:
            raise RequestError("return_tensors and return_text are both given; a result is one of them")


class Generating(Pipeline):
    """What pipelines share that generate: their options. `fallbacks` hold where neither the caller nor the
    model's files say anything; `taken` are arguments of `generate` beside those of all models."""

    fallbacks: ClassVar[Mapping[str, Any]] = {}
    taken: ClassVar[tuple[str, ...]] = ()

    def __init__(self, model: Any, **options: Any):
        self.own: dict[str, Any] = {}  # options that the model's files have for the task alone
        super().__init__(model, **options)

    def parse(self, options: Mapping[str, Any], defaults: GenerateSettings) -> GenerateSettings:
        options = dict(options)
        options |= options.pop("generate_kwargs", None) or {}
        names = {option.name for option in fields(self.settings)} - {"generate"}
        wanted = {name: value for name, value in options.items() if name not in names}
        for name in wanted:
            check_known(name, (*ARGUMENTS, *TAKEN, *self.taken), names)
            if name in STEPS and wanted[name]:
                raise RequestError(f"{name} is for model.generate; a pipeline returns no scores of each step")
        before = {} if wanted.get("generation_config") is not None else defaults.generate
        mine = {name: value for name, value in options.items() if name in names}
        return replace(defaults, **mine, generate={**before, **wanted})

    def generation(self, settings: GenerateSettings) -> dict[str, Any]:
        """The options of `generate` for these settings."""
        wanted = dict(settings.generate)
        known = {**self._set(settings), **wanted}
        added = {
            name: value
            for name, value in self.fallbacks.items()
            if name not in known and not (name == "max_new_tokens" and "max_length" in known)
        }
        if not {**known, **added}.get("do_sample"):
            added = {name: value for name, value in added.items() if name not in SAMPLING}
        given = self._given(settings)
        return {**added, **{name: value for name, value in self.own.items() if name not in given}, **wanted}

    def _set(self, settings: GenerateSettings) -> dict[str, Any]:
        """The options that the model's files and the caller's `generation_config` set."""
        return {**self.model.generation_config.to_dict(), **self.own, **self._given(settings)}

    def _given(self, settings: GenerateSettings) -> dict[str, Any]:
        given = settings.generate.get("generation_config")
        return {} if given is None else given.to_dict()


class GeneratingPipeline(Generating, TextPipeline):
    """A pipeline that answers texts with texts: all prompts of a window go through the engine at once, which
    packs those that run and begins the next as others end."""

    settings = GenerationSettings
    budget = None
    window = 256

    def __init__(self, model: Any, **options: Any):
        self.prefix: str = model.config.source.get("prefix") or ""
        super().__init__(model, **options)

    def generation(self, settings: GenerationSettings) -> dict[str, Any]:
        stops = {} if settings.stop_sequence is None else {"stop_strings": settings.stop_sequence}
        return {**super().generation(settings), **stops}

    def check(self, settings: GenerationSettings) -> None:
        own = (*ARGUMENTS, *TAKEN)
        options = {name: value for name, value in settings.generate.items() if name not in own}
        GenerationConfig(**options).require_supported()

    def watched(
        self, pieces: Sequence[Piece], settings: GenerationSettings, done: Callable[[float], None]
    ) -> Sequence[Any]:
        """What was generated for each piece, a list of `Generated`, or the error that it ended with."""
        options = self.generation(settings) | {"return_dict_in_generate": True}
        rows = [piece.inputs["input_ids"] for piece in pieces]
        if options.get("streamer") is not None:
            return [self._streamed(row, options) for row in rows]
        options.pop("streamer", None)
        options = {"tokenizer": self.tokenizer, **options}
        try:
            found = self.model.generate_batch(rows, **options, progress=done, return_exceptions=True)
        except RequestError as error:
            if len(rows) > 1:  # it is found out whose it is
                raise
            raise RequestError(str(error).removeprefix("prompt 0: ")) from None
        return [[one] if isinstance(one, Generated) else one for one in found]

    def _streamed(self, row: Sequence[int], options: Mapping[str, Any]) -> list[Generated]:
        output = self.model.generate([row], **{"tokenizer": self.tokenizer, **options})
        width = 1 if self.model.config.encoder is not None else len(row)
        rows = output.sequences[:, width:].tolist()
        return [Generated(*one) for one in zip(rows, [None] * len(rows), output.finish_reasons, strict=True)]

    def decoded(self, tokens: Sequence[int], settings: GenerationSettings, *, skip: bool = True) -> str:
        return self.tokenizer.decode(
            tokens,
            skip_special_tokens=skip,
            clean_up_tokenization_spaces=settings.clean_up_tokenization_spaces,
        )

    def record(self, found: dict[str, Any], one: Generated, settings: GenerationSettings) -> dict[str, Any]:
        """`found`, with what else is known of an answer where it is asked for."""
        if settings.generate.get("return_dict_in_generate"):
            more = {"finish_reason": one.finish_reason, "score": one.score, "logprobs": one.logprobs}
            found |= {name: value for name, value in more.items() if value is not None}
        return found


@dataclass(frozen=True)
class TextGenerationSettings(GenerationSettings):
    """`return_full_text`: with the prompt before the answer; `prefix`: a text before each prompt, which the
    result leaves out; `handle_long_generation="hole"`: of a prompt that leaves no room for the answer, the
    beginning is left out; `continue_final_message`: whether the answer goes on with a conversation's last
    message (default: if that is the assistant's); `tools`, `documents`: for the chat template;
    `add_special_tokens`, `padding`, `tokenizer_encode_kwargs`: options of the tokenizer or the template;
    `skip_special_tokens`: of decoding."""

    return_full_text: bool | None = None
    prefix: str | None = None
    handle_long_generation: str | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    padding: bool | str | None = None
    skip_special_tokens: bool | None = None
    tokenizer_encode_kwargs: Mapping[str, Any] | None = None
    tools: Sequence[Any] | None = None
    documents: Sequence[Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.handle_long_generation not in (None, "hole"):
            raise RequestError(
                f"handle_long_generation is {self.handle_long_generation!r}; known: 'hole', or None"
            )
        if self.return_full_text is not None and (self.return_tensors or self.return_text is not None):
            raise RequestError(
                "return_full_text says what the text is; leave return_tensors and return_text out"
            )


class TextGeneration(GeneratingPipeline):
    """A text, or a conversation (a list of messages, `{"role", "content"}`), to `[{"generated_text"}]`: the
    text with what follows it, or the conversation with the answer; several where `num_return_sequences` says
    so. Where nothing else is said, at most 256 tokens are drawn, at a temperature of 0.7."""

    task = "text-generation"
    settings = TextGenerationSettings
    fallbacks: ClassVar[Mapping[str, Any]] = {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}

    def is_item(self, inputs: Any) -> bool:
        return _messages(inputs) is not None or super().is_item(inputs)

    def prepare_one(self, item: Any, settings: TextGenerationSettings) -> list[Piece]:
        options = {
            "add_special_tokens": settings.add_special_tokens,
            "truncation": settings.truncation,
            "padding": settings.padding,
            "max_length": settings.generate.get("max_length"),
        }
        options = {name: value for name, value in options.items() if value is not None}
        options |= settings.tokenizer_encode_kwargs or {}
        if (messages := _messages(item)) is not None:
            options.pop("add_special_tokens", None)
            goes_on = _goes_on(messages, settings)
            encoded = self.tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=not goes_on,
                continue_final_message=goes_on,
                tools=settings.tools,
                documents=settings.documents,
                return_dict=True,
                **options,
            )
        else:
            encoded = self.tokenizer(
                self._prefix(settings) + as_text(item, self.task), verbose=False, **options
            )
        ids = encoded["input_ids"]
        if "attention_mask" in encoded:
            ids = [token for token, real in zip(ids, encoded["attention_mask"], strict=True) if real]
        if settings.handle_long_generation == "hole":
            ids = self._with_hole(ids, settings)
        if len(ids) >= self.model.config.context:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and the model's context is {self.model.config.context}, "
                "which leaves no room for new ones; shorten it, or pass handle_long_generation='hole'"
            )
        shown = len(ids)  # what follows is the answer
        if not ids and self.model.generation_config.bos_token_id is not None:
            ids = [self.model.generation_config.bos_token_id]
        if not ids:
            raise RequestError(
                "the text is empty, and the model has no token that begins one; give some text"
            )
        return [_prompt(ids, shown)]

    def generation(self, settings: TextGenerationSettings) -> dict[str, Any]:
        options = super().generation(settings)
        if prefix := self._prefix(settings):  # a total length has to include the prefix
            special = bool(settings.add_special_tokens)
            longer = len(self.tokenizer(prefix, add_special_tokens=special, verbose=False)["input_ids"])
            known = {**self._set(settings), **options}
            for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
                if known.get(total) is not None and new not in known:
                    options[total] = known[total] + longer
        return options

    def finish(
        self, item: Any, pieces: Sequence[Piece], outputs: Sequence[Any], settings: TextGenerationSettings
    ) -> list[dict[str, Any]]:
        ids, shown = pieces[0].inputs["input_ids"], pieces[0].note
        records = []
        for one in outputs[0]:
            if settings.return_tensors:
                records.append(self.record({"generated_token_ids": [*ids, *one.tokens]}, one, settings))
                continue
            tokens = one.tokens if shown else [*ids, *one.tokens]
            text: Any = self.decoded(tokens, settings, skip=settings.skip_special_tokens is not False)
            if settings.return_full_text is not False:
                messages = _messages(item)
                if messages is None:
                    text = item + text
                elif _goes_on(messages, settings):
                    last = messages[-1]
                    text = [*messages[:-1], {**last, "content": last["content"] + text}]
                else:
                    text = [*messages, {"role": "assistant", "content": text}]
            records.append(self.record({"generated_text": text}, one, settings))
        return records

    def _prefix(self, settings: TextGenerationSettings) -> str:
        return self.prefix if settings.prefix is None else settings.prefix

    def _with_hole(self, ids: list[int], settings: TextGenerationSettings) -> list[int]:
        """The end of a prompt, as long as the answer leaves room."""
        known = {**self._set(settings), **self.generation(settings)}
        new = known.get("max_new_tokens")
        new = known["max_length"] - len(ids) if new is None else new
        most = min(self.tokenizer.model_max_length, self.model.config.context)
        if new < 0 or new >= most:
            raise RequestError(
                f"the answer is to have {new} tokens and the model's context is {most}, which leaves none to "
                "the prompt; ask for fewer new tokens"
            )
        return ids[-(most - new) :] if len(ids) + new > most else ids


class Text2TextGeneration(GeneratingPipeline):
    """A text to what an encoder-decoder makes of it, `[{"generated_text"}]`; of a list of texts with one
    answer each, a list of these. Where nothing else is said, at most 256 tokens by four beams. `prefix` of
    the model's `task_specific_params` comes before each text."""

    task = "text2text-generation"
    name: ClassVar[str] = "generated"
    fallbacks: ClassVar[Mapping[str, Any]] = {"max_new_tokens": 256, "num_beams": 4}

    def __init__(self, model: Any, *, task: str | None = None, **options: Any):
        super().__init__(model, task=task, **options)
        tasks = model.config.source.get("task_specific_params") or {}
        self.own = dict(tasks.get(self.task) or {})
        self.prefix = self.own.pop("prefix", None) or self.prefix

    def __call__(self, inputs: Any, **options: Any) -> Any:
        results = super().__call__(inputs, **options)
        if isinstance(inputs, (list, tuple)) and all(not isinstance(r, list) or len(r) == 1 for r in results):
            return [one[0] if isinstance(one, list) else one for one in results]
        return results

    def prepare_one(self, item: Any, settings: GenerationSettings) -> list[Piece]:
        text = self.prefix + as_text(item, self.task)
        encoding = self.encode([text], truncation=settings.truncation)[0]
        return [_prompt(self.piece(encoding).inputs["input_ids"])]

    def finish(
        self, item: Any, pieces: Sequence[Piece], outputs: Sequence[Any], settings: GenerationSettings
    ) -> list[dict[str, Any]]:
        if settings.return_tensors:
            begin = self.model.generation_config.decoder_start_token_id
            found = [{f"{self.name}_token_ids": [begin, *one.tokens]} for one in outputs[0]]
        else:
            found = [{f"{self.name}_text": self.decoded(one.tokens, settings)} for one in outputs[0]]
        return [self.record(*pair, settings) for pair in zip(found, outputs[0], strict=True)]


class Summarization(Text2TextGeneration):
    """A text to its summary, `[{"summary_text"}]`; otherwise as `Text2TextGeneration`."""

    task = "summarization"
    name = "summary"


@dataclass(frozen=True)
class TranslationSettings(GenerationSettings):
    """`src_lang`, `tgt_lang`: codes of the languages, for a model of several; by default what the task's name
    (`translation_en_to_fr`) and the tokenizer say."""

    src_lang: str | None = None
    tgt_lang: str | None = None


class Translation(Text2TextGeneration):
    """A text to its translation, `[{"translation_text"}]`; otherwise as `Text2TextGeneration`. The task may
    name the languages: `translation_en_to_fr`."""

    task = "translation"
    name = "translation"
    settings = TranslationSettings

    def check(self, settings: TranslationSettings) -> None:
        super().check(settings)
        self._languages(settings)

    def prepare_one(self, item: Any, settings: TranslationSettings) -> list[Piece]:
        source, _ = self._languages(settings)
        if source is None:
            return super().prepare_one(item, settings)
        with self.tokenizer.reading(source):
            return super().prepare_one(item, settings)

    def generation(self, settings: TranslationSettings) -> dict[str, Any]:
        options, (_, target) = super().generation(settings), self._languages(settings)
        if target is not None:
            options.setdefault("forced_bos_token_id", self.tokenizer.lang_code_to_id[target])
        return options

    def _languages(self, settings: TranslationSettings) -> tuple[str | None, str | None]:
        """The codes of the languages, None for a tokenizer that knows none."""
        named = re.fullmatch(r"translation_(.+)_to_(.+)", self.task)
        asked = settings.src_lang is not None or settings.tgt_lang is not None
        if not hasattr(self.tokenizer, "lang_code_to_id"):
            if asked:
                raise RequestError(
                    f"src_lang and tgt_lang are for models of several languages, and a "
                    f"{self.model.config.model_type} with this tokenizer has none to choose; leave them out"
                )
            return None, None
        source, target = settings.src_lang, settings.tgt_lang
        if named is not None and not asked:
            source, target = named.groups()
        source = self.tokenizer.src_lang if source is None else source
        target = self.tokenizer.tgt_lang if target is None else target
        if target is None and self.model.generation_config.forced_bos_token_id is None:
            raise RequestError(
                "translation needs tgt_lang; known: " + ", ".join(self.tokenizer.lang_code_to_id)
            )
        return self._code("src_lang", source), None if target is None else self._code("tgt_lang", target)

    def _code(self, name: str, given: str) -> str:
        """A language's code, which "en" is too where only one begins so."""
        known = self.tokenizer.lang_code_to_id
        found = [given] if given in known else [code for code in known if code.startswith(f"{given}_")]
        if len(found) != 1:
            raise RequestError(f"{name} is {given!r}; known: {', '.join(known)}")
        return found[0]


def _prompt(ids: list[int], note: Any = None) -> Piece:
    """A prompt, which the engine puts in its place by its length: of no size, prompts stay in their order, so
    that a seed means the same for each however they are sorted."""
    return Piece({"input_ids": ids}, 0, note)


def _messages(item: Any) -> list[Mapping[str, Any]] | None:
    """The messages of a conversation, None if `item` is none."""
    item = getattr(item, "messages", item)
    chat = (
        isinstance(item, (list, tuple)) and item and all(isinstance(o, Mapping) and "role" in o for o in item)
    )
    return list(item) if chat else None


def _goes_on(messages: Sequence[Mapping[str, Any]], settings: TextGenerationSettings) -> bool:
    """Whether the answer goes on with the last message."""
    asked = settings.continue_final_message
    return messages[-1].get("role") == "assistant" if asked is None else bool(asked)
