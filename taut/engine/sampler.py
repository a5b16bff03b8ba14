"""`Sampler`: logits in, one token a row out; every row by its own options, no row affected by another.

The order and the meaning of the options are those of transformers:
sequence bias, repetition penalty, presence and frequency penalty, no-repeat n-grams, bad words, minimum
length, suppressed tokens, the response format, timestamps, the user's own processors; then, for rows that
sample, temperature, top-k, top-p, min-p, typical-p, epsilon and eta.
Presence and frequency penalties, which transformers lacks, are OpenAI's and vLLM's: they count generated
tokens only, never the prompt.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import inf

import torch
from torch import Tensor

from taut.engine.grammar import bar
from taut.engine.request import Request, Row, SamplingParams
from taut.engine.timestamps import timed
from taut.errors import NumericsError, RequestError
from taut.kernels.sample import signed, uniform

# A row with top_p and no top_k is first looked at through this many of its largest scores; only when
# they hold less than top_p of the probability is the whole vocabulary sorted.
NUCLEUS_WIDTH = 1024


class NonFiniteLogits(NumericsError):
    """Rows whose logits hold NaN or +inf. `rows`: their indexes in the batch that was sampled."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows
        super().__init__(
            f"logits of row {', '.join(map(str, rows))} are not finite; no token was sampled. "
            "Next step: check the weights, or compute in bfloat16 or float32 instead of float16"
        )


