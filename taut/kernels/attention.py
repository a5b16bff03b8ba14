"""Attention over packed rows, with keys of the batch itself or from cache pages.

Every implementation is a candidate in `CANDIDATES`, tried in order: each accepts a call or says why not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from taut.errors import RequestError, nearest
from taut.kernels.dispatch import device_refuses


@dataclass(frozen=True)
class Scoring:
    """How scores become weights: `softmax(softcap(q k^T * scale) + bias)` under a mask.

    `causal`: a query sees keys up to its own position; `window`: only the last `window` of those (with
    `causal` off: keys nearer than `window` on both sides); `softcap`: `cap * tanh(score / cap)`; `slopes`
    `[heads]`: ALiBi (Press et al. 2022), `slope * (key position - query position)` is added; `relative`
    `[heads, 2 * reach + 1]`: a learned bias (T5), entry `reach + key position - query position` is added,
    with distances beyond `reach` taken as `reach`, and for each query times its `gate` `[tokens, heads]`.
    `sinks` `[heads]`: learned scores that take part in the softmax as one more key would, whose value is
    nothing (GPT-OSS; Xiao et al. 2023), so that the weights of keys sum to less than 1. `bias` `[heads,
    queries, keys]` is added too, where every row has so many.
    """

    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    slopes: Tensor | None = None
    relative: Tensor | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    gate: Tensor | None = None


@dataclass(frozen=True)
class Pages:
    """Keys and values in cache pages: `keys`, `values` `[pages, page_size, kv_heads, head_dim]`, `table`
    `[rows, max_pages]` the page numbers of each row, `lengths` `[rows]` keys a row, `longest` their host
    maximum. A row's queries are the last of its positions. `first`: where there is one row and its pages lie
    one after the other, the first of them, on the host."""

    keys: Tensor
    values: Tensor
    table: Tensor
    lengths: Tensor
    longest: int
    first: int | None = None

    def row(self, row: int, count: int) -> tuple[Tensor, Tensor]:
        """The first `count` keys and values of a row, `[count, kv_heads, head_dim]`; views where they lie
        together."""
        used = -(-count // self.keys.shape[1])
        if self.first is not None:
            place = slice(self.first, self.first + used)
            return self.keys[place].flatten(0, 1)[:count], self.values[place].flatten(0, 1)[:count]
        table = self.table[row, :used]
        k, v = self.keys.index_select(0, table), self.values.index_select(0, table)
        return k.flatten(0, 1)[:count], v.flatten(0, 1)[:count]


@dataclass(frozen=True)
class KeyRows:
    """Where the rows of keys begin and end if they aren't those of the queries (cross-attention): `starts`
    `[rows + 1]` int32 their boundaries, `longest` the longest on the host."""

    starts: Tensor
    longest: int


@dataclass(frozen=True)
class Call:
    """What candidates decide by: `rows` of at most `longest` queries, all of them in `q` `[tokens, heads,
    head_dim]`; the rest as `attention` takes it. `kv_heads` None: as many as there are heads."""

    q: Tensor
    rows: int
    longest: int
    scoring: Scoring
    pages: Pages | None = None
    kv_heads: int | None = None
    key_rows: KeyRows | None = None

    @property
    def even(self) -> bool:
        """Whether all rows have one length."""
        return self.q.shape[0] == self.rows * self.longest


@dataclass(frozen=True)
class Candidate:
    """One implementation: `refuse` says why it can't take a call, or None; `run` takes what `attention`
    takes, less the restriction. `backend` is what PyTorch calls its kind."""

    refuse: Callable[[Call], str | None]
    run: Callable[..., Tensor]
    backend: str | None = None


def attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    starts: Tensor,
    longest: int,
    scoring: Scoring,
    pages: Pages | None = None,
    only: tuple[str, ...] | None = None,
    key_rows: KeyRows | None = None,
) -> Tensor:
    """Attention of packed queries, by the first candidate that takes the call.

    `q` `[tokens, heads, head_dim]`; `starts` `[rows + 1]` the row boundaries; keys are `k`, `v`
    `[tokens, kv_heads, head_dim]`, with the same boundaries or those of `key_rows`, or they are those in
    `pages`. Query head h reads key head `h // (heads / kv_heads)`. Gives `[tokens, heads, head_dim]`; a query
    whose row has no keys gives zeros. `only` names the candidates allowed; `taut.attention_kernel` and
    PyTorch's `sdpa_kernel` restrict them as well. Where none is left, the `RequestError` lists each with its
    reason.
    """
    kv_heads = None if k is None else k.shape[1]
    call = Call(q, starts.shape[0] - 1, longest, scoring, pages, kv_heads, key_rows)
    reasons = []
    for name, candidate in CANDIDATES.items():
        why = _refusal(name, candidate, call, only)
        if why is None:
            try:
                return candidate.run(q, k, v, starts, longest, scoring, pages, key_rows)
            except RuntimeError as error:  # what `sdpa_kernel` leaves it can't take this call
                if name != "sdpa" or not str(error).startswith(_NONE_LEFT):
                    raise
                why = f"PyTorch: {error}"
        reasons.append(f"{name}: {why}")
    raise RequestError("no attention implementation is left: " + "; ".join(reasons))


# How PyTorch's error begins where none of its own kinds of attention is left: on a CPU, on a GPU.
_NONE_LEFT = ("No viable backend for scaled_dot_product_attention", "No available kernel")


def explain(call: Call, only: tuple[str, ...] | None = None) -> list[tuple[str, str | None]]:
    """Each candidate in order, with why it can't take the call, or None. The first that can is taken."""
    return [(name, _refusal(name, candidate, call, only)) for name, candidate in CANDIDATES.items()]


