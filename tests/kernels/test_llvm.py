"""Kernels compiled for the CPU beside the float64 references, by one thread and by several."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("llvmlite")
pytest.importorskip("triton")

from taut.kernels import (
    attention_llvm,
    gemv_llvm,
    llvm,
    norm,
    norm_llvm,
    packed_llvm,
    paged_llvm,
    rope,
    rope_llvm,
)
from taut.kernels.act import ACTIVATIONS
from taut.kernels.attention import Call, KeyRows, Pages, Scoring, attention
from taut.kernels.gemv import gemv_reference
from taut.kernels.threads import Tape, recording
from taut.quant.affine import Affine
from taut.quant.blockwise import Blockwise
from taut.quant.int8 import Int8
from tests.kernels.test_paged import CASES, Case

BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def distance(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-9)).item()


@pytest.fixture(autouse=True, params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    with torch.inference_mode():
        yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def processor(request, monkeypatch):
    """What kernels are written for. Those that use no operation of x86's own run here too, and are compiled
    for ARM, where they must not come down to calls."""
    if request.param != "this processor":
        if not llvm.has("avx2"):
            pytest.skip("stands in for others on x86 alone")
        wide = ("avx512", "avx10", "amx", "evex512")
        features = {f: there and not f.startswith(wide) for f, there in llvm.processor()[1].items()}
        found = "haswell", features if request.param == "AVX2" else {}
        monkeypatch.setattr(llvm, "processor", lambda: found)
    if request.param == "no x86":
        assemble = llvm.assemble

        def checked(source: str, *rest) -> llvm.Code:
            assert not calls_on_arm(source)
            return assemble(source, *rest)

        monkeypatch.setattr(llvm, "assemble", checked)
    forget()
    yield request.param
    forget()


def calls_on_arm(source: str) -> set[str]:
    import llvmlite.binding as binding

    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module = binding.parse_assembly(source)
    machine = binding.Target.from_triple("aarch64-linux-gnu").create_target_machine(cpu="generic", opt=3)
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(3))
    passes.getModulePassManager().run(module, passes)
    return set(re.findall(r"\tbl\t(\w+)", machine.emit_assembly(module))) - {"memset", "memcpy"}


def forget() -> None:
    """Drop what is compiled."""
    for cached in (gemv_llvm._kernel, gemv_llvm.dense, norm_llvm._kernel, packed_llvm._unpacking):
        cached.cache_clear()
    for cached in (rope_llvm._kernel, rope_llvm._angles, paged_llvm._partial, paged_llvm._joining):
        cached.cache_clear()


PRODUCTS = {  # rows, inputs, outputs, and what stands around the product
    "one row": (1, 96, 50, {}),
    "one row, all": (1, 576, 33, {"norm": 1.0, "act": "silu", "bias": True, "residual": True}),
    "two rows, norm": (2, 64, 16, {"norm": 0.0}),
    "fifteen rows, act": (15, 160, 7, {"act": "gelu_tanh", "bias": True}),
    "rows too wide for the cache": (13, 2080, 20, {"residual": True}),
} | {f"act {act}": (3, 64, 40, {"act": act}) for act in ACTIVATIONS}


@pytest.mark.parametrize("dtype", BOUNDS)
def test_products(dtype) -> None:
    torch.manual_seed(1)
    for name, (rows, inputs, outputs, around) in PRODUCTS.items():
        act = around.get("act")
        x, weight = torch.randn(rows, inputs), torch.randn(outputs * (2 if act else 1), inputs) / inputs**0.5
        tensors = {"bias": torch.randn(weight.shape[0]) if "bias" in around else None}
        tensors["norm_weight"] = torch.randn(inputs) if "norm" in around else None
        tensors["residual"] = torch.randn(rows, outputs) if "residual" in around else None
        rest = {"eps": 1e-5, "offset": around.get("norm", 0.0), "act": act}
        x, weight, *given = (None if t is None else t.to(dtype) for t in (x, weight, *tensors.values()))
        wide = [None if t is None else t.double() for t in given]
        want = gemv_reference(x.double(), weight.double(), **dict(zip(tensors, wide, strict=True)), **rest)
        given = dict(zip(tensors, given, strict=True))
        got = gemv_llvm.run(x, gemv_llvm.dense(dtype), (weight,), weight.shape[0], **given, **rest)
        assert got.dtype is dtype and distance(got, want) < BOUNDS[dtype], name
        plain = gemv_llvm.run(x, gemv_llvm.Dense(dtype), (weight,), weight.shape[0], **given, **rest)
        assert distance(plain, want) < BOUNDS[dtype], name


def packed_weights(inputs: int):
    """A matrix in every format that kernels read."""
    w = torch.randn(33, inputs) / inputs**0.5
    groups = w.view(33, -1, 32)
    codes = torch.randint(0, 16, w.shape).byte()
    codes = codes[:, ::2] | (codes[:, 1::2] << 4)
    scale = groups.abs().amax(-1) / 8
    yield "affine4", Affine(codes, scale.half(), -8 * scale)
    yield "affine4, 16-bit minima", Affine(codes, scale.half(), (-8 * scale).half())
    yield (
        "affine8",
        Affine((groups / scale[..., None] * 15).round().char().flatten(1), (scale / 15).half(), None),
    )
    yield "int8", Int8.pack(w, 6.0)
    for kind, block, double in (("nf4", 64, True), ("fp4", 32, False)):
        yield f"{kind} {block} {double}", Blockwise.pack(w, kind, block, double)


@pytest.mark.parametrize("threads", [3], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "processor"),
    [*((dtype, "this processor") for dtype in BOUNDS), (torch.bfloat16, "AVX2"), (torch.float32, "no x86")],
    indirect=["processor"],
)
def test_packed_products(dtype, processor) -> None:
    torch.manual_seed(3)
    for inputs in (64, 544, 1088):
        for name, packed in packed_weights(inputs):
            values = packed.dequantize(torch.float64 if name.startswith("affine") else torch.float32).double()
            norm_weight, residual = torch.randn(inputs).to(dtype), torch.randn(9, 33).to(dtype)
            arguments = {"norm_weight": norm_weight, "eps": 1e-5, "offset": 0.0}
            index = torch.tensor([32, 0, 7])
            got = packed.rows_at(index, dtype)
            assert got.dtype is dtype and distance(got, values[index]) < BOUNDS[dtype], name
            for rows in (1, 9):
                x = torch.randn(rows, inputs).to(dtype)
                x[0, 3] = 40.0  # much larger than its neighbours
                assert packed.streams(x) is None
                want = (
                    norm.rms_norm(x.double(), norm_weight.double(), 1e-5) @ values.T
                    + residual[:rows].double()
                )
                y = packed(x, residual=residual[:rows], norm=arguments)
                assert y.dtype is dtype and distance(y, want) < BOUNDS[dtype], (name, inputs, rows)


@pytest.mark.parametrize("threads", [1], indirect=True)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(bad) -> None:
    for inputs in (64, 1088):
        for name, packed in packed_weights(inputs):
            x = torch.randn(1, inputs, dtype=torch.bfloat16)
            x[0, 5] = bad
            assert not packed(x).isfinite().any(), name


@pytest.mark.parametrize("threads", [3], indirect=True)
@pytest.mark.parametrize(
    ("dtype", "processor"), [(torch.bfloat16, "AVX2"), (torch.float16, "no x86")], indirect=["processor"]
)
def test_other_processors(dtype, processor) -> None:
    test_norms(dtype)
    test_rotation(dtype)
    test_angles(dtype)
    test_attention("several queries, grouped, odd dim", dtype)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_norms(dtype) -> None:
    for shape in ((1, 64), (5, 3, 32), (0, 16), (4, 20)):
        x, weight, bias = (torch.randn(s).to(dtype) for s in (shape, shape[-1:], shape[-1:]))
        for name, rest in (
            ("rms_norm", (weight, 1e-5, 1.0)),
            ("layer_norm", (weight, bias, 1e-5)),
            ("layer_norm", (weight, None, 1e-5)),
        ):
            wide = [t.double() if isinstance(t, torch.Tensor) else t for t in rest]
            want = getattr(norm, name)(x.double(), *wide)
            got = getattr(norm_llvm, name)(x, *rest)
            assert got.shape == want.shape and (not x.numel() or distance(got, want) < BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
def test_rotation(dtype) -> None:
    torch.manual_seed(2)
    # tokens, heads, key heads, head dim, dims that turn, norms, interleaved
    for tokens, heads, kv_heads, head_dim, dim, normed, interleaved in (
        (1, 9, 3, 64, 64, False, False),
        (5, 4, 4, 16, 8, True, False),
        (3, 2, 1, 20, 12, False, True),
        (2, 2, 1, 32, 0, True, False),
        (0, 2, 1, 32, 32, False, False),
    ):
        cos, sin = torch.randn(2, tokens, 1, max(dim, 2) // 2).to(dtype)
        cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        wide = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim + 8).to(dtype)
        qkv = wide[:, 8:]
        if dim:
            x = qkv.unflatten(1, (-1, head_dim))[:, :heads]
            want = rope.rotate(x.double(), cos.double(), sin.double(), interleaved)
            assert not tokens or distance(rope_llvm.rotate(x, cos, sin, interleaved), want) < BOUNDS[dtype]
        weights = tuple(torch.randn(2, head_dim).to(dtype)) if normed else (None, None)
        slots = torch.tensor([30, 2, -1, 17, 5][:tokens], dtype=torch.int64)
        for keep in (False, True):
            found = []
            for module, kind in ((rope_llvm, dtype), (rope, torch.float64)):
                cache = torch.zeros(2, 3, 16, kv_heads, head_dim, dtype=kind)
                c, s, *w = (None if t is None else t.to(kind) for t in (cos, sin, *weights))
                c, s = (c, s) if dim else (None, None)
                call = (qkv.to(kind) if kind is not dtype else qkv, heads, kv_heads, c, s, *cache, slots)
                out = module.rotate_and_store(*call, *w, 1e-6, 0.5, interleaved, keep)
                found.append((out, *cache))
            for got, want in zip(*found, strict=True):
                assert got.shape == want.shape and (not tokens or distance(got, want) < BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
def test_angles(dtype) -> None:
    positions = torch.tensor([0, 1, 7, 977, 131071, 1048575], dtype=torch.int32)
    shared = 10000.0 ** (-torch.arange(0, 24, 2).float() / 24)
    for frequencies in (shared, shared * torch.rand(6, 1)):
        turns = (positions.float()[:, None] * frequencies).double()
        got = rope_llvm.angles(positions, frequencies, 1.25, dtype)
        for g, half, sign in zip(got, (turns.cos(), turns.sin()), (1, -1), strict=True):
            want = torch.cat((sign * half, half), -1)[:, None] * 1.25
            assert g.shape == want.shape
            assert (g.double() - want).abs().max() < {torch.float32: 3e-7}.get(dtype, BOUNDS[dtype])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", CASES)
def test_attention(name, dtype) -> None:
    case: Case = replace(CASES[name], dim=CASES[name].dim // 16 * 16)
    case = replace(case, dim=32) if "grouped" in name or "window" in name else case
    torch.manual_seed(sum(case.lengths))
    rows, width = len(case.lengths), max(case.lengths) // case.page + 1
    table = torch.randperm(rows * width + 1)[: rows * width].view(rows, width).int()
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    starts = torch.tensor([0, *torch.tensor(case.queries).cumsum(0).tolist()], dtype=torch.int32)
    held = torch.zeros(rows * width + 1, case.page, dtype=torch.bool)
    held[table.long()] = torch.arange(width * case.page).view(width, -1) < lengths[:, None, None]
    keys, values = torch.randn(2, *held.shape, case.kv_heads, case.dim).to(dtype)
    for t in (keys, values):
        t[~held] = torch.nan
    q = torch.randn(sum(case.queries), case.heads, case.dim).to(dtype)
    pages = Pages(keys, values, table, lengths, max(case.lengths))
    got = paged_llvm.paged_attention(q, starts, case.scoring, pages)
    wide = Pages(keys.double(), values.double(), table, lengths, max(case.lengths))
    want = attention(q.double(), None, None, starts, max(case.queries), case.scoring, wide, only=("eager",))
    assert got.shape == want.shape and distance(got, want) < BOUNDS[dtype]


DISTANCES = torch.randn(6, 13, generator=torch.Generator().manual_seed(1))
SCORINGS = {
    "full": Scoring(0.3, causal=False),
    "causal": Scoring(0.3),
    "window": Scoring(0.3, window=5),
    "full-window": Scoring(0.3, causal=False, window=20),
    "alibi": Scoring(0.3, slopes=torch.linspace(0.1, 1, 6)),
    "relative": Scoring(0.3, causal=False, relative=DISTANCES),
    "everything": Scoring(0.3, window=18, slopes=torch.linspace(0.1, 1, 6), relative=DISTANCES),
}
# Rows that are empty, of a token, of less than four keys and of less, as many and more than 16 queries.
UNEVEN = (3, 0, 1, 16, 35, 2, 7, 17, 0)


def packed(counts, heads: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`[tokens, heads, dim]`, between numbers that aren't, and where rows begin."""
    around = torch.full((sum(counts) + 2, heads + 2, dim), torch.nan)
    around[1:-1, 1:-1] = torch.randn(sum(counts), heads, dim)
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    return around.to(dtype)[1:-1, 1:-1], starts


