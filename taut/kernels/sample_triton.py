"""Triton kernel of `kernels.sample`: one program a row, thresholds found by search instead of sorting.

The tokens that top-k or top-p can leave are collected first, and the thresholds searched among these; where
they are too many, in the whole row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from taut.kernels.device import launch_options
from taut.kernels.sample import FIRST, GAMMA, SECOND, Sampling

CANDIDATES = 2048  # tokens that a draw is made among in one block

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
def _held(logits, vocab, temperature, peak, cuts, floor, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """How many tokens, or with MASS how much weight, have at least each key of `cuts` and key `floor`."""
    at = tl.arange(0, BLOCK)
    held = tl.zeros([_WAYS, BLOCK], tl.float32)
    ahead = _scores(logits, at, vocab, temperature)
    for start in range(0, vocab, BLOCK):
        x = ahead
        ahead = _scores(logits, start + BLOCK + at, vocab, temperature)
        key = _key(x)
        kept = (key >= floor) & (start + at < vocab)
        amount = tl.where(kept, tl.exp(x - peak) if MASS else 1.0, 0.0)
        held += tl.where(key[None, :] >= cuts[:, None], amount[None, :], 0.0)
    return tl.sum(held.to(tl.float64), 1)


@triton.jit
def _narrow(begin, end, held, target):
    """The part of the keys `[begin, end)`, cut evenly, that the amount `target` is reached in."""
    last = tl.sum(((held >= target) | (tl.arange(0, _WAYS) == 0)).to(tl.int32), 0) - 1
    return begin + (end - begin) * last // _WAYS, begin + (end - begin) * (last + 1) // _WAYS


@triton.jit
def _threshold(logits, vocab, temperature, peak, floor, target, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key whose tokens, with all larger ones, number (MASS: weigh) at least `target`; those of
    key `floor` on do."""
    begin = floor.to(tl.int64)
    end = _key(peak).to(tl.int64) + 1
    while end - begin > 1:
        cuts = begin + (end - begin) * tl.arange(0, _WAYS) // _WAYS
        held = _held(logits, vocab, temperature, peak, cuts, floor, MASS, BLOCK)
        begin, end = _narrow(begin, end, held, target)
    return begin.to(tl.int32)


@triton.jit
def _threshold_of_few(key, amount, floor, target):
    """The same among tokens that are held in one block, of keys `key` and number or weight `amount`."""
    begin = floor.to(tl.int64)
    end = tl.max(key, 0).to(tl.int64) + 1
    while end - begin > 1:
        cuts = begin + (end - begin) * tl.arange(0, _WAYS) // _WAYS
        held = tl.sum(tl.where(key[None, :] >= cuts[:, None], amount[None, :], 0.0), 1)
        begin, end = _narrow(begin, end, held, target)
    return begin.to(tl.int32)


@triton.jit
def _unneeded(limit, above, weight, equals):
    """Of `equals` tokens of one weight, how many are not needed to reach `limit` from `above`."""
    needed = tl.ceil((limit - above) / tl.maximum(weight.to(tl.float64), 1e-300))
    needed = tl.minimum(needed, equals.to(tl.float64)).to(tl.int32)
    return tl.where(weight > 0, equals - tl.maximum(needed, 1), 0)


@triton.jit
def _reached(weight, id, target, vocab):
    """The first token id at which the running sum of `weight` passes `target`; should rounding leave none,
    the last that can be drawn."""
    passed = (tl.cumsum(weight, 0) > target) & (weight > 0)
    first = tl.min(tl.where(passed, id, vocab), 0)
    return tl.where(first < vocab, first, tl.max(tl.where(weight > 0, id, 0), 0))


