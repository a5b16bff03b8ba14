"""Triton kernel of `kernels.sample`: one program a row, thresholds found by search instead of sorting."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from taut.kernels.device import launch_options
from taut.kernels.sample import FIRST, GAMMA, SECOND, Sampling

_GAMMA = tl.constexpr(GAMMA)
_FIRST = tl.constexpr(FIRST)
_SECOND = tl.constexpr(SECOND)
_LOWEST = tl.constexpr(-(1 << 31))
_WAYS = tl.constexpr(8)  # parts that a step of a search cuts its range into


@triton.jit
def _mixed(x):
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _FIRST
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _SECOND
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _uniform(seed, step):
    bits = _mixed(_mixed(seed + _GAMMA) + step * _GAMMA)
    return ((bits >> 12) & 0xFFFFFFFFFFFFF).to(tl.float64) * 2.220446049250313e-16


@triton.jit
def _key(x):
    """int32 that orders as float32 `x` does."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _scores(logits, at, vocab, temperature):
    """Scores at token ids `at`; -inf past the end."""
    x = tl.load(logits + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    return tl.div_rn(x, temperature)


@triton.jit
def _threshold(logits, vocab, temperature, peak, low, target, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key whose tokens, with all larger ones, number (MASS: weigh) at least `target`; those of key
    `low` on do."""
    floor = low
    begin = low.to(tl.int64)
    end = _key(peak).to(tl.int64) + 1
    way = tl.arange(0, _WAYS)
    while end - begin > 1:
        cuts = begin + (end - begin) * way // _WAYS
        held = tl.zeros([_WAYS, BLOCK], tl.float32)
        ahead = _scores(logits, tl.arange(0, BLOCK), vocab, temperature)
        for start in range(0, vocab, BLOCK):
            x = ahead
            ahead = _scores(logits, start + BLOCK + tl.arange(0, BLOCK), vocab, temperature)
            key = _key(x)
            amount = tl.where(key >= floor, 1.0, 0.0)
            if MASS:
                amount = tl.where(key >= floor, tl.exp(x - peak), 0.0)
            else:
                amount = tl.where(start + tl.arange(0, BLOCK) < vocab, amount, 0.0)
            held += tl.where(key[None, :] >= cuts[:, None], amount[None, :], 0.0)
        enough = (tl.sum(held.to(tl.float64), 1) >= target) | (way == 0)
        last = tl.sum(enough.to(tl.int32), 0) - 1
        width = end - begin
        end = begin + width * (last + 1) // _WAYS
        begin = begin + width * last // _WAYS
    return begin.to(tl.int32)


@triton.jit
def _weights(logits, at, vocab, temperature, peak, low, floor, skip, seen):
    """Weights of a block of tokens, 0 for those below key `low` or score `floor` and for the first `skip`
    tokens of key `low`, of which `seen` came before; and `seen` after it."""
    x = _scores(logits, at, vocab, temperature)
    key = _key(x)
    kept = (key >= low) & (x - peak >= floor) & (at < vocab)
    if skip > seen:
        tied = ((key == low) & (at < vocab)).to(tl.int32)
        kept = kept & ((tied == 0) | (seen + tl.cumsum(tied, 0) > skip))
        seen += tl.sum(tied, 0)
    return tl.where(kept, tl.exp(x - peak), 0.0).to(tl.float64), seen


@triton.jit
def _sample(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    steps,
    tokens,
    finite,
    vocab,
    row_stride,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        # The next kernel starts when this one has ended: what it writes may be read before a wait.
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row)
    min_p = tl.load(min_ps + row)
    block = tl.arange(0, BLOCK)

    best = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    broken = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocab, BLOCK):
        at = start + block
        x = tl.load(logits + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        broken = broken | (x != x).to(tl.int32)
        better = x > best
        best = tl.where(better, x, best)
        where = tl.where(better, at, where)
    top = tl.max(best, 0)
    token = tl.min(tl.where(best == top, where, vocab), 0)
    fine = (tl.max(broken, 0) == 0) & (top > float("-inf")) & (top < float("inf"))
    tl.store(finite + row, fine)

    if fine & (temperature > 0):
        peak = tl.div_rn(top, temperature)
        low = top_k * 0 + _LOWEST
        if (top_k > 0) & (top_k < vocab):
            low = _threshold(logits, vocab, temperature, peak, low, top_k.to(tl.float64), False, BLOCK)
        skip = top_k * 0
        if top_p < 1.0:
            total = tl.zeros([BLOCK], tl.float64)
            for start in range(0, vocab, BLOCK):
                w, _ = _weights(
                    logits, start + block, vocab, temperature, peak, low, float("-inf"), 0, 0
                )
                total += w
            limit = tl.sum(total, 0) * top_p.to(tl.float64)
            kept = low
            low = _threshold(logits, vocab, temperature, peak, low, limit, True, BLOCK)
            # Of the tokens at the threshold, the ones with the smallest ids may not be needed.
            above = tl.zeros([BLOCK], tl.float64)
            weight = tl.zeros([BLOCK], tl.float32)
            tied = tl.zeros([BLOCK], tl.int32)
            for start in range(0, vocab, BLOCK):
                x = _scores(logits, start + block, vocab, temperature)
                key = _key(x)
                inside = start + block < vocab
                w = tl.exp(x - peak)
                above += tl.where((key > low) & (key >= kept) & inside, w, 0.0).to(tl.float64)
                equal = (key == low) & inside
                weight = tl.where(equal, w, weight)
                tied += equal.to(tl.int32)
            equals = tl.sum(tied, 0)
            each = tl.max(weight, 0).to(tl.float64)
            if (equals > 1) & (each > 0):
                needed = tl.ceil((limit - tl.sum(above, 0)) / each).to(tl.int32)
                skip = equals - tl.minimum(tl.maximum(needed, 1), equals)
        floor = tl.log(min_p)  # -inf where min_p is off
        total = tl.sum(tl.zeros([BLOCK], tl.float64), 0)
        seen = top_k * 0
        for start in range(0, vocab, BLOCK):
            w, seen = _weights(logits, start + block, vocab, temperature, peak, low, floor, skip, seen)
            total += tl.sum(w, 0)
        target = _uniform(tl.load(seeds + row), tl.load(steps + row)) * total
        before = total * 0
        seen = top_k * 0
        token = top_k * 0 - 1
        for start in range(0, vocab, BLOCK):
            w, seen = _weights(logits, start + block, vocab, temperature, peak, low, floor, skip, seen)
            after = before + tl.sum(w, 0)
            if (after > target) & (token < 0):
                # Rounding may leave no sum above the target: then it is the last token that can be drawn.
                reached = (before + tl.cumsum(w, 0) > target) & (w > 0)
                first = tl.min(tl.where(reached, start + block, vocab), 0)
                final = tl.max(tl.where(w > 0, start + block, 0), 0)
                token = tl.where(first < vocab, first, final)
            before = after
    tl.store(tokens + row, tl.minimum(token, vocab - 1).to(tl.int64))


def sample(logits: Tensor, how: Sampling) -> tuple[Tensor, Tensor]:
    """As `kernels.sample.sample_reference`. Rows that aren't finite give an arbitrary valid token."""
    rows, vocab = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    finite = torch.empty(rows, dtype=torch.bool, device=logits.device)
    if rows:
        _sample[(rows,)](
            logits,
            how.temperature,
            how.top_k,
            how.top_p,
            how.min_p,
            how.seeds,
            how.steps,
            tokens,
            finite,
            vocab,
            logits.stride(0),
            BLOCK=min(2048, max(triton.next_power_of_2(vocab), 16)),
            num_warps=16,
            **launch_options(logits.device),
        )
    return tokens, finite
