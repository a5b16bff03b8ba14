"""What is asked of the engine (`SamplingParams`, `Request`), and the rows of tokens that it computes."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from taut.engine.timestamps import Timestamps
from taut.errors import RequestError

if TYPE_CHECKING:
    from taut.engine.drafts import Drafter
    from taut.engine.grammar import Constraint

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SamplingParams:
    """How one row is continued and when it ends; checked on construction.

    | field | meaning |
    |---|---|
    | `max_new_tokens` | most tokens to generate, at least 1 |
    | `greedy` | take the most likely token; otherwise draw one |
    | `temperature` | divides the logits of a draw; more than 0 |
    | `top_k` | draw among the k most likely tokens; 0 for all |
    | `top_p`, `min_p`, `typical_p` | nucleus, relative-probability and typical cuts; off at 1, 0 and 1 |
    | `epsilon_cutoff`, `eta_cutoff` | least probability, fixed and by entropy; off at 0 |
    | `repetition_penalty` | divides logits of tokens already there (multiplies negative ones) |
    | `presence_penalty`, `frequency_penalty` | subtracted from logits of generated tokens, once / per count |
    | `no_repeat_ngram_size` | no n-gram of this size occurs twice; 0 for off |
    | `logit_bias` | token id -> number added to its logit |
    | `sequence_bias` | token ids -> number added to the last one's logit where the others came just before |
    | `bad_words` | token sequences that may not be generated |
    | `suppress_tokens` | tokens that may not be generated |
    | `begin_suppress_tokens`, `begin_index` | tokens that may not be the `begin_index`-th, counted from 0 |
    | `timestamps` | how tokens that are times may follow one another |
    | `seed` | the row's draws depend on this and the step alone |
    | `min_tokens_to_keep` | draw among at least so many, whatever the cuts |
    | `renormalize` | scores of beams are log-probabilities again after processors and cuts |
    | `min_new_tokens` | no end-of-sequence token before so many tokens |
    | `eos_token_ids` | tokens that end the row; the token itself is part of the output |
    | `stop_strings` | texts that end the row |
    | `max_time` | seconds from submission after which the row ends; None for no limit |

    Raises `RequestError` for a value out of range.
    """

    max_new_tokens: int
    greedy: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    min_tokens_to_keep: int = 1
    renormalize: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    sequence_bias: Mapping[tuple[int, ...], float] = field(default_factory=dict)
    bad_words: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    begin_index: int = 0
    timestamps: Timestamps | None = None
    seed: int = 0
    min_new_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    max_time: float | None = None

    def __post_init__(self) -> None:
        _integer("max_new_tokens", self.max_new_tokens, 1)
        _integer("min_new_tokens", self.min_new_tokens, 0)
        _integer("top_k", self.top_k, 0)
        _integer("min_tokens_to_keep", self.min_tokens_to_keep, 1)
        _integer("no_repeat_ngram_size", self.no_repeat_ngram_size, 0)
        _integer("seed", self.seed, None)
        if self.greedy:
            _number("temperature", self.temperature, "at least 0", lambda v: v >= 0)
        else:
            _number("temperature", self.temperature, "more than 0 (0 is do_sample=False)", lambda v: v > 0)
        _number("top_p", self.top_p, "more than 0 and at most 1", lambda v: 0 < v <= 1)
        _number("min_p", self.min_p, "from 0 to 1", lambda v: 0 <= v <= 1)
        _number("typical_p", self.typical_p, "more than 0 and at most 1", lambda v: 0 < v <= 1)
        for name in ("epsilon_cutoff", "eta_cutoff"):
            _number(name, getattr(self, name), "of at least 0 and below 1", lambda v: 0 <= v < 1)
        _number("repetition_penalty", self.repetition_penalty, "more than 0", lambda v: v > 0)
        _number("presence_penalty", self.presence_penalty, "any finite number", lambda v: True)
        _number("frequency_penalty", self.frequency_penalty, "any finite number", lambda v: True)
        if self.max_time is not None:
            _number("max_time", self.max_time, "more than 0 seconds, or None", lambda v: v > 0)
        for name in ("eos_token_ids", "suppress_tokens", "begin_suppress_tokens"):
            object.__setattr__(self, name, _token_ids(name, getattr(self, name)))
        words = tuple(_token_ids("bad_words", word) for word in self.bad_words)
        if not all(words):
            raise RequestError("bad_words holds an empty sequence; each needs at least one token id")
        object.__setattr__(self, "bad_words", words)
        bias = dict(zip(_token_ids("logit_bias", self.logit_bias), self.logit_bias.values(), strict=True))
        _biases("logit_bias", bias)
        object.__setattr__(self, "logit_bias", MappingProxyType(bias))
        sequences = {_token_ids("sequence_bias", ids): value for ids, value in self.sequence_bias.items()}
        if () in sequences:
            raise RequestError("sequence_bias holds an empty sequence; each needs at least one token id")
        _biases("sequence_bias", sequences)
        object.__setattr__(self, "sequence_bias", MappingProxyType(sequences))
        stops = tuple(self.stop_strings)
        if not all(isinstance(text, str) and text for text in stops):
            raise RequestError(f"stop_strings is {self.stop_strings!r}; each needs to be a text, not empty")
        object.__setattr__(self, "stop_strings", stops)


class Status(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class TokenLogprobs(NamedTuple):
    """The model's own log-probability of a token that was generated, before any option or processor, and of
    the likeliest tokens in its place, the best first: `(token id, log-probability)`."""

    logprob: float
    top: list[tuple[int, float]]


class Row:
    """Tokens of a prompt and what follows them, and where their keys are: a request itself, or a `Branch`.
    `request` is the one that it is a row of."""

    request: Request
    prompt: list[int]
    output: list[int]
    computed: int
    pages: list[int]
    found: int
    indexed: int | None
    source: tuple[int, ...] | Tensor | None
    source_pages: list[int]

    @property
    def length(self) -> int:
        """Tokens of prompt and output together."""
        return len(self.prompt) + len(self.output)

    @property
    def pending(self) -> int:
        """Tokens whose keys are not cached yet."""
        return len(self.prompt) + len(self.output) - self.computed

    def token(self, index: int) -> int:
        """Token id at `index` of prompt and output together."""
        size = len(self.prompt)
        return self.output[index - size] if index >= size else self.prompt[index]

    def tokens(self, start: int = 0, stop: int | None = None) -> list[int]:
        """Token ids [start, stop) of prompt and output together."""
        stop = self.length if stop is None else stop
        size = len(self.prompt)
        if start >= size:
            return self.output[start - size : stop - size]
        return self.prompt[start:stop] + self.output[: max(stop - size, 0)]


class Group(Protocol):
    """What makes several rows of one request, at most `width`: they are computed in the same steps, and
    chosen for together."""

    width: int

    def rows(self, request: Request) -> list[Row]:
        """Those to begin with; [] for the request itself alone."""


@dataclass(eq=False)
class Request(Row):
    """One sequence: its prompt, what it has produced and how far its keys are cached. Holds no tensors of
    the model (only the `scores` and `logits` that the caller asked to keep, and a source of states).

    | field | filled by | meaning |
    |---|---|---|
    | `prompt`, `params` | caller | token ids and how to continue them |
    | `source` | caller | of an encoder-decoder: what the encoder reads, token ids or its hidden states \
