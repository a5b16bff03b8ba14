"""What a row said of one window of sound, cut at its timestamps; and how good it looks."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Piece(NamedTuple):
    """Tokens [first, last) of a row, said from `start` to `end`, in timestamps since the window began."""

    first: int
    last: int
    start: int
    end: int


def cut(tokens: Sequence[int], begin: int, frames: int) -> tuple[list[Piece], int]:
    """The pieces of what was said in a window of so many `frames`, and how many of these are done with.

    Timestamps are the tokens from `begin` on, each two frames. Two together end a piece and begin the
    next. What follows the last two is left for the next window, unless it ends in a single timestamp, behind
    which nothing is said.
    """
    times = [token >= begin for token in tokens]
    ends = [at + 1 for at in range(len(tokens) - 1) if times[at] and times[at + 1]]
    if not ends:
        last = next((token - begin for token in reversed(tokens) if token >= begin), 0)
        return [Piece(0, len(tokens), 0, last or frames // 2)], frames
    closed = times[-2:] == [False, True]
    if closed:
        ends.append(len(tokens))
    else:
        ends[-1] += 1  # the last piece keeps both, which tells that it wasn't closed by one
    pieces, first = [], 0
    for end in ends:
        spoken = end - (end == ends[-1] and not closed)
        pieces.append(Piece(first, end, tokens[first] - begin, tokens[spoken - 1] - begin))
        first = end
    done = frames if closed else 2 * (tokens[ends[-1] - 2] - begin)
    return pieces, done or frames  # a window in which nothing ends is done with


def compression_ratio(tokens: Sequence[int], vocab: int) -> float:
    """How much smaller the tokens' bytes get by zlib: large where they repeat themselves."""
    width = int(math.log2(vocab) / 8) + 1
    raw = b"".join(token.to_bytes(width, "little") for token in tokens)
    return len(raw) / len(zlib.compress(raw))


def mean_logprob(tokens: Sequence[int], scores: Sequence[Tensor], temperature: float) -> float:
    """The mean log-probability of tokens by the processed scores `[vocab]` of each."""
    if not tokens:
        return 0.0
    kept = torch.stack([score.float() for score in scores[: len(tokens)]])
    logprobs = (kept * (temperature or 1.0)).log_softmax(-1)
    picked = logprobs.gather(1, torch.tensor(list(tokens), device=kept.device)[:, None])
    return float(picked.sum()) / len(tokens)
