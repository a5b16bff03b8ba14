"""Head projection and cross-entropy in chunks of tokens: the logits of a long batch never exist whole.

The gradient of the logits is known as soon as they are, so the forward pass turns each chunk into gradients
of the hidden states and the weight at once and keeps only those (Liger-Kernel, Hsu et al. 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from taut.errors import RequestError

# Logits of a chunk: at most this many numbers, and at least one token.
CHUNK_LOGITS = 1 << 26


def cross_entropy_reference(
    logits: Tensor,
    labels: Tensor,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Loss of each token `[tokens]` in float32 (float64 for float64 logits), 0 where ignored, and the
    gradient of their sum `[tokens, vocab]` in the dtype of `logits`; the logits are not needed afterwards."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        bent = torch.tanh(wide / softcap)
        wide = softcap * bent
    kept = labels != ignore_index
    at = labels.where(kept, 0).unsqueeze(1)
    total = wide.logsumexp(-1, keepdim=True)
    losses = (total - wide.gather(1, at)).squeeze(1).where(kept, 0.0)
    if not with_gradient:
        return losses, None
    gradient = (wide - total).exp_()
    gradient.scatter_add_(1, at, gradient.new_full((1, 1), -1.0).expand(at.shape))
    if softcap is not None:
        gradient *= 1 - bent.square_()
    gradient *= scale
    return losses, gradient.masked_fill_(~kept.unsqueeze(1), 0.0).to(logits.dtype)


def _cross_entropy(logits, labels, scale, softcap, ignore_index, with_gradient):
    if logits.is_cuda and logits.dtype != torch.float64:
        from taut.kernels.linear_ce_triton import cross_entropy

        return cross_entropy(logits, labels, scale, softcap, ignore_index, with_gradient)
    return cross_entropy_reference(logits, labels, scale, softcap, ignore_index, with_gradient)


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum of losses; gradients are computed here and only scaled in `backward`."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, scale, softcap, ignore_index, chunk, run):
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        with_gradient = wants_hidden or wants_weight or wants_bias
        wide = torch.promote_types(hidden.dtype, torch.float32)
        tokens = hidden.shape[0]
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Sums over chunks are kept wide; a single chunk needs no sum.
        d_weight = torch.zeros_like(weight, dtype=wide) if wants_weight and tokens > chunk else None
        d_bias = torch.zeros_like(bias, dtype=wide) if wants_bias else None
        for begin in range(0, tokens, chunk):
            part = hidden[begin : begin + chunk]
            logits = torch.nn.functional.linear(part, weight, bias)
            answers = labels[begin : begin + chunk]
            losses, gradient = run(logits, answers, scale, softcap, ignore_index, with_gradient)
            del logits
            loss += losses.sum()
            if wants_hidden:
                torch.mm(gradient, weight, out=d_hidden[begin : begin + chunk])
            if wants_weight:
                product = gradient.T @ part
                d_weight = product if d_weight is None else d_weight.add_(product)
            if wants_bias:
                d_bias += gradient.sum(0, dtype=wide)
        if wants_weight and d_weight is None:
            d_weight = torch.zeros_like(weight)
        saved = [d_hidden, d_weight, d_bias]
        ctx.save_for_backward(*saved)
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype if bias is not None else None
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        gradients = [
            None if t is None else (t * d_loss.to(t.dtype)).to(dtype)
            for t, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None, None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    divisor: Tensor | float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Cross-entropy of `scale * (hidden W^T + bias)`, bent to `softcap * tanh(that / softcap)` where there is
    a `softcap`, against `labels`: a scalar.

    `hidden` `[tokens, dim]`, `weight` `[vocab, dim]`, `labels` `[tokens]` of classes (already shifted);
    tokens labelled `ignore_index` count for nothing. The sum of losses is divided by `divisor`, by default
    the number of tokens that count (none: the loss is NaN, as PyTorch's, and the gradients are zero).
    `chunk`: tokens whose logits exist at a time. Float32 (float64 for float64 input); differentiable once in
    hidden, weight and bias.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise RequestError(
            f"hidden is {list(hidden.shape)} and the head {list(weight.shape)}; expected [tokens, dim] and "
            "[vocab, dim]"
        )
    if labels.shape != hidden.shape[:1]:
        raise RequestError(
            f"labels have shape {list(labels.shape)}; expected [{hidden.shape[0]}], one a token"
        )
    if softcap is not None and softcap <= 0:
        raise RequestError(f"softcap is {softcap}; expected a positive number")
    chunk = chunk or max(1, CHUNK_LOGITS // weight.shape[0])
    total = _LinearCrossEntropy.apply(
        hidden, weight, bias, labels, scale, softcap, ignore_index, chunk, _cross_entropy
    )
    if divisor is None:
        counted = (labels != ignore_index).sum()
        # 0 / 0 for the loss, but gradients of zero.
        return total / counted.clamp(min=1) + torch.where(counted > 0, 0.0, float("nan")).to(total.dtype)
    return total / divisor
