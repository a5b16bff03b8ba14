"""Decode attention over pages beside the float64 reference; compiled for sm_80 and sm_90."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch

pytest.importorskip("triton")

from taut.errors import RequestError
from taut.kernels import paged_triton
from taut.kernels.attention import Pages, Scoring, attention
from taut.kernels.device import Workspace, using
from taut.kernels.paged_triton import Tiles, paged_attention, plan, tiles
from tests.kernels.compile import Spec, cross_compile

BOUNDS = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


PLAIN, SMALL = Scoring(0.3), Tiles(16, 4, 2, 1)


@dataclass(frozen=True)
class Case:
    queries: list[int]
    lengths: list[int]
    heads: int = 2
    kv_heads: int = 2
    dim: int = 16
    page: int = 16
    scoring: Scoring = PLAIN
    cut: Tiles | None = SMALL
    context: int | None = None


CASES = {
    "one query": Case([1, 1, 1], [1, 17, 100], heads=4),
    "several queries, grouped, odd dim": Case([1, 3, 2], [5, 37, 70], heads=6, dim=24),
    "a row without queries": Case([1, 0, 2], [70, 3, 37], heads=8, kv_heads=1),
    "a row without keys": Case([1, 1], [0, 20]),
    "window": Case([1, 2], [70, 37], heads=4, kv_heads=1, page=32, scoring=Scoring(0.3, window=20)),
    "window of one": Case([2], [40], scoring=Scoring(0.3, window=1)),
    "both sides": Case([3], [50], kv_heads=1, scoring=Scoring(0.3, causal=False, window=9)),
    "cross attention": Case([2, 1], [33, 9], scoring=Scoring(0.3, causal=False)),
    "softcap": Case([1, 2], [70, 37], scoring=Scoring(0.3, softcap=2.0)),
    "alibi": Case([2], [70], heads=5, kv_heads=5, scoring=Scoring(0.3, slopes=torch.rand(5))),
    "relative": Case([2], [50], kv_heads=1, scoring=Scoring(0.3, relative=torch.randn(2, 41))),
    "sinks": Case([1, 3, 1], [70, 37, 0], heads=6, scoring=Scoring(0.3, sinks=torch.randn(6))),
    "sinks, window, no splits": Case(
        [2], [40], heads=4, cut=Tiles(16, 4, 2, 0), scoring=Scoring(0.3, window=9, sinks=torch.randn(4))
    ),
    "71 heads over one": Case([2], [50], heads=71, kv_heads=1),
    "a page is several steps": Case([1], [130], page=64),
    "rows outgrow the bound": Case([1, 1], [90, 130], context=40),
    "no splits": Case([1, 1], [90, 13], cut=Tiles(16, 4, 2, 0)),
}


def agree(case: Case, dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator(device).manual_seed(sum(case.lengths))
    rows, tokens, longest = len(case.lengths), sum(case.queries), max(case.lengths)
    width = longest // case.page + 1
    table = torch.randperm(rows * width + 1, device=device)[: rows * width].view(rows, width).int()
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    # Pages hold NaN wherever no key of a row is.
    held = torch.zeros(rows * width + 1, case.page, dtype=torch.bool, device=device)
    held[table.long()] = (
        torch.arange(width * case.page, device=device).view(width, -1) < lengths[:, None, None]
    )
    cache = torch.randn(
        2, *held.shape, case.kv_heads, case.dim, generator=generator, device=device, dtype=dtype
    )
    cache.masked_fill_(~held[..., None, None], float("nan"))
    q = torch.randn(tokens, case.heads, case.dim, generator=generator, device=device, dtype=dtype)
    starts = torch.tensor([0, *accumulate(case.queries)], dtype=torch.int32, device=device)
    moved = {
        n: t.to(device)
        for n in ("slopes", "relative", "sinks")
        if (t := getattr(case.scoring, n)) is not None
    }
    scoring = replace(case.scoring, **moved)
    pages = Pages(*cache, table, lengths, longest)
    queries = max(case.queries)
    p = plan(
        tokens, rows, queries, case.heads, case.kv_heads, case.dim, case.context or longest,
        q.element_size(), q.device, case.cut,
    )  # fmt: skip
    memory = Workspace.of(q.device, p.floats, p.counters)
    with using(memory):
        got = paged_attention(q, starts, queries, scoring, pages, context=case.context, cut=case.cut)
    assert not memory.counters.any()
    wide = Pages(*cache.double(), table, lengths, longest)
    some = torch.repeat_interleave(lengths > 0, starts.diff().long())
    want = torch.zeros_like(got, dtype=torch.float64)
    kept = [r for r, n in enumerate(case.lengths) if n]
    counts = [case.queries[r] for r in kept]
    want[some] = attention(
        q.double()[some], None, None, torch.tensor([0, *accumulate(counts)]), max(counts), scoring,
        replace(wide, table=table[kept], lengths=lengths[kept]), ("eager",),
    )  # fmt: skip
    error = ((got.double() - want).norm() / want.norm()).item()
    assert error < BOUNDS[dtype], error


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_float64(name: str) -> None:
    agree(CASES[name], torch.float32, "cpu")


def test_half_precision() -> None:
    agree(CASES["several queries, grouped, odd dim"], torch.float16, "cpu")


def test_plan_fills_the_device_with_splits() -> None:
    def splits(rows, kv_heads, context):
        return plan(rows, rows, 1, 32, kv_heads, 128, context, 2, torch.device("cpu")).splits

    assert splits(1, 8, 131072) > 8  # few rows, many keys
    assert splits(64, 8, 131072) == 1  # the rows fill it
    assert splits(1, 8, 16) == 1  # nothing to split


def test_errors() -> None:
    starts = torch.tensor([0, 1])
    cache = torch.zeros(2, 16, 1, 16)
    pages = Pages(cache, cache, torch.zeros(1, 1).int(), torch.ones(1).int(), 1)
    for q, queries, words in (
        (torch.randn(1, 1, 16), 17, "at most 16 queries"),
        (torch.randn(1, 1, 16).half(), 1, "the cache torch.float32"),
        (torch.randn(1, 1, 20), 1, "divisible by 8"),
        (torch.randn(1, 1, 16).requires_grad_(), 1, "no backward"),
    ):
        with pytest.raises(RequestError, match=words):
            paged_attention(q, starts, queries, Scoring(1.0), pages)


def test_compiles(monkeypatch) -> None:
    def spec(arch, dim, group, block_r, cut, type="bf16", extra=False):
        pointers = dict.fromkeys(("q", "keys", "values", "out"), f"*{type}:16")
        pointers |= dict.fromkeys(("table", "lengths", "starts"), "*i32") | {"counters": "*i32:16"}
        pointers |= dict.fromkeys(("slopes", "relative", "sinks"), "*fp32:16")
        pointers |= dict.fromkeys(("parts", "sums"), None if extra else "*fp32:16")
        strides = ["q_token", "q_head", "k_page", "k_slot", "k_head", "v_page", "v_slot", "v_head"]
        numbers = dict.fromkeys(strides, "i32:16") | dict.fromkeys(("scale", "softcap"), "fp32")
        numbers |= dict.fromkeys(("reach", "window", "least", "table_row", "heads"), "i32")
        flags = {"CAUSAL": True, "WINDOW": extra, "SOFTCAP": extra, "ALIBI": extra, "RELATIVE": extra}
        flags["SINKS"] = not extra
        flags["SPLIT"] = not extra
        block_d = max(16, 1 << (dim - 1).bit_length())
        merge = min(1 << (group - 1).bit_length(), block_r)
        sizes = {"GROUP": group, "DIM": dim, "PAGE": 16, "KV_HEADS": 8, "BLOCK_R": block_r}
        sizes |= {"BLOCK_D": block_d, "BLOCK_N": cut.block_n}
        sizes |= {"MERGE_R": merge, "MERGE_S": max(1, 8192 // (merge * block_d))}
        sizes |= {"STAGES": cut.stages, "PREFETCH": "=", "WARPS": cut.warps, "PDL": arch >= 90}
        precision = {"PRECISION": "=ieee" if type == "fp32" else "=tf32"}
        return Spec(
            "taut.kernels.paged_triton", "_decode", arch, pointers | numbers | flags | sizes | precision,
            {"num_warps": cut.warps},
        )  # fmt: skip

    built = cross_compile(
        [
            spec(arch, dim, group, block_r, plan(1, 1, 1, group, 1, dim, 4096, size, torch.device("cpu")).cut,
                 type, extra)
            for arch in (80, 90)
            for dim, group, block_r, size, type, extra in (
                (128, 1, 16, 2, "bf16", False), (256, 8, 16, 2, "fp16", True), (64, 71, 64, 2, "bf16", False),
            )
        ]
    )  # fmt: skip
    assert all(b.shared <= 163 << 10 for b in built[:3]) and all(b.local == 0 for b in built)
    small = 99 << 10
    monkeypatch.setattr(paged_triton, "shared_memory", lambda device: small)
    cuts = [tiles(dim, 64, size, torch.device("cpu")) for dim, size in ((256, 2), (64, 2), (256, 4))]
    kinds = zip((256, 64, 256), cuts, ("bf16", "bf16", "fp32"), strict=True)
    built = cross_compile([spec(89, dim, 64, 64, cut, type) for dim, cut, type in kinds])
    assert all(b.shared <= small for b in built), built


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_cases_on_a_device(dtype: torch.dtype) -> None:
    for case in CASES.values():
        if case.heads != 71 or dtype != torch.float32:
            agree(replace(case, cut=None), dtype, "cuda")
            agree(case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page", [16, 64, 256])
def test_sweep_on_a_device(page: int, dtype: torch.dtype) -> None:
    dims = [(16, 8, 8), (64, 71, 1), (80, 32, 32), (96, 12, 4), (128, 32, 8), (128, 32, 32)]
    dims += [(192, 8, 1), (256, 8, 4)]
    for dim, heads, kv_heads in dims:
        for queries, lengths in (([1] * 3, [1, 700, 3333]), ([4, 1, 2], [513, 64, 2048])):
            agree(Case(queries, lengths, heads, kv_heads, dim, page, Scoring(dim**-0.5), None), dtype, "cuda")


@pytest.mark.gpu
def test_offsets_beyond_int32() -> None:
    """The last pages of a cache of more than 2**31 numbers, and 128k keys in one row."""
    size, dim, kv_heads = 16, 128, 8
    count = (2**31 + 2**24) // (size * dim * kv_heads)
    keys = torch.zeros(count, size, kv_heads, dim, dtype=torch.bfloat16, device="cuda")
    values = torch.zeros_like(keys)
    used = 131072 // size
    keys[-used:].normal_()
    values[-used:].normal_()
    table = torch.arange(count - 1, count - 1 - used, -1, device="cuda", dtype=torch.int32)[None]
    pages = Pages(keys, values, table, torch.tensor([131072 - 5], device="cuda").int(), 131072)
    q = torch.randn(1, 32, dim, dtype=torch.bfloat16, device="cuda")
    starts = torch.tensor([0, 1], device="cuda").int()
    got = paged_attention(q, starts, 1, Scoring(dim**-0.5), pages)
    want = attention(q, None, None, starts, 1, Scoring(dim**-0.5), pages, ("eager",))
    assert ((got.float() - want.float()).norm() / want.float().norm()).item() < 1e-2


@pytest.mark.gpu
def test_replays_from_a_graph_while_rows_grow() -> None:
    kv_heads, dim, width = 4, 64, 64
    cache = torch.randn(2, 3 * width, 16, kv_heads, dim, dtype=torch.float16, device="cuda")
    table = torch.randperm(3 * width, device="cuda").view(3, width).int()
    lengths = torch.tensor([1, 500, 900], device="cuda").int()
    pages = Pages(*cache, table, lengths, 1024)
    q = torch.randn(3, 8, dim, dtype=torch.float16, device="cuda")
    starts = torch.arange(4, device="cuda").int()
    paged_attention(q, starts, 1, Scoring(0.1), pages)
    graph, memory = torch.cuda.CUDAGraph(), Workspace.of(q.device)
    with using(memory), torch.cuda.graph(graph):
        got = paged_attention(q, starts, 1, Scoring(0.1), pages)
    for _ in range(3):
        graph.replay()
        assert torch.equal(got, paged_attention(q, starts, 1, Scoring(0.1), pages))
        lengths += 41
