"""`transcribe`: `generate` of models that hear, window by window, as the authors of Whisper do it.

Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision", section 3.8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taut.batch import Batch, Source
from taut.engine.alignment import token_times
from taut.engine.beams import Beams
from taut.engine.call import IGNORED, REFUSED, TAKEN, engine_for, prepare, settled
from taut.engine.generate import check_streamed, serve
from taut.engine.generation import DEFAULT_NEW_TOKENS, OPTIONS, GenerationConfig
from taut.engine.output import GenerateOutput, Returned, rectangle, returned
from taut.engine.request import Request
from taut.engine.segments import compression_ratio, cut, mean_logprob
from taut.engine.sources import encoder_states
from taut.engine.spoken import beginnings, known
from taut.engine.streamers import Streamer
from taut.engine.timestamps import Timestamps
from taut.engine.together import check_assistant
from taut.errors import RequestError

SECONDS = 0.02  # a timestamp's; half of it is a frame's
FIRST, ALL = "first-segment", "all-segments"


@dataclass
class Wanted:
    """What `transcribe` takes beside the options of all models; None: what generation_config.json says."""

    return_timestamps: bool | None = None
    task: str | None = None
    language: str | Sequence[str] | None = None
    is_multilingual: bool | None = None
    prompt_ids: Any = None
    prompt_condition_type: str | None = None
    condition_on_prev_tokens: bool | None = None
    temperature: float | Sequence[float] | None = None
    compression_ratio_threshold: float | None = None
    logprob_threshold: float | None = None
    no_speech_threshold: float | None = None
    forced_decoder_ids: Sequence[Sequence[int | None]] | None = None
    return_segments: bool = False
    return_token_timestamps: bool | None = None
    monitor_progress: Callable[[Tensor], None] | None = None

    def over(self, config: GenerationConfig) -> Wanted:
        """With what the config says where this says nothing; `RequestError` for what doesn't go together."""
        names = (
            *("compression_ratio_threshold", "logprob_threshold", "no_speech_threshold"),
            *("condition_on_prev_tokens", "return_timestamps", "forced_decoder_ids"),
        )
        said = {name: known(config, name) for name in names if getattr(self, name) is None}
        found = replace(self, **said, prompt_condition_type=self.prompt_condition_type or FIRST)
        if found.prompt_condition_type not in (FIRST, ALL):
            raise RequestError(
                f"prompt_condition_type is {found.prompt_condition_type!r}; known: {FIRST}, {ALL}"
            )
        if found.prompt_condition_type == ALL and not found.condition_on_prev_tokens:
            raise RequestError(f"prompt_condition_type={ALL!r} needs condition_on_prev_tokens=True")
        if found.no_speech_threshold is not None and found.logprob_threshold is None:
            raise RequestError(
                f"no_speech_threshold is {found.no_speech_threshold} and logprob_threshold is not set: "
                "silence is what is unlikely as well. Next step: set logprob_threshold, such as -1.0"
            )
        if found.prompt_ids is not None:
            found.prompt_ids = torch.as_tensor(found.prompt_ids).flatten().tolist()
        return found


OWN = tuple(Wanted.__dataclass_fields__)


@dataclass
class Clip:
    """A row of the call: its frames, how many of these are done with, and what was said so far."""

    row: int
    frames: int
    start: list[int]
    conditioned: bool
    seek: int = 0
    segments: list[dict[str, Any]] = field(default_factory=list)
    draft: Tensor | None = None  # what the encoder of an assistant gives of the window

    @property
    def spoken(self) -> bool:
        return self.seek >= self.frames


@dataclass
class Said:
    """What a row made of its window."""

    tokens: list[int]  # with the end of the row
    ended: bool
    result: Any  # of the engine's call, and where its tokens begin there
    begins: int
    conditioned: bool = False
    skipped: bool = False
    times: list[float] | None = None


