"""Triton kernel of cross-entropy and its gradient, which takes the place of the logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _bend(x, scale, softcap, SOFTCAP: tl.constexpr):
    """`scale * x`, and that bent to `softcap * tanh(that / softcap)`."""
    x = x * scale
    if SOFTCAP:
        x = softcap * (1.0 - 2.0 / (tl.exp(2.0 * x / softcap) + 1.0))
    return x


@triton.jit(do_not_specialize=["labels"])
def _cross_entropy(
    logits,
    labels,
    losses,
    vocab,
    row_stride,
    ignore_index,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: one pass for the sum of exponentials, one that writes the gradient."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    label = tl.load(labels + row)
    at = tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            for start in range(0, vocab, BLOCK):
                zeros = tl.zeros([BLOCK], logits.dtype.element_ty)
                tl.store(logits + start + at, zeros, mask=start + at < vocab)
        return
    picked = _bend(tl.load(logits + label).to(tl.float32), scale, softcap, SOFTCAP)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits + start + at, mask=start + at < vocab, other=0.0).to(tl.float32)
        x = tl.where(start + at < vocab, _bend(x, scale, softcap, SOFTCAP), float("-inf"))
        peak = tl.maximum(top, x)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        total = total * tl.exp(top - base) + tl.exp(x - base)
        top = peak
    peak = tl.max(top, 0)
    log_total = peak + tl.log(tl.sum(total * tl.exp(top - peak), 0))
    tl.store(losses + row, log_total - picked)
    if GRADIENT:
        tl.debug_barrier()  # every thread has read the label's logit
        for start in range(0, vocab, BLOCK):
            inside = start + at < vocab
            x = tl.load(logits + start + at, mask=inside, other=0.0).to(tl.float32)
            bent = _bend(x, scale, softcap, SOFTCAP)
            d = tl.exp(bent - log_total) - tl.where(start + at == label, 1.0, 0.0)
            if SOFTCAP:
                d = d * (1.0 - (bent / softcap) * (bent / softcap))
            tl.store(logits + start + at, d * scale, mask=inside)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """As `kernels.linear_ce.cross_entropy_reference`; the gradient overwrites `logits`."""
    rows, vocab = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        _cross_entropy[(rows,)](
            logits,
            labels,
            losses,
            vocab,
            logits.stride(0),
            ignore_index,
            scale,
            softcap or 1.0,
            SOFTCAP=softcap is not None,
            GRADIENT=with_gradient,
            BLOCK=min(4096, triton.next_power_of_2(vocab)),
            num_warps=8,
        )
    return losses, logits if with_gradient else None
