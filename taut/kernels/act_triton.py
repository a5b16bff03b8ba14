"""Triton kernels of the gated activations, forward and backward, and the activations other kernels fuse."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from taut.errors import RequestError
from taut.kernels.act import ACTIVATIONS
from taut.kernels.device import launch_options

_BLOCK = 1024


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The activation named ACT of float32 `x`."""
    if ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) is sigmoid(2u)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "gelu_quick":
        y = x * tl.sigmoid(1.702 * x)
    elif ACT == "relu":
        y = tl.maximum(x, 0.0)
    elif ACT == "tanh":
        y = 2 * tl.sigmoid(2 * x) - 1
    else:
        tl.static_assert(ACT == "relu2")
        r = tl.maximum(x, 0.0)
        y = r * r
    return y


@triton.jit
def slope(x, ACT: tl.constexpr):
    """The derivative of the activation named ACT at float32 `x`."""
    if ACT == "silu":
        s = tl.sigmoid(x)
        d = s * (1 + x * (1 - s))
    elif ACT == "gelu":
        d = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        d = s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif ACT == "gelu_quick":
        s = tl.sigmoid(1.702 * x)
        d = s * (1 + 1.702 * x * (1 - s))
    elif ACT == "relu":
        d = tl.where(x > 0, 1.0, 0.0)
    elif ACT == "tanh":
        t = 2 * tl.sigmoid(2 * x) - 1
        d = 1 - t * t
    else:
        tl.static_assert(ACT == "relu2")
        d = 2 * tl.maximum(x, 0.0)
    return d


@triton.jit
def gated(gate, up, ACT: tl.constexpr, LIMIT: tl.constexpr):
    """`act(gate) * up` of float32; LIMIT as `kernels.act.glu` takes it, 0 for none."""
    if LIMIT > 0:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1
    return activate(gate, ACT) * up


@triton.jit
def _forward(
    gate_up, out, hidden, row, ACT: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < hidden
    gate = tl.load(gate_up + token * row + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * row + hidden + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + at, gated(gate, up, ACT, LIMIT), mask=inside)


@triton.jit
def _backward(
    gate_up, d_out, d_gate_up, hidden, row, d_row,
    ACT: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < hidden
    gate = tl.load(gate_up + token * row + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * row + hidden + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(d_out + token * d_row + at, mask=inside, other=0.0).to(tl.float32)
    d_gate = d
    d_up = d
    if LIMIT > 0:
        d_gate = tl.where(gate <= LIMIT, d, 0.0)
        d_up = tl.where(tl.abs(up) <= LIMIT, d, 0.0)
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT) + 1
    tl.store(d_gate_up + token * 2 * hidden + at, d_gate * up * slope(gate, ACT), mask=inside)
    tl.store(d_gate_up + (token * 2 + 1) * hidden + at, d_up * activate(gate, ACT), mask=inside)


def _run_forward(gate_up: Tensor, act: str, limit: float | None) -> Tensor:
    tokens, hidden = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(tokens, hidden)
    if out.numel():
        grid = (tokens, triton.cdiv(hidden, _BLOCK))
        _forward[grid](
            gate_up,
            out,
            hidden,
            gate_up.stride(0),
            act,
            limit or 0.0,
            _BLOCK,
            num_warps=4,
            **launch_options(gate_up.device),
        )
    return out


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor, act: str, limit: float | None) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.act, ctx.limit = act, limit
        return _run_forward(gate_up, act, limit)

    @staticmethod
    def backward(ctx, d_out: Tensor):
        (gate_up,) = ctx.saved_tensors
        tokens, hidden = d_out.shape
        d_out = d_out if d_out.stride(1) == 1 else d_out.contiguous()
        d_gate_up = gate_up.new_empty(gate_up.shape)
        if d_out.numel():
            _backward[tokens, triton.cdiv(hidden, _BLOCK)](
                gate_up,
                d_out,
                d_gate_up,
                hidden,
                gate_up.stride(0),
                d_out.stride(0),
                ctx.act,
                ctx.limit or 0.0,
                _BLOCK,
                num_warps=4,
            )
        return d_gate_up, None, None


def glu(gate_up: Tensor, act: str, limit: float | None = None) -> Tensor:
    """`act(gate) * up` in float32, rounded once: `gate_up` `[tokens, 2 * hidden]` -> `[tokens, hidden]`.
    The same as `kernels.act.glu`, in one pass, with a backward in one pass."""
    if act not in ACTIVATIONS:
        raise RequestError(f"activation {act!r} is unknown; known: {', '.join(ACTIVATIONS)}")
    if gate_up.ndim != 2 or gate_up.shape[1] % 2:
        raise RequestError(f"glu takes [tokens, 2 * hidden]; got shape {list(gate_up.shape)}")
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    if torch.is_grad_enabled() and gate_up.requires_grad:
        return _Glu.apply(gate_up, act, limit)
    return _run_forward(gate_up, act, limit)