class NothingLeft(RequestError):
    """Rows whose options exclude every token. `rows`: their indexes in the batch that was sampled."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows
        super().__init__(
            f"row {', '.join(map(str, rows))}: every token is excluded by the request's options "
            "(bad_words_ids, sequence_bias, no_repeat_ngram_size, min_new_tokens, logits_processor). "
            "Next step: relax one of them"
        )


class Sampler:
    """Chooses the next token of each row.

    Calling it with `logits [rows, vocab]` and the rows' requests returns `(tokens, scores)`: one token id
    a row, and the processed scores `[rows, vocab]` when any of the requests keeps scores, else None.
    A row's draw depends only on its logits, its seed and how many tokens it has: not on the batch.
    Raises NonFiniteLogits or NothingLeft before anything is chosen.
    """

    def __call__(self, logits: Tensor, requests: Sequence[Request]) -> tuple[list[int], Tensor | None]:
        if logits.ndim != 2 or logits.shape[0] != len(requests):
            raise RequestError(
                f"the sampler got logits of shape {tuple(logits.shape)} for {len(requests)} requests; "
                "it needs one row of logits a request"
            )
        if logits.dtype not in (torch.float32, torch.float64):
            logits = logits.float()
        scores = edit(logits, requests)
        keep = any(request.keep_scores for request in requests)
        sampled = [row for row, request in enumerate(requests) if not request.params.greedy]

        if len(sampled) < len(requests):
            peaks, tokens = scores.max(dim=-1)  # [rows]; NaN wins over every number
        else:
            peaks = scores.amax(dim=-1)
            tokens = torch.empty(len(requests), dtype=torch.int64, device=logits.device)
        finite = peaks.isfinite()
        if not sampled:
            chosen, fine = torch.stack((tokens, finite.to(tokens.dtype))).tolist()
            if not all(fine):
                raise _failure(logits, fine)
            return chosen, scores if keep else None

        fine = finite.tolist()
        if not all(fine):
            raise _failure(logits, fine)
        processed = scores.clone() if keep else None
        for rows, values, ids in _warp(scores, requests, sampled):
            at = torch.tensor(rows, device=scores.device)
            drawn = _draw(values, [requests[row] for row in rows])  # [rows, 1]
            tokens[at] = (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)
            if processed is not None:
                if ids is not None:
                    wide = values.new_full((len(rows), scores.shape[1]), -inf)
                    values = wide.scatter_(1, ids, values)
                processed[at] = values
        return tokens.tolist(), processed


def _failure(logits: Tensor, fine: list[int] | list[bool]) -> NumericsError | RequestError:
    """The error for rows whose largest score is not a number: bad logits, or no token left."""
    bad = [row for row, ok in enumerate(fine) if not ok]
    peaks = logits[bad].amax(dim=-1)
    broken = [row for row, ok in zip(bad, peaks.isfinite().tolist(), strict=True) if not ok]
    return NonFiniteLogits(broken) if broken else NothingLeft(bad)


# -- options that change single scores: bias, penalties, bans ------------------------------------------


class _Entries:
    """Changes collected on the host as (row, token, value), moved to the device in one go."""

    def __init__(self) -> None:
        self.rows, self.tokens, self.values = array("q"), array("q"), array("d")

    def add(self, row: int, tokens: Sequence[int], value: float | None = None) -> None:
        self.rows.extend([row] * len(tokens))
        self.tokens.extend(tokens)
        if value is not None:
            self.values.extend([value] * len(tokens))

    def at(self, device: torch.device) -> tuple[Tensor, Tensor]:
        rows = torch.frombuffer(self.rows, dtype=torch.int64)
        return rows.to(device), torch.frombuffer(self.tokens, dtype=torch.int64).to(device)

    def amounts(self, like: Tensor) -> Tensor:
        return torch.frombuffer(self.values, dtype=torch.float64).to(like)


def edit(logits: Tensor, requests: Sequence[Row]) -> Tensor:
    """Scores after bias, penalties, bans and the user's processors; `logits` itself when no row has any.

    `logits [rows, vocab]` is never written to.
    """
    bias, repeated, counted, banned = _Entries(), _Entries(), _Entries(), _Entries()
    for row, request in enumerate(requests):
        params = request.params
        if params.logit_bias:
            for token, value in params.logit_bias.items():
                bias.add(row, (token,), value)
        if (
            params.sequence_bias
            or params.bad_words
            or params.repetition_penalty != 1.0
            or params.no_repeat_ngram_size
        ):
            history = request.prompt + request.output
            for sequence, value in params.sequence_bias.items():
                if _ends_with(history, sequence[:-1]):
                    bias.add(row, sequence[-1:], value)
            if params.repetition_penalty != 1.0:
                repeated.add(row, history, params.repetition_penalty)
            if params.no_repeat_ngram_size:
                banned.add(row, repeating(history, params.no_repeat_ngram_size))
            for word in params.bad_words:
                ends = len(word) == 1 and word[0] in params.eos_token_ids
                if not ends and _ends_with(history, word[:-1]):
                    banned.add(row, word[-1:])
        if params.presence_penalty or params.frequency_penalty:
            for token, count in Counter(request.output).items():
                counted.add(row, (token,), -params.presence_penalty - params.frequency_penalty * count)
        banned.add(row, params.suppress_tokens)
        if len(request.output) == params.begin_index:
            banned.add(row, params.begin_suppress_tokens)
        if len(request.output) < params.min_new_tokens:
            banned.add(row, params.eos_token_ids)

    users = [row for row, request in enumerate(requests) if request.logits_processors]
    limited = [row for row, request in enumerate(requests) if request.constraint is not None]
    in_time = [row for row, request in enumerate(requests) if request.params.timestamps is not None]
    if not (bias.rows or repeated.rows or counted.rows or banned.rows or users or limited or in_time):
        return logits
    scores = logits.clone()
    if bias.rows:
        scores.index_put_(bias.at(scores.device), bias.amounts(scores), accumulate=True)
    if repeated.rows:
        # A token that occurs twice is written twice with the same value.
        at, penalty = repeated.at(scores.device), repeated.amounts(scores)
        old = scores[at]
        scores.index_put_(at, torch.where(old < 0, old * penalty, old / penalty))
    if counted.rows:
        scores.index_put_(counted.at(scores.device), counted.amounts(scores), accumulate=True)
    if banned.rows:
        scores.index_put_(banned.at(scores.device), scores.new_tensor(-inf))
    if limited:
        masks = [requests[row].constraint.mask(requests[row].output) for row in limited]
        scores[limited] = bar(scores[limited], masks)
    for at in _alike(requests, in_time):
        some = [requests[row] for row in at]
        if len(at) == len(requests):
            scores = timed(scores, some)
        else:
            scores[at] = timed(scores[at], some)
    for row in users:
        request = requests[row]
        ids = torch.tensor([request.prompt + request.output], device=scores.device)  # [1, length]
        for processor in request.logits_processors:
            scores[row] = _processed(processor, ids, scores[row : row + 1])
    return scores


def _alike(requests: Sequence[Row], rows: Sequence[int]) -> Iterable[list[int]]:
    """These rows by the token at which their timestamps begin."""
    found: dict[tuple[int, int], list[int]] = {}
    for row in rows:
        rule = requests[row].params.timestamps
        found.setdefault((rule.begin, rule.never), []).append(row)
    return found.values()


def _processed(processor: Callable[[Tensor, Tensor], Tensor], ids: Tensor, scores: Tensor) -> Tensor:
    result = processor(ids, scores.clone())
    if not isinstance(result, Tensor) or result.shape != scores.shape:
        got = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise RequestError(
            f"logits processor {type(processor).__name__} returned {got}; it is called once a row with "
            f"input_ids {tuple(ids.shape)} and scores {tuple(scores.shape)} and must return scores of "
            "that shape"
        )
    return result[0].to(scores)


def _ends_with(history: list[int], suffix: Sequence[int]) -> bool:
    """Whether `history` ends with `suffix`; an empty suffix ends everything."""
    return not suffix or (len(suffix) <= len(history) and history[-len(suffix) :] == list(suffix))


def repeating(history: list[int], size: int) -> list[int]:
    """Tokens that would complete an n-gram of `size` tokens that `history` already holds."""
    if len(history) < size:
        return []
    if size == 1:
        return list(set(history))
    prefix = history[1 - size :]
    found, position, end = [], size - 2, len(history) - 1
    while True:
        try:  # list.index runs in C; only places with the right last token are compared
            position = history.index(prefix[-1], position, end)
        except ValueError:
            return found
        if history[position - size + 2 : position + 1] == prefix:
            found.append(history[position + 1])
        position += 1


# -- options that shape the distribution: temperature, top-k, top-p, min-p, typical-p ------------------


def warped(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """`scores [rows, vocab]` as they are drawn from: -inf where a token is not."""
    out = torch.full_like(scores, -inf)
    for at, values, ids in _warp(scores, rows, list(range(len(rows)))):
        where = torch.tensor(at, device=scores.device)
        out[where] = values if ids is None else out[where].scatter(1, ids, values)
    return out


def _warp(
    scores: Tensor, requests: Sequence[Request], sampled: list[int]
) -> list[tuple[list[int], Tensor, Tensor | None]]:
    """Groups `(rows, values [rows, width], ids [rows, width] or None)` that cover the sampled rows.

    `values` are processed scores, -inf where removed, in the order of token ids; `ids` is None when the
    width is the vocabulary. A row's group and values depend on that row alone.
    """
    vocab = scores.shape[1]
    narrow, nucleus, flat, full = [], [], [], []
    for row in sampled:
        params = requests[row].params
        if 0 < max(params.top_k, params.min_tokens_to_keep if params.top_k else 0) < vocab:
            narrow.append(row)
        elif params.typical_p < 1.0:
            full.append(row)
        elif params.top_p < 1.0:
            (nucleus if vocab > NUCLEUS_WIDTH else full).append(row)
        else:
            flat.append(row)

    def heated(rows: list[int]) -> Tensor:
        """Scores of `rows` divided by their temperatures, [rows, vocab]."""
        chosen = scores if len(rows) == len(requests) else scores[rows]
        temperatures = [requests[row].params.temperature for row in rows]
        if all(temperature == 1.0 for temperature in temperatures):
            return chosen
        return chosen / chosen.new_tensor(temperatures).unsqueeze(1)

    groups: list[tuple[list[int], Tensor, Tensor | None]] = []
    if narrow:
        counts = [max(p.top_k, p.min_tokens_to_keep) for p in (requests[row].params for row in narrow)]
        values, ids = _largest(heated(narrow), counts)
        groups.append((narrow, _shape(values, requests, narrow), ids))
    if nucleus:
        hot = heated(nucleus)
        values, ids = _largest(hot, [NUCLEUS_WIDTH] * len(nucleus), ties=False)
        total = hot.logsumexp(dim=-1, keepdim=True)
        # Enough when the scores above the smallest one here already hold top_p: whatever ties with the
        # smallest, or lies below it, is then removed.
        above = values > values.amin(dim=-1, keepdim=True)
        mass = ((values - total).exp() * above).sum(dim=-1, dtype=torch.float64)
        limit = mass.new_tensor([requests[row].params.top_p for row in nucleus])
        enough = (mass > limit + 1e-6).tolist()
        inside = [index for index, ok in enumerate(enough) if ok]
        full += [row for row, ok in zip(nucleus, enough, strict=True) if not ok]
        if inside:
            rows = [nucleus[index] for index in inside]
            if len(inside) < len(nucleus):
                values, ids, total = values[inside], ids[inside], total[inside]
            groups.append((rows, _shape(values, requests, rows, total), ids))
    if flat:
        groups.append((flat, _shape(heated(flat), requests, flat), None))
    if full:
        groups.append((full, _shape(heated(full), requests, full), None))
    return groups


def _largest(scores: Tensor, counts: list[int], ties: bool = True) -> tuple[Tensor, Tensor]:
    """Each row's `counts[row]` largest scores and their token ids, `[rows, width]`, in the order of ids.

    With `ties`, scores equal to a row's smallest kept one are kept too, as transformers does. Entries of a
    row beyond its own count are -inf.
    """
    width = max(counts)
    values, ids = scores.topk(width, dim=-1, sorted=True)
    if ties:
        last = torch.tensor(counts, device=scores.device).unsqueeze(1) - 1
        least = values.gather(1, last).clamp(min=torch.finfo(scores.dtype).min)  # [rows, 1]
        held = int((scores >= least).sum(dim=-1).max())
        if held > width:
            values, ids = scores.topk(held, dim=-1)
        values = values.masked_fill(values < least, -inf)
    ids, order = ids.sort(dim=-1)
    return values.gather(1, order), ids


def _shape(
    values: Tensor, requests: Sequence[Request], rows: list[int], total: Tensor | None = None
) -> Tensor:
    """`values [rows, width]` with -inf where top-p, min-p or typical-p of its row removes the token.

    `total [rows, 1]`: log of the sum of exp over the whole row, when `values` is only a part of it.
    """
    params = [requests[row].params for row in rows]
    keep = [p.min_tokens_to_keep for p in params]
    if any(p.top_p < 1.0 for p in params):
        values = _top_p(values, [p.top_p for p in params], total, keep)
    if any(p.min_p > 0.0 for p in params):
        # p < min_p * p_max, with the normaliser cancelled
        floor = values.new_tensor([p.min_p for p in params]).log().unsqueeze(1)
        values = _cut(values, values - values.amax(dim=-1, keepdim=True) < floor, keep)
    typical = [index for index, p in enumerate(params) if p.typical_p < 1.0]
    if len(typical) == len(params):
        values = _typical(values, [p.typical_p for p in params], keep)
    elif typical:
        values = values.clone()
        masses, least = [params[row].typical_p for row in typical], [keep[row] for row in typical]
        values[typical] = _typical(values[typical], masses, least)
    if any(p.epsilon_cutoff or p.eta_cutoff for p in params):
        values = _truncated(values, params, keep)
    return values


def _cut(values: Tensor, removed: Tensor, keep: list[int]) -> Tensor:
    """`values` without those `removed`, but for each row's `keep` largest."""
    if max(keep) > 1:
        width = min(max(keep), values.shape[1])
        last = torch.tensor(keep, device=values.device).clamp(max=width).unsqueeze(1) - 1
        removed = removed & (values < values.topk(width, dim=-1).values.gather(1, last))
    return values.masked_fill(removed, -inf)