@triton.jit
def _from_few(
    values, ids, count, peak, top_k, top_p, min_p, chance, vocab, LIMITED, NUCLEUS, FEW: tl.constexpr
):
    """The draw among `count` candidates, in the order of ids, that hold all tokens that can be drawn."""
    at = tl.arange(0, FEW)
    x = tl.load(values + at, mask=at < count, other=float("-inf"))
    id = tl.load(ids + at, mask=at < count, other=0)
    real = at < count
    key = tl.where(real, _key(x), _LOWEST)
    weight = tl.where(real, tl.exp(x - peak), 0.0)
    low = top_k * 0 + _LOWEST
    if LIMITED:
        low = _threshold_of_few(key, tl.where(real, 1.0, 0.0), low, top_k.to(tl.float64))
        weight = tl.where(key >= low, weight, 0.0)
    if NUCLEUS:
        # `limit` is a part of what top-k left; without it, the caller's total comes in through top_p.
        limit = top_p
        if LIMITED:
            limit = tl.sum(weight.to(tl.float64), 0) * top_p
        low = _threshold_of_few(key, weight, low, limit)
        equal = real & (key == low)
        above = tl.sum(tl.where(key > low, weight, 0.0).to(tl.float64), 0)
        skip = _unneeded(limit, above, tl.max(tl.where(equal, weight, 0.0), 0), tl.sum(equal.to(tl.int32), 0))
        weight = tl.where((key > low) | (equal & (tl.cumsum(equal.to(tl.int32), 0) > skip)), weight, 0.0)
    weight = tl.where(x - peak >= tl.log(min_p), weight, 0.0).to(tl.float64)
    return _reached(weight, id, chance * tl.sum(weight, 0), vocab)


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
def _from_all(logits, vocab, temperature, peak, low, floor, skip, chance, BLOCK: tl.constexpr):
    """The draw among all tokens of at least key `low` and score `floor`, less the first `skip` of `low`."""
    block = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    seen = skip * 0
    for start in range(0, vocab, BLOCK):
        w, seen = _weights(logits, start + block, vocab, temperature, peak, low, floor, skip, seen)
        sums += w
    total = tl.sum(sums, 0)
    target = chance * total
    before = total * 0
    seen = skip * 0
    token = skip * 0 - 1
    for start in range(0, vocab, BLOCK):
        w, seen = _weights(logits, start + block, vocab, temperature, peak, low, floor, skip, seen)
        after = before + tl.sum(w, 0)
        if (after > target) & (token < 0):
            token = _reached(w, start + block, target - before, vocab)
        before = after
    return token


@triton.jit
def _from_row(
    logits, vocab, temperature, peak, top_k, top_p, min_p, chance, LIMITED, NUCLEUS, BLOCK: tl.constexpr
):
    """The draw where the candidates are more than one block holds: every threshold is searched in the row."""
    block = tl.arange(0, BLOCK)
    low = top_k * 0 + _LOWEST
    if LIMITED:
        low = _threshold(logits, vocab, temperature, peak, low, top_k.to(tl.float64), False, BLOCK)
    skip = top_k * 0
    if NUCLEUS:
        everything = tl.zeros([_WAYS], tl.int32) + low
        total = tl.max(_held(logits, vocab, temperature, peak, everything, low, True, BLOCK), 0)
        kept = low
        low = _threshold(logits, vocab, temperature, peak, kept, total * top_p, True, BLOCK)
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
        skip = _unneeded(total * top_p, tl.sum(above, 0), tl.max(weight, 0), tl.sum(tied, 0))
    return _from_all(logits, vocab, temperature, peak, low, tl.log(min_p), skip, chance, BLOCK)


@triton.jit
def _collect(logits, values, ids, vocab, temperature, low, WIDE: tl.constexpr, FEW: tl.constexpr):
    """Write the first FEW tokens of at least key `low` to `values` and `ids`; the number of all of them."""
    tl.debug_barrier()  # an earlier collection is done
    block = tl.arange(0, WIDE)
    count = tl.sum(tl.zeros([WIDE], tl.int32), 0)
    for start in range(0, vocab, WIDE):
        x = _scores(logits, start + block, vocab, temperature)
        taken = ((_key(x) >= low) & (start + block < vocab)).to(tl.int32)
        place = count + tl.cumsum(taken, 0) - 1
        fits = (taken > 0) & (place < FEW)
        tl.store(values + place, x, mask=fits)
        tl.store(ids + place, start + block, mask=fits)
        count += tl.sum(taken, 0)
    tl.debug_barrier()
    return count


