"""Triton kernels of rotary embedding: angles, rotation forward and backward, and the decode step's one pass
over a fused projection that norms, rotates and writes the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from taut.errors import RequestError
from taut.kernels.device import launch_options


@triton.jit(do_not_specialize=["positions"])
def _angles(
    positions,
    frequencies,
    cos,
    sin,
    half,
    frequency_row,
    magnitude,
    HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        # The next kernel starts when this one has ended: kernels read angles before they wait.
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, HALF)
    inside = at < half
    turn = tl.load(frequencies + token * frequency_row + at, mask=inside, other=0.0)
    angle = tl.load(positions + token).to(tl.float32) * turn
    c, s = tl.cos(angle) * magnitude, tl.sin(angle) * magnitude
    tl.store(cos + token * 2 * half + at, c, mask=inside)
    tl.store(cos + (token * 2 + 1) * half + at, c, mask=inside)
    tl.store(sin + token * 2 * half + at, -s, mask=inside)
    tl.store(sin + (token * 2 + 1) * half + at, s, mask=inside)


@triton.jit
def _rotate(
    x,
    cos,
    sin,
    out,
    heads,
    head_dim,
    dim,
    x_token,
    x_head,
    SIGN: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    """SIGN -1 turns the other way, which is the transpose: the backward pass. PAIRS: neighbours turn
    together, otherwise the halves."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = dim // 2
    at = tl.arange(0, HALF)
    pair = at < half
    inside = (head < heads)[:, None] & pair[None, :]
    source = x + token * x_token + head[:, None] * x_head
    target = out + (token * heads + head[:, None]) * head_dim
    first = 2 * at[None, :] if PAIRS else at[None, :]
    second = first + (1 if PAIRS else half)
    a = tl.load(source + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + second, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + token * dim + at, mask=pair, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * dim + half + at, mask=pair, other=0.0).to(tl.float32)[None, :] * SIGN
    tl.store(target + first, a * c - b * s, mask=inside)
    tl.store(target + second, b * c + a * s, mask=inside)
    if REST:
        rest = dim + tl.arange(0, REST)
        more = (head < heads)[:, None] & (rest < head_dim)[None, :]
        tl.store(target + rest[None, :], tl.load(source + rest[None, :], mask=more), mask=more)


@triton.jit(do_not_specialize=["slots"])
def _store(
    qkv,
    cos,
    sin,
    q_weight,
    k_weight,
    q_out,
    keys,
    values,
    slots,
    heads,
    kv_heads,
    head_dim,
    dim,
    qkv_token,
    kept,
    eps,
    offset,
    ROTATE: tl.constexpr,
    NORM: tl.constexpr,
    SHIFT: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    PDL: tl.constexpr,
):
    """Heads of one token: query heads, then key heads, then value heads. The first `kept` go to `q_out`."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    half = dim // 2
    at = tl.arange(0, HALF)[None, :]
    pair = at < half
    first = 2 * at if PAIRS else at
    second = first + (1 if PAIRS else half)
    # Slots and angles come from the step's beginning, not from the kernel just ahead.
    slot = tl.load(slots + token).to(tl.int64)
    if ROTATE:
        c = tl.load(cos + token * dim + at, mask=pair, other=0.0).to(tl.float32)
        s = tl.load(sin + token * dim + half + at, mask=pair, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    is_q = head < heads
    is_k = (head >= heads) & (head < heads + kv_heads) & (slot >= 0)
    is_v = (head >= heads + kv_heads) & (head < heads + 2 * kv_heads) & (slot >= 0)
    turns = head < heads + kv_heads
    is_kept = head < kept
    real = head < heads + 2 * kv_heads
    source = qkv + token * qkv_token + head * head_dim
    to_q = q_out + (token * kept + head) * head_dim
    to_k = keys + (slot * kv_heads + head - heads) * head_dim
    to_v = values + (slot * kv_heads + head - heads - kv_heads) * head_dim
    a = tl.load(source + first, mask=real & pair, other=0.0)
    b = tl.load(source + second, mask=real & pair, other=0.0)
    narrow = a.dtype
    a, b = a.to(tl.float32), b.to(tl.float32)
    if REST:
        last = dim + tl.arange(0, REST)[None, :]
        more = last < head_dim
        r = tl.load(source + last, mask=real & more, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if REST:
            squares += tl.sum(r * r, 1)
        rstd = tl.where(turns, tl.rsqrt(squares / head_dim + eps)[:, None], 1.0)
        weight = tl.where(is_q, q_weight, k_weight)
        wa = tl.load(weight + first, mask=turns & pair, other=0.0).to(tl.float32)
        wb = tl.load(weight + second, mask=turns & pair, other=0.0).to(tl.float32)
        if SHIFT:
            wa, wb = wa + offset, wb + offset
            a = tl.where(turns, a * rstd * wa, a)
            b = tl.where(turns, b * rstd * wb, b)
        else:
            a = tl.where(turns, (a * rstd).to(narrow).to(tl.float32) * wa, a)
            b = tl.where(turns, (b * rstd).to(narrow).to(tl.float32) * wb, b)
        # A rotation starts from the rounded norm.
        a, b = a.to(narrow).to(tl.float32), b.to(narrow).to(tl.float32)
        if REST:
            wr = tl.load(weight + last, mask=turns & more, other=0.0).to(tl.float32)
            if SHIFT:
                r = tl.where(turns, r * rstd * (wr + offset), r)
            else:
                r = tl.where(turns, (r * rstd).to(narrow).to(tl.float32) * wr, r)
    if ROTATE:
        a, b = tl.where(turns, a * c - b * s, a), tl.where(turns, b * c + a * s, b)
    tl.store(to_q + first, a, mask=is_kept & pair)
    tl.store(to_q + second, b, mask=is_kept & pair)
    tl.store(to_k + first, a, mask=is_k & pair)
    tl.store(to_k + second, b, mask=is_k & pair)
    tl.store(to_v + first, a, mask=is_v & pair)
    tl.store(to_v + second, b, mask=is_v & pair)
    if REST:
        tl.store(to_q + last, r, mask=is_kept & more)
        tl.store(to_k + last, r, mask=is_k & more)
        tl.store(to_v + last, r, mask=is_v & more)


def angles(
    positions: Tensor, frequencies: Tensor, magnitude: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin `[tokens, 1, dim]` as `rotate` takes them, in one launch.

    `positions` `[tokens]`; `frequencies` float32 `[dim / 2]`, or `[tokens, dim / 2]` where each token has
    its own; `magnitude` multiplies both.
    """
    tokens, half = positions.shape[0], frequencies.shape[-1]
    cos, sin = (torch.empty(tokens, 1, 2 * half, dtype=dtype, device=positions.device) for _ in range(2))
    if tokens:
        _angles[(tokens,)](
            positions,
            frequencies.contiguous(),
            cos,
            sin,
            half,
            half if frequencies.ndim == 2 else 0,
            float(magnitude),
            triton.next_power_of_2(half),
            num_warps=1,
            **launch_options(positions.device),
        )
    return cos, sin