# Where the weights of each call go, if anyone asks for them: one tensor `[heads, queries, keys]` a row.
_weights: ContextVar[list[tuple[Tensor, ...]] | None] = ContextVar("taut_attention_weights", default=None)


@contextmanager
def attention_weights() -> Iterator[list[tuple[Tensor, ...]]]:
    """Inside the block attention runs on the reference, which alone has weights, and the list that this gives
    gets those of each call: one tensor `[heads, queries, keys]` for each row that has queries."""
    token = _weights.set([])
    try:
        yield _weights.get()
    finally:
        _weights.reset(token)


# PyTorch's own switches, which `sdpa_kernel` sets, by the kind of attention they allow.
BACKENDS: Mapping[str, Callable[[], bool]] = MappingProxyType(
    {
        "flash": torch.backends.cuda.flash_sdp_enabled,
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled,
        "math": torch.backends.cuda.math_sdp_enabled,
    }
)

# The candidates that `attention_kernel` allows in this context; None for all.
_allowed: ContextVar[tuple[str, ...] | None] = ContextVar("taut_attention_kernel", default=None)


@contextmanager
def attention_kernel(*names: str) -> Iterator[None]:
    """Allow only these implementations of attention inside the block, as `torch.nn.attention.sdpa_kernel`
    does for PyTorch's (which Taut obeys too). Where none of them can take a call, it raises."""
    for name in names:
        if name not in CANDIDATES:
            raise RequestError(
                f"attention kernel {name!r} is unknown; known: {', '.join(CANDIDATES)}"
                f"{nearest(name, CANDIDATES)}"
            )
    token = _allowed.set(names)
    try:
        yield
    finally:
        _allowed.reset(token)


def restrictions() -> tuple[object, ...]:
    """What restricts the candidates in this context, as a key for whatever is made under it."""
    return _allowed.get(), *(enabled() for enabled in BACKENDS.values())


def _refusal(name: str, candidate: Candidate, call: Call, only: tuple[str, ...] | None) -> str | None:
    for allowed in (only, _allowed.get()):
        if allowed is not None and name not in allowed:
            return f"not among the implementations asked for ({', '.join(allowed)})"
    if _weights.get() is not None and name != "eager":
        return "has no attention weights to give"
    if candidate.backend is not None and not BACKENDS[candidate.backend]():
        return f"PyTorch's sdpa_kernel leaves {candidate.backend} attention out"
    return candidate.refuse(call)