@triton.jit(do_not_specialize=["temperatures", "top_ks", "top_ps", "min_ps", "seeds", "steps"])
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
    values,
    ids,
    vocab,
    row_stride,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    FEW: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        # The next kernel starts when this one has ended: what it writes may be read before a wait.
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    values += row * FEW
    ids += row * FEW
    temperature = tl.load(temperatures + row)
    top_k = tl.load(top_ks + row)
    top_p = tl.load(top_ps + row).to(tl.float64)
    min_p = tl.load(min_ps + row)
    block = tl.arange(0, WIDE)

    best = tl.full([WIDE], float("-inf"), tl.float32)
    where = tl.zeros([WIDE], tl.int32)
    broken = tl.zeros([WIDE], tl.int32)
    for start in range(0, vocab, WIDE):
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
        limited = (top_k > 0) & (top_k < vocab)
        nucleus = top_p < 1.0
        chance = _uniform(tl.load(seeds + row), tl.load(steps + row))
        if limited | nucleus:
            # The tokens that can be drawn are near the top: within 1/4, 1/2, 1 ... 16 of it, or anywhere.
            way = tl.arange(0, _WAYS)
            depth = tl.exp2(way.to(tl.float32) - 2.0)
            cuts = _key(tl.where(way == _WAYS - 1, float("-inf"), peak - depth))
            lowest = top_k * 0 + _LOWEST
            if limited:
                held = _held(logits, vocab, temperature, peak, cuts, lowest, False, BLOCK)
                target = top_k.to(tl.float64)
            else:
                held = _held(logits, vocab, temperature, peak, cuts, lowest, True, BLOCK)
                target = top_p * tl.max(held, 0)
            enough = (held >= target) | (way == _WAYS - 1)
            begin = tl.max(tl.where(enough, cuts, _LOWEST), 0).to(tl.int64)
            end = tl.min(tl.where(enough, _key(peak) + 1, cuts), 0).to(tl.int64)
            count = _collect(logits, values, ids, vocab, temperature, begin, WIDE, FEW)
            attempts = top_k * 0
            while (count > FEW) & (attempts < 3):
                cuts = (begin + (end - begin) * way // _WAYS).to(tl.int32)
                if limited:
                    held = _held(logits, vocab, temperature, peak, cuts, lowest, False, BLOCK)
                else:
                    held = _held(logits, vocab, temperature, peak, cuts, lowest, True, BLOCK)
                begin, end = _narrow(begin, end, held, target)
                count = _collect(logits, values, ids, vocab, temperature, begin, WIDE, FEW)
                attempts += 1
            if count <= FEW:
                part = tl.where(limited, top_p, target)
                token = _from_few(
                    values, ids, count, peak, top_k, part, min_p, chance, vocab, limited, nucleus, FEW
                )
            else:
                token = _from_row(
                    logits, vocab, temperature, peak, top_k, top_p, min_p, chance, limited, nucleus, BLOCK
                )
        else:
            lowest = top_k * 0 + _LOWEST
            none = top_k * 0
            token = _from_all(logits, vocab, temperature, peak, lowest, tl.log(min_p), none, chance, WIDE)
        if token < 0:  # rounding left no sum above the draw's
            token = tl.min(tl.where(best == top, where, vocab), 0)
    tl.store(tokens + row, tl.minimum(token, vocab - 1).to(tl.int64))


def sample(logits: Tensor, how: Sampling) -> tuple[Tensor, Tensor]:
    """As `kernels.sample.sample_reference`. Rows that aren't finite give an arbitrary valid token."""
    rows, vocab = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    finite = torch.empty(rows, dtype=torch.bool, device=logits.device)
    few = CANDIDATES
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
            torch.empty(rows, few, dtype=torch.float32, device=logits.device),
            torch.empty(rows, few, dtype=torch.int32, device=logits.device),
            vocab,
            logits.stride(0),
            BLOCK=min(2048, max(triton.next_power_of_2(vocab), 16)),
            WIDE=min(8192, max(triton.next_power_of_2(vocab), 16)),
            FEW=few,
            num_warps=16,
            **launch_options(logits.device),
        )
    return tokens, finite