def _top_p(values: Tensor, top_p: list[float], total: Tensor | None, keep: list[int]) -> Tensor:
    """Keeps the smallest set of most probable tokens that holds at least `top_p` (nucleus sampling,
    Holtzman et al. 2019, arXiv:1904.09751). Of equal scores the larger token id is kept first."""
    if total is None:
        total = values.logsumexp(dim=-1, keepdim=True)
    ordered, order = values.sort(dim=-1, stable=True)
    mass = (ordered - total).exp().double().flip(-1)
    before = (mass.cumsum(dim=-1) - mass).flip(-1)  # probability of everything more probable
    limit = before.new_tensor([inf if p >= 1.0 else p for p in top_p]).unsqueeze(1)
    removed = (before >= limit).scatter(1, order, before >= limit)
    return _cut(values, removed, keep)


def _typical(values: Tensor, typical_p: list[float], keep: list[int]) -> Tensor:
    """Locally typical sampling (Meister et al. 2022, arXiv:2202.00666): keeps tokens whose information is
    nearest to the entropy until they hold `typical_p`."""
    log_p = values.log_softmax(dim=-1)
    entropy = -(log_p * log_p.exp()).nansum(dim=-1, keepdim=True)
    distance = (-log_p - entropy).abs()
    ordered, order = distance.sort(dim=-1, stable=True)
    mass = log_p.exp().gather(1, order).cumsum(dim=-1, dtype=torch.float64)
    limit = mass.new_tensor(typical_p).unsqueeze(1)
    last = (mass < limit).sum(dim=-1, keepdim=True)
    last = last.maximum(last.new_tensor(keep).unsqueeze(1) - 1).clamp(max=values.shape[1] - 1)
    return values.masked_fill(distance > ordered.gather(1, last), -inf)