`[length, dim]` |
    | `draft_source` | caller | those of the draft model's encoder; None: it takes the `source` |
    | `logits_processors` | caller | called in order with (ids `[1, length]` int64, scores `[1, vocab]`), \
give new scores |
    | `should_stop` | caller | called after each new token; True ends the row with `stop_string` |
    | `logprobs` | caller | keep the log-probability of each token, and of so many most likely ones |
    | `keep_scores`, `keep_logits` | caller | keep each step's processed scores / raw logits, `[vocab]` each |
    | `constraint` | caller | says which tokens may come next, and when the row is complete |
    | `drafter` | caller | guesses its next tokens, several of which are then checked in one step |
    | `group` | caller | what makes several rows of the request: beams, guidance; None: it is its only row |
    | `scope` | caller | requests of one scope share cached prefixes: equal tokens have equal keys there. \
None: shares none |
    | `id`, `submitted` | engine | number in order of submission; `time.monotonic()` of it |
    | `output`, `token_logprobs`, `scores`, `logits` | engine | generated ids, and what was kept beside them |
    | `branches` | engine | the rows where there are several |
    | `finish_reason` | engine | None, "stop", "length", "stop_string", "time", "cancelled" or "error" |
    | `error` | engine | what failed, when `finish_reason` is "error" |
    | `status`, `computed`, `pages` | scheduler | state; tokens whose keys are cached; page numbers in order |
    | `source_pages` | scheduler | those with the keys of the source, for all rows |
    | `found`, `indexed` | scheduler | tokens found in the cache when it last began; pages that others may \