def transcribe(
    model: Any,
    input_features: Tensor | None,
    generation_config: GenerationConfig | None,
    *,
    attention_mask: Tensor | None = None,
    encoder_outputs: Any = None,
    streamer: Streamer | None = None,
    seed: int | Sequence[int] | None = None,
    **options: Any,
) -> Tensor | GenerateOutput | dict[str, Any]:
    """See `SpeechSeq2SeqLM.generate`, which documents it."""
    given = {name: options.pop(name) for name in OWN if name in options}
    functions = {name: options.pop(name) for name in FUNCTIONS if name in options}
    further = {name: options.pop(name) for name in (*TAKEN, *IGNORED, *REFUSED) if name in options}
    decoder_input_ids = further.pop("decoder_input_ids", None)
    if given.get("temperature") is None and options.get("do_sample"):
        given["temperature"] = 1.0
    config = settled(model, generation_config, options)
    states, features = _heard(model, input_features, encoder_outputs)
    wanted = Wanted(**given).over(config)
    call = Transcription(model, config, wanted, features, states, functions | further, seed, streamer)
    try:
        call.begin(attention_mask, decoder_input_ids)
        while call.step():
            pass
    except BaseException as error:
        if hasattr(streamer, "fail"):
            streamer.fail(error)
        raise
    if streamer is not None:
        streamer.end()
    return call.collect()


def detect_language(
    model: Any,
    input_features: Tensor | None,
    encoder_outputs: Any,
    generation_config: GenerationConfig | None,
) -> Tensor:
    """See `SpeechSeq2SeqLM.detect_language`."""
    config = settled(model, generation_config, {"max_new_tokens": 1})
    if not known(config, "lang_to_id"):
        raise RequestError("generation_config.json has no 'lang_to_id': the model knows one language alone")
    states, features = _heard(model, input_features, encoder_outputs)
    call = Transcription(model, config, Wanted(), features, states, {}, None, None)
    return torch.tensor(call.detect(call.first_states()), device=model.device)


FUNCTIONS = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "tokenizer")


def encoded(model: Any, windows: Sequence[Tensor]) -> Tensor:
    """An encoder's states of windows `[bins, frames]`, filled up with zeros: `[clips, tokens, dim]`."""
    whole = model.encoder.frames
    filled = torch.stack([F.pad(one, (0, whole - one.shape[1])) for one in windows])
    with torch.no_grad():
        batch, padding = model.encoder.pack(filled)
        return padding.unpack(model.packed(model.encoder, batch))


def _heard(
    model: Any, input_features: Tensor | None, encoder_outputs: Any
) -> tuple[Tensor | None, Tensor | None]:
    if (input_features is None) == (encoder_outputs is None):
        raise RequestError("give exactly one of input_features and encoder_outputs")
    if encoder_outputs is not None:
        return encoder_states(encoder_outputs, model.config.encoder.dim), None
    bins = model.config.encoder.mel_bins
    if not isinstance(input_features, Tensor) or input_features.dim() != 3 or input_features.shape[1] != bins:
        what = list(input_features.shape) if isinstance(input_features, Tensor) else type(input_features)
        raise RequestError(
            f"input_features is {what}; expected floats [clips, {bins}, frames], as a feature extractor gives"
        )
    return None, input_features