def _truncated(values: Tensor, params: list[SamplingParams], keep: list[int]) -> Tensor:
    """Epsilon and eta sampling (Hewitt et al. 2022, arXiv:2210.15191): removes what is less probable than a
    threshold, which for eta falls with the entropy."""
    epsilon = values.new_tensor([p.epsilon_cutoff for p in params]).unsqueeze(1)
    values = _cut(values, values.softmax(dim=-1) < epsilon, keep)
    log_p = values.log_softmax(dim=-1)
    entropy = -(log_p * log_p.exp()).nansum(dim=-1, keepdim=True)
    eta = values.new_tensor([p.eta_cutoff for p in params]).unsqueeze(1)
    return _cut(values, log_p.exp() < torch.minimum(eta, eta.sqrt() * (-entropy).exp()), keep)


# -- the draw ------------------------------------------------------------------------------------------


def _draw(values: Tensor, requests: Sequence[Request]) -> Tensor:
    """The drawn position of each row of `values [rows, width]`, `[rows, 1]`: inverse CDF in float64."""
    weights = (values - values.amax(dim=-1, keepdim=True)).exp()
    sums = weights.cumsum(dim=-1, dtype=torch.float64)
    seeds = [signed(request.params.seed) for request in requests]
    steps = [len(request.output) for request in requests]
    keys = torch.tensor([seeds, steps], dtype=torch.int64, device=values.device)
    # uniform() is at most 1 - 2**-52, so the target stays below the last sum whatever the rounding, and
    # the first sum above it belongs to a token of positive weight.
    target = uniform(keys[0], keys[1]).unsqueeze(1) * sums[:, -1:]
    return torch.searchsorted(sums, target, right=True)
