"""Rows of tables, summed and normalised: Triton's kernel beside float64."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from taut.kernels import lookup, lookup_triton
from taut.kernels.lookup import Lookup
from tests.kernels.compile import Spec, cross_compile

BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def cases(dtype: torch.dtype, device: str, tokens: int, dim: int) -> list[list[Lookup]]:
    """Words; and positions; and types that are all the first, or a column of several features."""
    generator = torch.Generator().manual_seed(dim)
    tables = [
        torch.randn(count, dim, generator=generator, dtype=torch.float64).to(device, dtype)
        for count in (50, 20, 3)
    ]
    ids, at, kinds = (torch.randint(0, n, (tokens,), generator=generator).to(device) for n in (50, 18, 3))
    words, positions = Lookup(tables[0], ids), Lookup(tables[1], at.int(), 2)
    columns = torch.stack((kinds, kinds), 1)
    tails = [
        [],
        [positions],
        [positions, Lookup(tables[2], None)],
        [positions, Lookup(tables[2], columns[:, 1])],
    ]
    return [[words, *tail] for tail in tails]


def agree(dtype: torch.dtype, device: str, tokens: int, dim: int) -> None:
    weight, bias = torch.linspace(0.5, 1.5, 2 * dim, dtype=dtype, device=device).view(2, dim)
    for lookups, b in product(cases(dtype, device, tokens, dim), (None, bias)):
        wide = [Lookup(one.table.double(), one.index, one.offset) for one in lookups]
        want = lookup.summed_norm(wide, weight.double(), None if b is None else b.double(), 1e-5)
        got = lookup_triton.summed_norm(lookups, weight, b, 1e-5)
        assert got.shape == want.shape and got.dtype is dtype
        assert not tokens or (got.double() - want).norm() < BOUNDS[dtype] * want.norm()


def test_agrees_with_float64() -> None:
    for dtype, (tokens, dim) in product((torch.float32, torch.float16), ((7, 40), (0, 8), (3, 1030))):
        agree(dtype, "cpu", tokens, dim)


def test_is_for_inference_alone(monkeypatch) -> None:
    monkeypatch.setattr(lookup, "triton_refuses", lambda weight: None)
    lookups, weight, bias = cases(torch.float32, "cpu", 2, 8)[-1], torch.ones(8), torch.zeros(8)
    assert lookup.fuses(lookups, weight, bias) and lookup.fuses(lookups, weight, None)
    for trained in (weight, bias, lookups[1].table):
        trained.requires_grad_()
        assert not lookup.fuses(lookups, weight, bias)
        with torch.no_grad():
            assert lookup.fuses(lookups, weight, bias)
        trained.requires_grad_(False)
    assert not lookup.fuses([Lookup(lookups[0].table, torch.zeros(2, device="meta").int())], weight, bias)


def test_compiles() -> None:
    tables = {f"t{i}": "*bf16:16" for i in range(3)} | {"i0": "*i64:16", "i1": "*i32:16", "i2": "*i64:16"}
    numbers = dict.fromkeys([f"{name}{i}" for name in "soc" for i in range(3)] + ["tokens"], "i32")
    rest = dict.fromkeys(("weight", "bias", "y"), "*bf16:16") | {"dim": "i32:16", "eps": "fp32"}
    flags = {"K0": 2, "K1": 2, "K2": 1, "BIAS": True, "ROWS": 1, "BLOCK": 1024}
    options = {"num_warps": 2, "debug": True, "sanitize_overflow": False}
    specs = [
        Spec("taut.kernels.lookup_triton", "_summed_norm", arch, tables | numbers | rest | flags, options)
        for arch in (80, 90)
    ]
    assert all(built.local == 0 and built.registers <= 64 for built in cross_compile(specs))


@pytest.mark.gpu
def test_agrees_on_a_device() -> None:
    for dtype, (tokens, dim) in product(BOUNDS, ((1, 768), (3000, 768), (33, 64), (5, 4100))):
        agree(dtype, "cuda", tokens, dim)
        weight = torch.ones(dim, dtype=dtype, device="cuda")
        assert lookup.fuses(cases(dtype, "cuda", 2, dim)[-1], weight, weight)