def _sizes(dim: int, head_dim: int) -> tuple[int, int]:
    """Padded half of the turned features, and padded count of the others (0 for none)."""
    rest = head_dim - dim
    return triton.next_power_of_2(max(dim // 2, 1)), triton.next_power_of_2(rest) if rest else 0


def _run_rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int, interleaved: bool) -> Tensor:
    tokens, heads, head_dim = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    out = x.new_empty(tokens, heads, head_dim)
    if out.numel():
        half, rest = _sizes(cos.shape[-1], head_dim)
        many = min(triton.next_power_of_2(heads), max(2048 // half, 1))
        _rotate[tokens, triton.cdiv(heads, many)](
            x,
            cos,
            sin,
            out,
            heads,
            head_dim,
            cos.shape[-1],
            x.stride(0),
            x.stride(1),
            sign,
            interleaved,
            many,
            half,
            rest,
            num_warps=4,
        )
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _run_rotate(x, cos, sin, 1, interleaved)

    @staticmethod
    def backward(ctx, d_out: Tensor):
        return _run_rotate(d_out, *ctx.saved_tensors, -1, ctx.interleaved), None, None, None


def _check_angles(cos: Tensor, sin: Tensor, tokens: int, head_dim: int) -> None:
    dim = cos.shape[-1]
    if cos.shape != (tokens, 1, dim) or sin.shape != cos.shape or dim % 2 or dim > head_dim:
        raise RequestError(
            f"rotation got cos {list(cos.shape)} and sin {list(sin.shape)}; expected [{tokens}, 1, dim] with "
            f"an even dim of at most {head_dim}"
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """As `kernels.rope.rotate`, in one pass each way and rounded once; only the second halves of cos and sin
    are read for the angles of sin. `x` `[tokens, heads, head_dim]` may be a view of a fused projection; the
    result is contiguous. Gradients reach x alone."""
    _check_angles(cos, sin, x.shape[0], x.shape[2])
    cos, sin = cos.contiguous(), sin.contiguous()
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotate.apply(x, cos, sin, interleaved)
    return _run_rotate(x, cos, sin, 1, interleaved)


def rotate_and_store(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    interleaved: bool = False,
    keep_keys: bool = False,
) -> Tensor:
    """As `kernels.rope.rotate_and_store`, in one launch. No gradients."""
    tokens, head_dim = qkv.shape[0], keys.shape[-1]
    if qkv.ndim != 2 or qkv.shape[1] != (heads + 2 * kv_heads) * head_dim or qkv.stride(1) != 1:
        raise RequestError(
            f"qkv has shape {list(qkv.shape)}; expected [tokens, {(heads + 2 * kv_heads) * head_dim}], "
            f"{heads} + 2 * {kv_heads} heads of {head_dim}"
        )
    if not (keys.is_contiguous() and values.is_contiguous()) or keys.dtype != qkv.dtype:
        raise RequestError(f"cache pages must be contiguous and of dtype {qkv.dtype}; got {keys.dtype}")
    dim = head_dim
    if cos is not None:
        _check_angles(cos, sin, tokens, head_dim)
        cos, sin, dim = cos.contiguous(), sin.contiguous(), cos.shape[-1]
    elif head_dim % 2:
        dim = head_dim - 1  # the last feature is the rest; nothing turns
    kept = heads + kv_heads if keep_keys else heads
    out = qkv.new_empty(tokens, kept, head_dim)
    if tokens:
        half, rest = _sizes(dim, head_dim)
        many = max(512 // half, 1)
        _store[tokens, triton.cdiv(heads + 2 * kv_heads, many)](
            qkv,
            cos,
            sin,
            q_weight,
            k_weight,
            out,
            keys,
            values,
            slots,
            heads,
            kv_heads,
            head_dim,
            dim,
            qkv.stride(0),
            kept,
            eps,
            offset,
            ROTATE=cos is not None,
            NORM=q_weight is not None,
            SHIFT=offset != 0.0,
            PAIRS=interleaved and cos is not None,
            HEADS=many,
            HALF=half,
            REST=rest,
            num_warps=4,
            **launch_options(qkv.device),
        )
    return out