def _rows(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    starts: Tensor,
    pages: Pages | None,
    key_rows: KeyRows | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each row's queries, keys and values."""
    bounds = starts.tolist()
    key_bounds = bounds if key_rows is None else key_rows.starts.tolist()
    lengths = pages.lengths.tolist() if pages is not None else None
    for row, (begin, end) in enumerate(pairwise(bounds)):
        if begin == end:
            continue
        if pages is None:
            own = slice(key_bounds[row], key_bounds[row + 1])
            yield q[begin:end], k[own], v[own]
        else:
            yield q[begin:end], *pages.row(row, lengths[row])


def _gated(scoring: Scoring, own: slice, rows: int | None = None) -> Scoring:
    """The scoring of some of the tokens, its gate `[queries, heads]`, or `[rows, queries, heads]`."""
    if scoring.gate is None:
        return scoring
    gate = scoring.gate[own]
    return replace(scoring, gate=gate if rows is None else gate.unflatten(0, (rows, -1)))


def _visible(queries: int, keys: int, scoring: Scoring, device: torch.device) -> Tensor | None:
    """Boolean `[queries, keys]` of what each query sees, or None where it sees everything."""
    if not (scoring.causal and queries > 1) and (scoring.window is None or scoring.window >= keys):
        return None
    # Distance from key to query; the queries are the last positions of the row.
    ahead = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    seen = ahead >= 0 if scoring.causal else torch.ones_like(ahead, dtype=torch.bool)
    if scoring.window is not None:
        seen &= ahead < scoring.window
        if not scoring.causal:
            seen &= ahead > -scoring.window
    return seen


def _alibi(queries: int, keys: int, slopes: Tensor) -> Tensor:
    """ALiBi bias `[heads, queries, keys]` in float32, or float64 for such slopes."""
    wide = torch.promote_types(slopes.dtype, torch.float32)
    at = torch.arange(keys, device=slopes.device, dtype=wide)
    return slopes.to(wide)[:, None, None] * (at - at[keys - queries :, None])


def _relative(queries: int, keys: int, table: Tensor) -> Tensor:
    """Relative bias `[heads, queries, keys]` from its table `[heads, 2 * reach + 1]`."""
    reach = table.shape[1] // 2
    at = torch.arange(keys, device=table.device)
    return table[:, (at - at[keys - queries :, None]).clamp(-reach, reach) + reach]


def _bias(queries: int, keys: int, scoring: Scoring) -> Tensor | None:
    """What is added to the scores of a row, `[heads, queries, keys]`, or None; where rows are gated, with
    their dimension in front."""
    bias = None if scoring.slopes is None else _alibi(queries, keys, scoring.slopes)
    if scoring.relative is not None:
        relative = _relative(queries, keys, scoring.relative)
        if scoring.gate is not None:
            relative = relative * scoring.gate.mT[..., None]
        bias = relative if bias is None else bias + relative
    if scoring.bias is not None:
        bias = scoring.bias if bias is None else bias + scoring.bias
    return bias


def _reference(q, k, v, starts, longest, scoring, pages, key_rows=None):
    """The definition of right: one row at a time, scores in float32 (float64 for float64 input)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // (k if pages is None else pages.keys).shape[-2]
    out, weights, at = [], [], 0
    for qr, kr, vr in _rows(q, k, v, starts, pages, key_rows):
        own, at = slice(at, at + len(qr)), at + len(qr)
        kr, vr = (t.to(wide).repeat_interleave(group, 1) for t in (kr, vr))
        scores = torch.einsum("qhd,khd->hqk", qr.to(wide), kr) * scoring.scale
        if scoring.softcap is not None:
            scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
        if (bias := _bias(len(qr), len(kr), _gated(scoring, own))) is not None:
            scores = scores + bias.to(wide)
        if (seen := _visible(len(qr), len(kr), scoring, q.device)) is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        if scoring.sinks is not None:
            sinks = scoring.sinks.to(wide)[:, None, None].expand(-1, len(qr), 1)
            shares = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
        else:
            shares = scores.softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", shares, vr).to(q.dtype))
        if _weights.get() is not None:
            weights.append(shares)
    if (calls := _weights.get()) is not None:
        calls.append(tuple(weights))
    return torch.cat(out) if out else q.new_zeros(q.shape)


def _sdpa(q, k, v, starts, longest, scoring, pages, key_rows):
    """PyTorch's scaled_dot_product_attention: neighbouring rows of one length in one call."""
    rows, keys = starts.shape[0] - 1, longest if key_rows is None else key_rows.longest
    if q.shape[0] == 0:
        return torch.zeros_like(q)
    if pages is not None and longest == 1 and q.shape[0] == rows:
        return _sdpa_one_query(q, scoring, pages)
    if pages is None and q.shape[0] == rows * longest and k.shape[0] == rows * keys:
        q = q.unflatten(0, (rows, longest))
        k, v = (t.unflatten(0, (rows, keys)) for t in (k, v))
        return _sdpa_dense(q, k, v, _gated(scoring, slice(None), rows)).flatten(0, 1)
    if pages is None:
        return _sdpa_runs(q, k, v, starts, scoring, key_rows)
    return torch.cat(
        [
            _sdpa_dense(qr[None], kr[None], vr[None], scoring)[0]
            for qr, kr, vr in _rows(q, k, v, starts, pages, key_rows)
        ]
    )


def _sdpa_runs(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scoring: Scoring, key_rows: KeyRows | None
) -> Tensor:
    """A call for each run of neighbouring rows with as many queries and keys: batches sorted by length have
    few of them."""
    queries = starts.diff().tolist()
    keys = queries if key_rows is None else key_rows.starts.diff().tolist()
    out, at, key_at = [], 0, 0
    for (width, key_width), run in groupby(zip(queries, keys, strict=True)):
        rows = sum(1 for _ in run)
        own, seen = slice(at, at + rows * width), slice(key_at, key_at + rows * key_width)
        at, key_at = own.stop, seen.stop
        if not width or not key_width:
            out.append(torch.zeros_like(q[own]))
            continue
        k_rows, v_rows = (t[seen].unflatten(0, (rows, key_width)) for t in (k, v))
        q_rows, gated = q[own].unflatten(0, (rows, width)), _gated(scoring, own, rows)
        out.append(_sdpa_dense(q_rows, k_rows, v_rows, gated).flatten(0, 1))
    return torch.cat(out)


def _sdpa_dense(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """`q` `[rows, queries, heads, head_dim]`, `k`, `v` `[rows, keys, kv_heads, head_dim]` -> like q."""
    queries, keys = q.shape[1], k.shape[1]
    whole = scoring.window is None or scoring.window >= keys
    added = (scoring.slopes, scoring.relative, scoring.sinks, scoring.bias)
    plain = all(one is None for one in added)
    triangle = scoring.causal and whole and queries == keys and plain
    mask = None if triangle else _visible(queries, keys, scoring, q.device)
    if (bias := _bias(queries, keys, scoring)) is not None:
        mask = (bias if mask is None else bias.masked_fill(~mask, float("-inf"))).to(q.dtype)
    if scoring.sinks is not None:
        k, v, mask = _with_sinks(k, v, mask, scoring.sinks[:, None, None].expand(-1, queries, 1))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(
        q,
        k,
        v,
        _for_all_rows(mask),
        is_causal=triangle and queries > 1,
        scale=scoring.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2)


def _for_all_rows(mask: Tensor | None) -> Tensor | None:
    """A mask as all of PyTorch's kinds take it: flash attention on CPUs wants two dimensions or four."""
    return mask[None] if mask is not None and mask.ndim == 3 else mask


def _with_sinks(k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sinks as one more key: its score is the mask's alone, since it is zero, and so is its value. `k`, `v`
    `[rows, keys, kv_heads, head_dim]`, `mask` of what is seen or to be added, `sinks` `[..., queries, 1]`."""
    k, v = (torch.cat((t, t.new_zeros(t.shape[0], 1, *t.shape[2:])), 1) for t in (k, v))
    if mask is None:
        mask = k.new_zeros(())
    elif mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=k.dtype).masked_fill(~mask, float("-inf"))
    sinks = sinks.to(k.dtype)
    shape = torch.broadcast_shapes(mask.shape[:-1], sinks.shape[:-1])
    return k, v, torch.cat((mask.expand(*shape, k.shape[1] - 1), sinks.expand(*shape, 1)), -1)


def _sdpa_one_query(q: Tensor, scoring: Scoring, pages: Pages) -> Tensor:
    """Decoding: one query a row. The heads that share a key head become that head's queries, so keys are
    read once and never repeated."""
    rows, heads, dim = q.shape
    size, kv_heads = pages.keys.shape[1:3]
    if rows == 1:
        k, v = (t.unsqueeze(0) for t in pages.row(0, pages.longest))
    else:
        used = -(-pages.longest // size)
        table = pages.table[:, :used].flatten()
        k, v = (
            t.index_select(0, table).view(rows, used * size, kv_heads, dim)[:, : pages.longest]
            for t in (pages.keys, pages.values)
        )
    kind = q.dtype
    if q.is_cpu and heads == kv_heads and kind is torch.bfloat16:
        # One query a key head: PyTorch's bfloat16 products of one row are slower than the conversion.
        q, k, v = q.float(), k.float(), v.float()
    bias = None
    # On a GPU `longest` may be a bound that a graph was made for, so that even one row needs its mask.
    biased = scoring.slopes is not None or scoring.relative is not None
    if rows > 1 or q.is_cuda or biased or scoring.window is not None:
        # Keys before the query (`behind` 0 is the query's own): [rows, keys]
        behind = pages.lengths[:, None] - 1 - torch.arange(pages.longest, device=q.device)
        seen = behind >= 0
        if scoring.window is not None:
            seen &= behind < scoring.window
        seen = bias = seen[:, None, None]
        if biased:
            bias = _bias_of_last(behind, kv_heads, scoring).masked_fill(~seen, float("-inf")).to(q.dtype)
    if scoring.sinks is not None:
        k, v, bias = _with_sinks(k, v, bias, scoring.sinks.view(kv_heads, -1, 1))
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q.view(rows, kv_heads, heads // kv_heads, dim), k, v, _for_all_rows(bias), scale=scoring.scale
    )
    return out.reshape(rows, heads, dim).to(kind)


def _bias_of_last(behind: Tensor, kv_heads: int, scoring: Scoring) -> Tensor:
    """What is added to the scores of each row's last query, `[rows, kv_heads, group, keys]`; `behind`
    `[rows, keys]` is query position - key position."""
    bias = behind.new_zeros((), dtype=torch.float32)
    if scoring.slopes is not None:
        slope = scoring.slopes.to(torch.promote_types(scoring.slopes.dtype, torch.float32))
        bias = slope.view(kv_heads, -1, 1) * -behind[:, None, None]
    if scoring.relative is not None:
        reach = scoring.relative.shape[1] // 2
        relative = scoring.relative[:, (-behind).clamp(-reach, reach) + reach]  # [heads, rows, keys]
        bias = bias + relative.transpose(0, 1).unflatten(1, (kv_heads, -1))
    return bias


def _sdpa_refuses(call: Call) -> str | None:
    kinds = ("flash", "math") if call.q.is_cpu else tuple(BACKENDS)
    if not any(BACKENDS[kind]() for kind in kinds):
        return f"PyTorch's sdpa_kernel leaves out what it has here ({', '.join(kinds)})"
    if call.scoring.softcap is not None:
        return f"scaled_dot_product_attention has no soft-cap (asked: {call.scoring.softcap})"
    if call.pages is not None and (call.scoring.bias is not None or call.scoring.gate is not None):
        return "takes what each pair has of its own for keys of the batch alone"
    return None


def _flash_refuses(call: Call) -> str | None:
    if (why := device_refuses(call.q.device)) is not None:
        return why
    if call.scoring.bias is not None or call.scoring.gate is not None:
        return "adds nothing that each pair of a query and a key has of its own"
    from taut.kernels.flash import why_not

    return why_not(call.q, call.scoring)


def _flash(q, k, v, starts, longest, scoring, pages, key_rows):
    """Taut's FlashAttention over packed rows; see `kernels.flash`."""
    from taut.kernels.flash import flash_attention

    key_starts = None if key_rows is None else key_rows.starts
    return flash_attention(q, k, v, starts, longest, scoring, pages, key_starts)


def _paged_refuses(call: Call) -> str | None:
    if call.q.device.type == "cpu":
        from taut.kernels import paged_llvm

        return paged_llvm.refuses(call.q, call.longest, call.scoring, call.pages)
    if (why := device_refuses(call.q.device)) is not None:
        return why
    if call.scoring.bias is not None or call.scoring.gate is not None:
        return "adds nothing that each pair of a query and a key has of its own"
    from taut.kernels.paged_triton import refuses

    return refuses(call.q, call.longest, call.scoring, call.pages)


def _paged(q, k, v, starts, longest, scoring, pages, key_rows):
    """Taut's decode attention, split over the keys; see `kernels.paged_triton` and `kernels.paged_llvm`."""
    if q.device.type == "cpu":
        from taut.kernels.paged_llvm import paged_attention as on_cpu

        return on_cpu(q, starts, scoring, pages)
    from taut.kernels.paged_triton import paged_attention

    return paged_attention(q, starts, longest, scoring, pages)


def _packed_refuses(call: Call) -> str | None:
    from taut.kernels.attention_llvm import refuses

    return refuses(call)


def _packed(q, k, v, starts, longest, scoring, pages, key_rows):
    """Taut's attention of packed rows on a CPU; see `kernels.attention_llvm`."""
    from taut.kernels.attention_llvm import packed_attention

    return packed_attention(q, k, v, starts, longest, scoring, key_rows)


# Head dim, and from how many queries a row cuDNN is ahead of `flash`: without and with a backward pass.
_CUDNN_WINS = MappingProxyType({64: (1024, 1024), 128: (1024, 1024)})


def _cudnn_refuses(call: Call) -> str | None:
    q, scoring = call.q, call.scoring
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        return "was measured to win on Hopper GPUs only"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    if call.pages is not None:
        return "takes no keys from cache pages"
    if not call.even or call.key_rows is not None:
        return "wants rows of one length, the same for queries and keys"
    extra = {"window": scoring.window, "softcap": scoring.softcap, "ALiBi": scoring.slopes}
    extra |= {"relative bias": scoring.relative, "sinks": scoring.sinks, "bias": scoring.bias}
    if (odd := next((name for name, value in extra.items() if value is not None), None)) is not None:
        return f"is for plain attention, and this has a {odd}"
    if call.kv_heads not in (None, q.shape[1]):
        return "wants as many key heads as query heads"
    backward = torch.is_grad_enabled() and q.requires_grad
    least = _CUDNN_WINS.get(q.shape[2], (None, None))[backward]
    if least is None or call.longest < least:
        return f"flash is as fast for {call.longest} queries a row of head dim {q.shape[2]}"
    return None


def _cudnn(q, k, v, starts, longest, scoring, pages, key_rows):
    """cuDNN's attention, through PyTorch: for rows of one length."""
    q, k, v = (t.unflatten(0, (-1, longest)).transpose(1, 2) for t in (q, k, v))
    backward = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, backward, 0.0, scoring.causal, False, scale=scoring.scale
    )[0]
    return out.transpose(1, 2).flatten(0, 1)


CANDIDATES: Mapping[str, Candidate] = MappingProxyType(
    {
        "paged": Candidate(_paged_refuses, _paged, backend="flash"),
        "cudnn": Candidate(_cudnn_refuses, _cudnn, backend="cudnn"),
        "flash": Candidate(_flash_refuses, _flash, backend="flash"),
        "packed": Candidate(_packed_refuses, _packed, backend="flash"),
        "sdpa": Candidate(_sdpa_refuses, _sdpa),
        "eager": Candidate(lambda call: None, _reference, backend="math"),
    }
)
