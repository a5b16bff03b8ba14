"""Attention over packed rows against its definition, one query and one key at a time in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from taut.errors import RequestError
from taut.kernels.attention import CANDIDATES, Call, KeyRows, Pages, Scoring, attention

ROWS = (5, 1, 0, 17, 8)
# A bias for each head and distance up to 6: less than the longest row has.
TABLE = torch.randn(6, 13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
SCORINGS = {
    "causal": Scoring(0.3),
    "full": Scoring(0.3, causal=False),
    "window": Scoring(0.3, window=4),
    "window-of-one": Scoring(0.3, window=1),
    "full-window": Scoring(0.3, causal=False, window=3),
    "softcap": Scoring(0.9, softcap=0.7),
    "alibi": Scoring(0.3, slopes=torch.tensor([0.5, 0.25, 0.125, 0.1, 0.01, 1.0], dtype=torch.float64)),
    "alibi-window": Scoring(0.3, window=6, slopes=torch.linspace(0.1, 1, 6, dtype=torch.float64)),
    "relative": Scoring(0.3, relative=TABLE),
    "full-relative": Scoring(0.3, causal=False, relative=TABLE),
    "sinks": Scoring(0.3, sinks=torch.linspace(-1, 2, 6, dtype=torch.float64)),
    "sinks-alibi-window": Scoring(
        0.3,
        window=6,
        slopes=torch.linspace(0.1, 1, 6, dtype=torch.float64),
        sinks=torch.linspace(-1, 2, 6, dtype=torch.float64),
    ),
    "everything": Scoring(1.1, window=7, softcap=1.3, slopes=torch.linspace(0.1, 1, 6, dtype=torch.float64)),
}


def defined(q, k, v, s: Scoring):
    """One row: `q` `[n, heads, dim]`, the last n of the m positions of `k`, `v` `[m, kv_heads, dim]`."""
    n, heads, _ = q.shape
    m, group = len(k), heads // k.shape[1]
    out = torch.zeros_like(q)
    for i in range(n):
        at = m - n + i
        for h in range(heads):
            scores, values = [], []
            for j in range(m):
                if (s.causal and j > at) or (s.window is not None and abs(at - j) >= s.window):
                    continue
                score = (q[i, h] @ k[j, h // group]) * s.scale
                if s.softcap is not None:
                    score = s.softcap * torch.tanh(score / s.softcap)
                if s.slopes is not None:
                    score = score + s.slopes[h] * (j - at)
                if s.relative is not None:
                    gate = 1 if s.gate is None else s.gate[i, h]
                    score = score + s.relative[h, min(max(j - at, -6), 6) + 6] * gate
                scores.append(score)
                values.append(v[j, h // group])
            if s.sinks is not None:
                scores.append(s.sinks[h])
                values.append(torch.zeros_like(v[0, 0]))
            out[i, h] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out


def draw(kv_heads: int, requires_grad: bool = False):
    generator = torch.Generator().manual_seed(kv_heads)
    tokens = sum(ROWS)
    return (
        torch.randn(tokens, heads, 8, generator=generator, dtype=torch.float64, requires_grad=requires_grad)
        for heads in (6, kv_heads, kv_heads)
    )


def bounds(counts) -> torch.Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int()


def skip_what_it_refuses(name: str, q: torch.Tensor, scoring: Scoring) -> None:
    if (why := CANDIDATES[name].refuse(Call(q, 1, 1, scoring))) is not None:
        pytest.skip(why)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_own_keys_forward_and_backward(name, scoring, kv_heads):
    q, k, v = inputs = [*draw(kv_heads, requires_grad=True)]
    skip_what_it_refuses(name, q, scoring)
    if scoring.relative is not None:
        inputs.append(scoring.relative.clone().requires_grad_())
        scoring = replace(scoring, relative=inputs[-1])
    starts = bounds(ROWS)
    out = attention(q, k, v, starts, max(ROWS), scoring, only=(name,))
    cut = starts.tolist()
    want = torch.cat([defined(q[a:b], k[a:b], v[a:b], scoring) for a, b in itertools.pairwise(cut)])
    assert (out - want).abs().max() < 1e-10
    weight = torch.randn_like(want)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    expected = torch.autograd.grad((want * weight).sum(), inputs)
    for one, other in zip(got, expected, strict=True):
        assert (one - other).abs().max() < 1e-9
    if name == "sdpa":  # what has no gradient of a bias, PyTorch's own flash attention takes too
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.no_grad():
            out = attention(q, k, v, starts, max(ROWS), scoring, only=(name,))
        assert (out - want).abs().max() < 1e-10


@pytest.mark.parametrize("counts", [ROWS, (4, 4, 4), (4, 4, 9)], ids=["uneven", "even", "runs"])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_each_query_takes_its_own_share_of_a_bias_of_distances(name, counts):
    generator = torch.Generator().manual_seed(2)
    shapes = ((sum(counts), 6, 8), (sum(counts), 2, 8), (sum(counts), 2, 8), (sum(counts), 6))
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    q, k, v, gate = inputs = [t.requires_grad_() for t in drawn]
    scoring = Scoring(0.3, causal=False, relative=TABLE, gate=gate)
    out = attention(q, k, v, bounds(counts), max(counts), scoring, only=(name,))
    want = torch.cat(
        [
            defined(q[a:b], k[a:b], v[a:b], replace(scoring, gate=gate[a:b]))
            for a, b in itertools.pairwise(bounds(counts).tolist())
        ]
    )
    assert (out - want).abs().max() < 1e-10
    weight = torch.randn_like(want)
    got, expected = (torch.autograd.grad((made * weight).sum(), inputs) for made in (out, want))
    for one, other in zip(got, expected, strict=True):
        assert (one - other).abs().max() < 1e-9


# Rows of queries and of the keys they see: uneven, without either, and of one length each.
CROSSED = {
    "uneven": ((5, 1, 0, 3, 2, 1), (4, 19, 2, 0, 1, 8)),
    "even": ((3, 3), (7, 7)),
    "even-queries": ((2, 2, 2), (3, 5, 1)),
    "decode": ((1, 1, 1), (9, 1, 17)),
    "decode-one-row": ((1,), (6,)),
}


@pytest.mark.parametrize("paged", [False, True], ids=["own", "pages"])
@pytest.mark.parametrize("counts", CROSSED.values(), ids=CROSSED)
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_keys_in_rows_of_their_own(name, counts, paged):
    """Cross-attention, forward and backward; from pages, their order and what lies between is poison."""
    queries, keys = counts
    scoring, generator = Scoring(0.4, causal=False), torch.Generator().manual_seed(5)

    def rows(count: int, heads: int) -> torch.Tensor:
        return torch.randn(count, heads, 8, generator=generator, dtype=torch.float64, requires_grad=True)

    q, k, v = rows(sum(queries), 6), rows(sum(keys), 2), rows(sum(keys), 2)
    starts, key_starts = bounds(queries), bounds(keys)
    want = torch.cat(
        [
            defined(q[a:b], k[c:d], v[c:d], scoring) if d > c else torch.zeros_like(q[a:b])
            for (a, b), (c, d) in zip(
                itertools.pairwise(starts.tolist()), itertools.pairwise(key_starts.tolist()), strict=True
            )
        ]
    )
    if not paged:
        crossed = KeyRows(key_starts, max(keys))
        out = attention(q, k, v, starts, max(queries), scoring, only=(name,), key_rows=crossed)
        weight = torch.randn_like(want)
        got = torch.autograd.grad((out * weight).sum(), (q, k, v))
        expected = torch.autograd.grad((want * weight).sum(), (q, k, v))
        for one, other in zip(got, expected, strict=True):
            assert (one - other).abs().max() < 1e-9
    else:
        cache = torch.full((2, 40, 4, 2, 8), 7e5, dtype=torch.float64)
        order = torch.randperm(40, generator=generator)
        table = order[: 6 * len(keys)].view(len(keys), 6).int()
        for row, (begin, end) in enumerate(itertools.pairwise(key_starts.tolist())):
            at = torch.arange(end - begin)
            slots = table[row].long()[at // 4] * 4 + at % 4
            cache.flatten(1, 2)[:, slots] = torch.stack((k[begin:end], v[begin:end])).detach()
        pages = Pages(cache[0], cache[1], table, torch.tensor(keys, dtype=torch.int32), max(keys))
        out = attention(q.detach(), None, None, starts, max(queries), scoring, pages, only=(name,))
    assert (out - want).abs().max() < 1e-10


@pytest.mark.parametrize("new", [None, 1], ids=["chunks", "decode"])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_cache_pages(name, scoring, kv_heads, new):
    """Queries are the last of each row's keys; pages lie anywhere, and what rows don't own is poison."""
    if not scoring.causal:
        pytest.skip("a cache is for causal attention")
    generator = torch.Generator().manual_seed(3)
    lengths = [n for n in ROWS if n]
    counts = [min(n, 1 + 3 * i) if new is None else new for i, n in enumerate(lengths)]
    size, dim = 4, 8
    need = [math.ceil(n / size) for n in lengths]
    order = torch.randperm(sum(need) + 3, generator=generator).tolist()
    cache = torch.full((2, len(order), size, kv_heads, dim), 7e5, dtype=torch.float64)
    table = torch.zeros(len(lengths), max(need) + 1, dtype=torch.int32)
    q = torch.randn(sum(counts), 6, dim, generator=generator, dtype=torch.float64)
    want, at = [], 0
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        own = [order.pop() for _ in range(need[row])]
        table[row] = torch.tensor(own + [own[0]] * (table.shape[1] - len(own)))
        k, v = torch.randn(2, length, kv_heads, dim, generator=generator, dtype=torch.float64)
        slots = torch.tensor([own[p // size] * size + p % size for p in range(length)])
        cache.flatten(1, 2)[:, slots] = torch.stack((k, v))
        want.append(defined(q[at : at + count], k, v, scoring))
        at += count
    skip_what_it_refuses(name, q, scoring)
    pages = Pages(cache[0], cache[1], table, torch.tensor(lengths, dtype=torch.int32), max(lengths))
    given = (q, None, None, bounds(counts), max(counts), scoring, pages)
    assert (attention(*given, only=(name,)) - torch.cat(want)).abs().max() < 1e-10
    if name == "sdpa":
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            assert (attention(*given, only=(name,)) - torch.cat(want)).abs().max() < 1e-10


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_takes_even_rows(causal):
    rows, longest = 3, 1088
    q, k, v = (
        torch.randn(rows * longest, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    starts = torch.arange(rows + 1, dtype=torch.int32, device="cuda") * longest
    scoring, d_out = Scoring(0.1, causal), torch.randn_like(q)
    results = []
    for name in ("cudnn", "eager"):
        inputs = [t if name == "cudnn" else t.detach().double().requires_grad_() for t in (q, k, v)]
        out = attention(*inputs, starts, longest, scoring, only=(name,))
        results.append((out, *torch.autograd.grad(out, inputs, d_out.to(out.dtype))))
    for got, want in zip(*results, strict=True):
        assert (got.double() - want).norm() <= 1.2e-2 * want.norm()
    assert attention(q, k, v, starts, longest, scoring, only=("cudnn",)).shape == q.shape
    with pytest.raises(RequestError, match="wants rows of one length"):
        attention(q[1:], k[1:], v[1:], (starts - 1).clamp(min=0), longest, scoring, only=("cudnn",))


def test_when_nothing_is_left_every_candidate_says_why():
    q, k, v = draw(6)
    with pytest.raises(RequestError, match=r"sdpa: .*no soft-cap \(asked: 2.0\).*eager: not among"):
        attention(q, k, v, bounds(ROWS), max(ROWS), Scoring(1.0, softcap=2.0), only=("sdpa",))