share, None: no more of them |
    """

    prompt: list[int]
    params: SamplingParams
    logits_processors: tuple[LogitsProcessor, ...] = ()
    should_stop: Callable[[Request], bool] | None = None
    logprobs: int | None = None
    keep_scores: bool = False
    keep_logits: bool = False
    constraint: Constraint | None = None
    drafter: Drafter | None = None
    group: Group | None = None
    source: tuple[int, ...] | Tensor | None = None
    draft_source: Tensor | None = None
    scope: Hashable | None = ()
    id: int = -1
    submitted: float = 0.0
    output: list[int] = field(default_factory=list)
    token_logprobs: list[TokenLogprobs] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    status: Status = Status.WAITING
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    source_pages: list[int] = field(default_factory=list)
    found: int = 0
    indexed: int | None = 0
    branches: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        if isinstance(self.source, list):
            self.source = tuple(self.source)
        if self.group is not None:
            self.branches = self.group.rows(self)

    @property
    def request(self) -> Request:
        return self

    @property
    def rows(self) -> Sequence[Row]:
        """What is computed for the request."""
        return self.branches or (self,)

    @property
    def width(self) -> int:
        """Rows that there can be."""
        return 1 if self.group is None else self.group.width

    @property
    def shares(self) -> bool:
        """Whether its pages may be those of other requests too."""
        return self.scope is not None and not isinstance(self.source, Tensor)

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED


@dataclass(eq=False)
class Branch(Row):
    """One of several rows of a request."""

    request: Request
    prompt: list[int]
    output: list[int]
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    found: int = 0
    indexed: int | None = 0

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def source(self) -> tuple[int, ...] | Tensor | None:
        return self.request.source

    @property
    def source_pages(self) -> list[int]:
        return self.request.source_pages

    @property
    def logits_processors(self) -> tuple[LogitsProcessor, ...]:
        return self.request.logits_processors

    @property
    def constraint(self) -> Constraint | None:
        return self.request.constraint


class Ahead:
    """A request as it would be after some more tokens, for those who choose the next one."""

    def __init__(self, request: Request, tokens: Sequence[int]):
        self.prompt, self.output = request.prompt, [*request.output, *tokens]
        self.params, self.logits_processors = request.params, request.logits_processors
        self.keep_scores, self.constraint = request.keep_scores, request.constraint


def _integer(name: str, value: object, minimum: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or (minimum is not None and value < minimum):
        expected = "an integer" if minimum is None else f"an integer of at least {minimum}"
        raise RequestError(f"{name} is {value!r}; expected {expected}")


def _number(name: str, value: object, expected: str, right: Callable[[float], bool]) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or not right(value):
        raise RequestError(f"{name} is {value!r}; expected a number {expected}")


def _biases(name: str, biases: Mapping[object, object]) -> None:
    """Checks amounts added to logits: finite, or -inf, which bans the token."""
    for key, value in biases.items():
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or math.isnan(value) or value == math.inf:
            raise RequestError(f"{name} of {key} is {value!r}; expected a finite number, or -inf to ban it")


def _token_ids(name: str, ids: Iterable[int]) -> tuple[int, ...]:
    """`ids` as a tuple, each checked to be an integer of at least 0 (the engine knows the upper bound)."""
    found = tuple(ids)
    for token in found:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise RequestError(f"{name} holds {token!r}; expected token ids, integers of at least 0")
    return found
