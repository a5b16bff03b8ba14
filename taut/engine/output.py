"""`GenerateOutput`: what `generate` returns beside the tokens, and how it is put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taut.engine.beams import Beams
from taut.engine.dynamic_cache import DynamicCache
from taut.engine.request import Request, TokenLogprobs
from taut.engine.stream import reason


@dataclass
class GenerateOutput:
    """What `generate(return_dict_in_generate=True)` returns.

    | field | meaning |
    |---|---|
    | `sequences` | `[rows, width + new]` int64: the given rows, padding included, then the new tokens |
    | `scores`, `logits` | with `output_scores` / `output_logits`: for each step `[rows, vocab]` float32, \
processed / raw; a row that has ended holds 0 for the pad token and -inf for all others. Of beams: \
`[prompts * beams, vocab]`, scores are log-probabilities |
    | `sequences_scores` | of beams, with `output_scores`: `[rows]` float32, under the length penalty |
    | `beam_indices` | of beams: `[rows, new]` int32, each token's row of `scores`; -1 behind the end |
    | `logprobs` | with `logprobs`: for each row, its tokens' log-probabilities |
    | `past_key_values` | the rows, but for their last tokens, for a call that goes on from them |
    | `finish_reasons` | one a row: "stop", "length", "stop_string", "time" or "cancelled" |
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    sequences_scores: Tensor | None = None
    beam_indices: Tensor | None = None
    logprobs: tuple[list[TokenLogprobs], ...] | None = None
    past_key_values: DynamicCache | None = None
    finish_reasons: tuple[str, ...] = ()

    def __getitem__(self, key: str | int) -> Any:
        return getattr(self, key if isinstance(key, str) else self.keys()[key])

    def keys(self) -> list[str]:
        """Names of the fields that are there."""
        return [name for name in self.__dataclass_fields__ if getattr(self, name) is not None]


@dataclass
class Returned:
    """One row as it is returned."""

    tokens: list[int]
    reason: str | None
    score: float = 0.0
    beams: Sequence[int] = ()


def returned(requests: Sequence[Request]) -> list[Returned]:
    """The rows of finished requests, in order: of a beam search as many as were wanted of it."""
    rows = []
    for index, request in enumerate(requests):
        if not isinstance(request.group, Beams):
            rows.append(Returned(request.output, reason(request)))
            continue
        beams, ends = request.group, request.params.eos_token_ids
        for found in beams.hypotheses:
            why = request.finish_reason
            if found.ended:
                why = "length" if len(found.tokens) == request.params.max_new_tokens else "stop_string"
                whole = request.constraint is not None and request.constraint.complete(found.tokens)
                why = "stop" if whole or found.tokens[-1] in ends else why
            path = [index * beams.width + beam for beam in found.beams]
            rows.append(Returned(found.tokens, why, found.score, path))
        # Where nothing could follow, there are fewer sequences than were asked for.
        rows += [Returned([], request.finish_reason, -1e9)] * (beams.returned - len(beams.hypotheses))
    return rows


def rectangle(rows: Sequence[Sequence[int]], fill: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of uneven length as one tensor, filled up at the end."""
    longest = max(map(len, rows))
    filled = [[*row, *[fill] * (longest - len(row))] for row in rows]
    return torch.tensor(filled, dtype=dtype, device=device).view(len(rows), longest)


def steps(kept: Sequence[Sequence[Tensor]], pad: int) -> tuple[Tensor, ...]:
    """What was kept of each request, `[vocab]` or `[beams, vocab]` a step, as one `[rows, vocab]` a step."""
    longest = max(map(len, kept))
    if not longest:
        return ()
    over = torch.full_like(next(one[0] for one in kept if one), -torch.inf)
    if 0 <= pad < over.shape[-1]:
        over[..., pad] = 0.0
    return tuple(
        torch.stack([one[step] if step < len(one) else over for one in kept]).view(-1, over.shape[-1])
        for step in range(longest)
    )


def transition_scores(
    sequences: Tensor,
    scores: Sequence[Tensor],
    beam_indices: Tensor | None = None,
    normalize_logits: bool = False,
) -> Tensor:
    """Scores `[rows, new]` of the tokens that were generated.

    `sequences`, `scores` and, of beams, `beam_indices` are those of a `GenerateOutput`. `normalize_logits`
    makes log-probabilities of the scores first; those of beams are. 0 where a beam has ended.
    """
    kept = torch.stack(list(scores))  # [steps, rows, vocab]
    if normalize_logits:
        kept = kept.log_softmax(-1)
    new = kept.shape[0]
    if beam_indices is None:
        rows = torch.arange(kept.shape[1], device=kept.device).unsqueeze(1).expand(-1, new)
    else:
        new = min(new, beam_indices.shape[1])
        rows = beam_indices[:, :new].long()
    tokens = sequences[:, sequences.shape[1] - new :]
    found = kept[torch.arange(new, device=kept.device), rows.clamp(min=0), tokens]
    return found.masked_fill(rows < 0, 0.0)