class Transcription:
    """One call of `transcribe`: its clips, and what was said of them so far."""

    def __init__(
        self,
        model: Any,
        config: GenerationConfig,
        wanted: Wanted,
        features: Tensor | None,
        states: Tensor | None,
        passed: dict[str, Any],
        seed: int | Sequence[int] | None,
        streamer: Streamer | None,
    ):
        self.model, self.config, self.wanted, self.passed = model, config, wanted, passed
        self.features, self.states, self.streamer = features, states, streamer
        self.assistant = self._checked(passed.pop("assistant_model", None))
        self.window = model.encoder.frames
        self.frames = features.shape[2] if features is not None else 2 * states.shape[1]
        self.rows = len(features if features is not None else states)
        long = self.frames > self.window
        silent = known(config, "no_timestamps_token_id")
        if long and wanted.return_timestamps is False:
            raise RequestError(
                f"input_features has {self.frames} frames, more than the {self.window} of a window, which "
                "takes timestamps to go on from. Next step: leave return_timestamps out, or cut the sound"
            )
        self.times = long or bool(wanted.return_timestamps)
        if self.times and silent is None:
            raise RequestError(_NO_TIMES)
        self.first_time = model.config.vocab_size + 1 if silent is None else silent + 1
        self.rules = None
        if self.times:
            ends = config.eos_token_ids or (config.bos_token_id,)
            initial = known(config, "max_initial_timestamp_index")
            self.rules = Timestamps(self.first_time, silent, ends[0], initial)
        self.clips: list[Clip] = []
        self.given: list[list[int]] | None = None
        self.heard: list[int] | None = None  # frames that are sound, where the caller says it
        self.max_length = config.max_length or DEFAULT_NEW_TOKENS
        self.seeds, self.steps = self._seeds(seed), 0
        self.last: GenerateOutput | None = None  # of the last window, where one call of the engine gave it

    def _checked(self, assistant: Any) -> Any:
        """The model that guesses; `RequestError` for one that can't hear what this one hears."""
        check_assistant(self.model, assistant, self.config)
        if assistant is None:
            return None
        if self.states is not None:
            raise RequestError(
                "encoder_outputs are states of the model's own encoder, and the assistant_model has another. "
                "Next step: pass input_features, or leave assistant_model out"
            )
        theirs, own = (one.config.encoder for one in (assistant, self.model))
        if (theirs.mel_bins, theirs.context) != (own.mel_bins, own.context):
            raise RequestError(
                f"assistant_model hears {theirs.mel_bins} mel bins at {theirs.context} positions, and the "
                f"model {own.mel_bins} at {own.context}. Next step: use one that takes the same features"
            )
        return assistant

    # ------------------------------------------------------------------------------------ before the first

    def begin(self, attention_mask: Tensor | None, decoder_input_ids: Any) -> None:
        """Make the clips, with what their decoder begins with."""
        frames = [self.frames] * self.rows
        if self.frames > self.window and self.rows > 1:
            if attention_mask is None:
                raise RequestError(
                    "several clips of more than a window need an attention_mask, which says where each ends. "
                    "Next step: call the feature extractor with return_attention_mask=True"
                )
            frames = torch.as_tensor(attention_mask).sum(-1).tolist()
        starts = beginnings(
            self.config,
            self.rows,
            language=self.wanted.language,
            task=self.wanted.task,
            multilingual=self.wanted.is_multilingual,
            times=self.times,
            forced=self.wanted.forced_decoder_ids,
            detect=lambda: self.detect(self.first_states()),
        )
        if attention_mask is not None:
            self.heard = torch.as_tensor(attention_mask).sum(-1).tolist()
        conditioned = bool(self.wanted.condition_on_prev_tokens)
        self.clips = [
            Clip(row, frames[row], starts[row], conditioned)
            for row in range(self.rows)
            for _ in range(self.config.num_return_sequences or 1)
        ]
        if self.streamer is not None:
            check_streamed(self.config.beams, len(self.clips))
        prompt = self.wanted.prompt_ids
        if prompt is not None and self.wanted.prompt_condition_type == FIRST:
            bare = prompt[1:] if prompt[:1] == [known(self.config, "prev_sot_token_id")] else prompt
            for clip in self.clips:
                clip.segments.append({"tokens": torch.tensor(bare, device=self.model.device)})
        if decoder_input_ids is not None:
            self.given = torch.as_tensor(decoder_input_ids).tolist()
            if len(self.given) != len(self.clips):
                raise RequestError(
                    f"decoder_input_ids has {len(self.given)} rows, and there are {len(self.clips)} clips"
                )

    def detect(self, states: Tensor) -> list[int]:
        """The token of the likeliest language of each clip, by `states` `[clips, tokens, dim]`."""
        languages = sorted(known(self.config, "lang_to_id").values())
        start = [[self.config.decoder_start_token_id]] * len(states)
        scores = self._scores(states, start)[:, languages]
        return [languages[at] for at in scores.argmax(-1).tolist()]

    def first_states(self) -> Tensor:
        if self.states is not None:
            return self.states
        return encoded(self.model, [self.features[row, :, : self.window] for row in range(self.rows)])

    def _seeds(self, seed: int | Sequence[int] | None) -> list[int] | int:
        seed = self.config.seed if seed is None else seed
        if seed is None:
            return int(torch.randint(2**62, ()))
        return seed if isinstance(seed, int) else list(seed)

    # ------------------------------------------------------------------------------------ one window

    def step(self) -> bool:
        """Transcribe the next window of every clip that isn't at its end; whether there was one."""
        clips = [clip for clip in self.clips if not clip.spoken]
        if not clips:
            return False
        if self.wanted.monitor_progress is not None:
            self.wanted.monitor_progress(torch.tensor([[clip.seek, clip.frames] for clip in self.clips]))
        frames = [min(clip.frames - clip.seek, self.window) for clip in clips]
        if self.states is None:
            parts = zip(clips, frames, strict=True)
            windows = [self.features[c.row, :, c.seek : c.seek + n] for c, n in parts]
            states = encoded(self.model, windows)
            if self.assistant is not None:
                for clip, heard in zip(clips, encoded(self.assistant, windows), strict=True):
                    clip.draft = heard
        else:
            states = self.states[[clip.row for clip in clips]]
        prompts = [self._prompt(clip) for clip in clips]
        if self.given is not None:
            prompts, self.given = self.given, None
        for clip, said, count in zip(clips, self._say(clips, prompts, states), frames, strict=True):
            clip.conditioned = said.conditioned
            done = count
            if not said.skipped:
                done = self._add(clip, said, count)
            clip.seek += done if self.states is None else count  # states are those of one window
        return True

    def _prompt(self, clip: Clip) -> list[int]:
        """What the decoder reads of this window before it says anything: what was said before, or the prompt,
        then the start."""
        before, prompt = self._before(clip), self.wanted.prompt_ids
        if before is not None:
            return before + clip.start
        return clip.start if prompt is None else prompt + clip.start

    def _before(self, clip: Clip) -> list[int] | None:
        if not clip.conditioned or not clip.segments:
            return None
        said: list[int] = []
        for segment in clip.segments:
            tokens = segment["tokens"].tolist()
            twice = len(tokens) > 2 and tokens[-2] >= self.first_time
            said += tokens[:-1] if twice else tokens
        said = said[-(self.model.config.context // 2 - 1) :]
        if self.wanted.prompt_ids is not None and self.wanted.prompt_condition_type == ALL:
            return self.wanted.prompt_ids + said
        marker = known(self.config, "prev_sot_token_id")
        suppressed = self.config.suppress_tokens
        if marker is None and suppressed is not None and len(suppressed) >= 2:
            marker = suppressed[-2]  # where older files have it
        return said if marker is None else [marker, *said]

    def _new_tokens(self, width: int) -> int:
        """Most tokens that may be said after prompts of `width`."""
        context = self.model.config.context
        if self.config.max_new_tokens is None:
            self.max_length = min(self.max_length + min(context // 2 - 1, width), context)
            new = self.max_length - width
        else:
            new = self.config.max_new_tokens
        if new < 1 or width + new > context:
            raise RequestError(
                f"the decoder begins with {width} tokens (start, prompt and what was said before), and {new} "
                f"new ones are asked for, while the model has {context} positions. Next step: shorten the "
                "prompt, or lower max_new_tokens"
            )
        return new

    def _say(self, clips: Sequence[Clip], prompts: list[list[int]], states: Tensor) -> list[Said]:
        """What is said of each window, at the first temperature at which it looks good."""
        wanted, width = self.wanted, max(map(len, prompts))
        found, new = [Said([], False, None, width)] * len(clips), self._new_tokens(width)
        silences = self._silences(clips, prompts, states)
        one = wanted.temperature is None or isinstance(wanted.temperature, (int, float))
        temperatures = [wanted.temperature] if one else list(wanted.temperature)
        left, heads = list(range(len(clips))), self._heads()
        for attempt, temperature in enumerate(temperatures):
            rows = self._run(
                [clips[at] for at in left], [prompts[at] for at in left], states[left], new, temperature
            )
            again = []
            for at, (row, request, result) in zip(left, rows, strict=True):
                retry, skipped = self._judge(row, request, temperature, silences[at])
                ends = bool(row.tokens) and row.tokens[-1] in self.config.eos_token_ids
                low = temperature is None or temperature < 0.5
                conditioned = bool(wanted.condition_on_prev_tokens) and low
                found[at] = Said(row.tokens, ends, result, width, conditioned, skipped)
                if retry and attempt + 1 < len(temperatures):
                    again.append(at)
            left = again
            if not left:
                break
        if heads is not None:
            parts = zip(found, prompts, states, clips, strict=True)
            for one, prompt, state, clip in parts:
                heard = None if self.heard is None else max((self.heard[clip.row] - clip.seek) // 2, 1)
                one.times = token_times(
                    self.model,
                    state,
                    prompt,
                    one.tokens,
                    heads,
                    smooth=self.model.config.source.get("median_filter_width", 7),
                    heard=heard,
                    seconds=SECONDS,
                )
        return found

    def _heads(self) -> Sequence[Sequence[int]] | None:
        """Those that look at the sound that a token is made of, where its time is asked for."""
        if not self.wanted.return_token_timestamps:
            return None
        heads = known(self.config, "alignment_heads")
        if not heads:
            raise RequestError(
                "return_token_timestamps=True needs 'alignment_heads', which generation_config.json lacks. "
                "Next step: take the file of a newer revision of the checkpoint, or set "
                "model.generation_config.alignment_heads"
            )
        return heads

    def _run(
        self,
        clips: Sequence[Clip],
        prompts: list[list[int]],
        states: Tensor,
        new: int,
        temperature: float | None,
    ) -> list[tuple[Returned, Request, Any]]:
        """One call of the engine: what it gave for each row, and what the caller is to see of that."""
        options = {name: getattr(self.config, name) for name in OPTIONS}
        options |= {"max_new_tokens": new, "max_length": None, "num_return_sequences": 1}
        options |= {"do_sample": bool(temperature), "temperature": temperature or 1.0}
        options["decoder_start_token_id"] = [prompt[0] for prompt in prompts]  # so that it isn't added again
        if temperature:
            options |= {"num_beams": 1, "seed": self._drawn(clips)}
        functions = {name: self.passed.get(name) for name in FUNCTIONS}
        options |= {name: value for name, value in self.passed.items() if name not in FUNCTIONS}
        call = prepare(
            self.model,
            None,
            attention_mask=None,
            generation_config=None,
            seed=None,
            options={**options, "encoder_outputs": states, "decoder_input_ids": prompts},
            **functions,
        )
        call.assistant = self.assistant
        for request, clip in zip(call.requests, clips, strict=True):
            request.draft_source = clip.draft
            request.params = replace(request.params, timestamps=self.rules)
            request.keep_scores |= self.wanted.logprob_threshold is not None
        serve(engine_for(self.model, [call]), call, self.streamer)
        self.steps += 1
        rows = returned(call.requests)
        if not self.config.return_dict_in_generate:
            results = call.collect()
        else:
            output = call.collect()
            self.last = output if len(clips) == len(self.clips) else None
            results = [_of_row(output, at) for at in range(len(rows))]
        return list(zip(rows, call.requests, results, strict=True))

    def _drawn(self, clips: Sequence[Clip]) -> list[int]:
        """A seed for each row of a call of the engine, another in each call."""
        places = [next(at for at, other in enumerate(self.clips) if other is clip) for clip in clips]
        if isinstance(self.seeds, int):
            firsts = [self.seeds + at * 0xD1342543DE82EF95 for at in places]
        elif len(self.seeds) != len(self.clips):
            raise RequestError(
                f"seed holds {len(self.seeds)} seeds for {len(self.clips)} rows; give one each"
            )
        else:
            firsts = [self.seeds[at] for at in places]
        return [(first + self.steps * 0x9E3779B97F4A7C15) % 2**63 for first in firsts]

    # ------------------------------------------------------------------------------------ how good it looks

    def _silences(self, clips: Sequence[Clip], prompts: list[list[int]], states: Tensor) -> list[float]:
        """How likely it is that nothing is said in each window."""
        if self.wanted.no_speech_threshold is None:
            return [0.0] * len(clips)
        token = self.first_time - 2  # ahead of the one that says that there are no times
        ahead = [
            prompt[: len(prompt) - len(clip.start) + 1] for clip, prompt in zip(clips, prompts, strict=True)
        ]
        return self._scores(states, ahead).softmax(-1)[:, token].tolist()

    def _scores(self, states: Tensor, prompts: list[list[int]]) -> Tensor:
        """Logits `[rows, vocab]` behind each prompt, beside its states."""
        rows, tokens = states.shape[:2]
        device = states.device
        starts = torch.arange(rows + 1, dtype=torch.int32, device=device) * tokens
        batch = replace(Batch.of(prompts, device), source=Source(states.flatten(0, 1), starts, tokens))
        with torch.no_grad():
            hidden = self.model.decoder(batch)
            return self.model.logits(hidden[batch.starts[1:].long() - 1])

    def _judge(
        self, row: Returned, request: Request, temperature: float | None, silence: float
    ) -> tuple[bool, bool]:
        """Whether a row is to be said again, and whether there is nothing to be said."""
        wanted, retry = self.wanted, False
        if wanted.compression_ratio_threshold is not None:
            ratio = compression_ratio(row.tokens, self.model.config.vocab_size)
            retry = ratio > wanted.compression_ratio_threshold
        if wanted.logprob_threshold is None:
            return retry, False
        scores = request.scores
        if isinstance(request.group, Beams):
            width = request.width
            scores = [step[beam % width] for step, beam in zip(scores, row.beams, strict=False)]
        unlikely = mean_logprob(row.tokens, scores, temperature or 0.0) < wanted.logprob_threshold
        if unlikely and wanted.no_speech_threshold is not None and silence > wanted.no_speech_threshold:
            return False, True
        return retry or unlikely, False

    # ------------------------------------------------------------------------------------ what comes of it

    def _add(self, clip: Clip, said: Said, frames: int) -> int:
        """Add the segments of a window, and give the frames that are done with."""
        kept = said.tokens[: len(said.tokens) - said.ended]
        pieces, done = cut(kept, self.first_time, frames)
        tokens = torch.tensor(kept, dtype=torch.int64, device=self.model.device)
        began = clip.seek * SECONDS / 2
        times = torch.tensor(said.times or (), dtype=torch.float32) + began
        for piece in pieces:
            start, end = (began + time * SECONDS for time in (piece.start, piece.end))
            clip.segments.append(
                {
                    "start": torch.tensor(start, dtype=torch.float64),
                    "end": torch.tensor(end, dtype=torch.float64),
                    "tokens": tokens[piece.first : piece.last],
                    "idxs": (said.begins + piece.first, said.begins + piece.last),
                    "result": said.result,
                }
            )
            if said.times is not None:
                clip.segments[-1]["token_timestamps"] = times[piece.first : piece.last]
        return done

    def collect(self) -> Tensor | GenerateOutput | dict[str, Any]:
        """What `generate` returns."""
        dicts = bool(self.config.return_dict_in_generate)
        timed = bool(self.wanted.return_token_timestamps)
        if dicts and not (timed or self.wanted.return_timestamps) and self.last is not None:
            return self.last
        prompted = self.wanted.prompt_ids is not None and self.wanted.prompt_condition_type == FIRST
        segments = [clip.segments[1:] if prompted else clip.segments for clip in self.clips]
        rows = [[token for one in own for token in one["tokens"].tolist()] for own in segments]
        sequences = rectangle(rows, self._pad(), torch.int64, self.model.device)
        if not (dicts or timed or self.wanted.return_segments):
            return sequences
        found: dict[str, Any] = {"sequences": sequences}
        if timed:
            found["token_timestamps"] = _filled(segments)
        if self.wanted.return_segments or dicts:
            found["segments"] = segments
        return found

    def _pad(self) -> int:
        pad, ends = self.config.pad_token_id, self.config.eos_token_ids
        return pad if pad is not None and pad >= 0 else ends[0] if ends else 0


_NO_TIMES = (
    "timestamps are asked for, and generation_config.json has no 'no_timestamps_token_id', behind which they "
    "are. Next step: take the file of a newer revision of the checkpoint, or set "
    "model.generation_config.no_timestamps_token_id"
)


def _filled(segments: Sequence[Sequence[dict[str, Any]]]) -> Tensor:
    """The times of all tokens of each clip, `[clips, tokens]`, filled up with the last."""
    rows = [[time for one in own for time in one["token_timestamps"].tolist()] for own in segments]
    longest = max(map(len, rows))
    return torch.tensor([row + [row[-1] if row else 0.0] * (longest - len(row)) for row in rows])


def _of_row(output: GenerateOutput, row: int) -> dict[str, Any]:
    """What an output says of one row."""
    found = {"sequences": output.sequences[row]}
    for name in ("sequences_scores", "beam_indices"):
        if output[name] is not None:
            found[name] = output[name][row]
    for name in ("scores", "logits"):
        if output[name] is not None:
            places = found["beam_indices"].tolist() if "beam_indices" in found else [row] * len(output[name])
            found[name] = [step[at] for step, at in zip(output[name], places, strict=False)]
    return found