def exact(q, k, v, starts, longest, scoring, key_rows=None):
    q, k, v = (t.double() for t in (q, k, v))
    return attention(q, k, v, starts, longest, scoring, only=("eager",), key_rows=key_rows)


@pytest.mark.parametrize("processor", ["this processor", "AVX2", "no x86"], indirect=True)
def test_attention_of_packed_rows_on_every_processor(processor) -> None:
    qkv, starts = packed(UNEVEN, 6, 32, torch.float32)
    call = (*qkv.split(2, 1), starts, 35, SCORINGS["full-window"])
    assert distance(attention_llvm.packed_attention(*call, None), exact(*call)) < BOUNDS[torch.float32]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
def test_attention_of_packed_rows(scoring, dtype) -> None:
    kv_heads, dim = (2, 48) if scoring.window else (6, 16)
    qkv, starts = packed(UNEVEN, 6 + 2 * kv_heads, dim, dtype)
    q, k, v = qkv.split((6, kv_heads, kv_heads), 1)
    got = attention(q, k, v, starts, 35, scoring, only=("packed",))
    assert distance(got, exact(q, k, v, starts, 35, scoring)) < BOUNDS[dtype]
    # A row in a batch is that row alone, whatever its neighbours are.
    begin, end = starts[4:6].tolist()
    alone = attention(q[begin:end], k[begin:end], v[begin:end], starts[:1].new_tensor([0, 35]), 35, scoring)
    k[:begin], v[end:] = torch.nan, torch.inf
    for batch in (got, attention(q, k, v, starts, 35, scoring, only=("packed",))):
        assert torch.equal(batch[begin:end], alone)


