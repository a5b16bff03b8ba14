"""Triton kernel of `kernels.lookup`: rows are read once, and nothing is written between sum and norm."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from taut.kernels.lookup import MOST_TABLES, Lookup
from taut.kernels.norm_triton import tile


@triton.jit
def _rows(table, index, stride, offset, count, token, inside, at, wide, dim, KIND: tl.constexpr):
    """Rows of a table, float32 `[ROWS, BLOCK]`. KIND: 2 by index, 1 the row at the offset, 0 no table."""
    if KIND == 2:
        row = tl.load(index + token * stride, mask=inside, other=0).to(tl.int64) + offset
        tl.device_assert((row >= 0) & (row < count), "an index is not a row of its table", mask=inside)
        place = row[:, None] * dim + at[None, :]
        return tl.load(table + place, mask=inside[:, None] & wide[None, :], other=0.0).to(tl.float32)
    else:
        return tl.load(table + offset * dim + at, mask=wide, other=0.0).to(tl.float32)[None, :]


_EACH = tuple(f"{name}{at}" for name in "isoc" for at in range(MOST_TABLES))


@triton.jit(do_not_specialize=("tokens", *_EACH))
def _summed_norm(
    t0, i0, s0, o0, c0, t1, i1, s1, o1, c1, t2, i2, s2, o2, c2, weight, bias, y, tokens, dim, eps,
    K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = token < tokens
    at = tl.arange(0, BLOCK)
    wide = at < dim
    v = _rows(t0, i0, s0, o0, c0, token, inside, at, wide, dim, K0)
    if K1:
        v += _rows(t1, i1, s1, o1, c1, token, inside, at, wide, dim, K1)
    if K2:
        v += _rows(t2, i2, s2, o2, c2, token, inside, at, wide, dim, K2)
    there = inside[:, None] & wide[None, :]
    v = tl.where(there, v - (tl.sum(v, 1) / dim)[:, None], 0.0)
    v = v * tl.rsqrt(tl.sum(v * v, 1) / dim + eps)[:, None]
    v = v * tl.load(weight + at, mask=wide, other=0.0)[None, :].to(tl.float32)
    if BIAS:
        v += tl.load(bias + at, mask=wide, other=0.0)[None, :].to(tl.float32)
    tl.store(y + token[:, None] * dim + at[None, :], v, mask=there)


def summed_norm(lookups: Sequence[Lookup], weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """As `kernels.lookup.summed_norm`, rounded once. An index that is not a row of its table is an assertion
    that fails on the device, as in PyTorch's embedding."""
    tokens, dim = lookups[0].index.shape[0], weight.shape[0]
    y = weight.new_empty(tokens, dim)
    given, kinds = [], []
    for one in lookups:
        stride = 0 if one.index is None else one.index.stride(0)
        given += [one.table, one.index, stride, one.offset, one.table.shape[0]]
        kinds.append(1 if one.index is None else 2)
    missing = MOST_TABLES - len(lookups)
    if tokens:
        rows, block, warps = tile(dim)
        _summed_norm[(triton.cdiv(tokens, rows),)](
            *given,
            *(None, None, 0, 0, 0) * missing,
            weight,
            bias,
            y,
            tokens,
            dim,
            eps,
            *kinds,
            *(0,) * missing,
            BIAS=bias is not None,
            ROWS=rows,
            BLOCK=block,
            num_warps=warps,
            debug=True,  # for the assertion, and nothing else
            sanitize_overflow=False,
        )
    return y