@pytest.mark.parametrize(
    "counts",
    [((5, 1, 0, 40, 2), (4, 19, 2, 0, 33)), ((), ()), ((0, 0), (3, 0))],
    ids=["uneven", "none", "empty"],
)
def test_attention_to_packed_rows_of_others(counts) -> None:
    q, starts = packed(counts[0], 4, 16, torch.float32)
    kv, key_starts = packed(counts[1], 4, 16, torch.float32)
    rows = KeyRows(key_starts, max(counts[1], default=0))
    call = (q, *kv.split(2, 1), starts, max(counts[0], default=0), Scoring(0.3, causal=False))
    got, want = attention(*call, only=("packed",), key_rows=rows), exact(*call, rows)
    assert got.shape == q.shape and torch.allclose(got.double(), want, atol=1e-5)


def test_attention_of_packed_rows_says_what_it_does_not_take() -> None:
    q, full, one = torch.ones(4, 2, 16), Scoring(1.0, causal=False), torch.zeros(2, 1)
    pages = Pages(q[None], q[None], torch.zeros(1, 1).int(), torch.ones(1).int(), 4)
    rows = KeyRows(torch.zeros(2).int(), 4)
    for call, why in (
        (Call(q, 1, 4, full), None),
        (Call(q, 1, 4, replace(full, relative=one), key_rows=rows), "where all are seen alike"),
        (Call(q, 1, 4, Scoring(1.0), key_rows=rows), "where all are seen alike"),
        (Call(q, 1, 4, full, pages), "no keys from cache pages"),
        (Call(q, 1, 4, replace(full, softcap=2.0)), "this has a soft-cap"),
        (Call(q, 1, 4, replace(full, sinks=one[:, 0])), "this has a sinks"),
        (Call(q, 1, 4, replace(full, relative=one, gate=one)), "this has a gate"),
        (Call(q[:, :, :8], 1, 4, full), "divisible by 16; asked: 8"),
        (Call(q.double(), 1, 4, full), "not float64"),
        (Call(q, 1, 8193, full), "at most 8192 keys a row; a row has 8193"),
    ):
        got = attention_llvm.refuses(call)
        assert got is None if why is None else why in got
    with torch.inference_mode(False), torch.enable_grad():
        assert attention_llvm.refuses(Call(q, 1, 4, full)) == "has no backward"


def test_a_tape_plays_the_same_kernels_on_what_its_tensors_hold_then(threads) -> None:
    x, weight = torch.randn(1, 64), torch.randn(64, 64)
    with recording(Tape()) as tape:
        first = gemv_llvm.run(x, gemv_llvm.Dense(torch.float32), (weight,), 64)
        second = norm_llvm.rms_norm(first, torch.ones(64), 1e-5)
    assert len(tape) == 2
    x.normal_()
    want = norm.rms_norm(x @ weight.T, torch.ones(64), 1e-5)
    assert distance(second, want) > 1e-2
    tape.play()
    assert distance(second, want) < 1e-5
