"""Products of a few rows, with what is fused around them, beside the float64 reference; compiled for sm_80
and sm_90."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from taut.errors import RequestError
from taut.kernels import gemv_triton
from taut.kernels.act import ACTIVATIONS
from taut.kernels.gemv import gemv, gemv_reference
from taut.kernels.gemv_triton import Tiles
from tests.kernels.compile import Spec, cross_compile

BOUNDS = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


def agree(rows, outputs, inputs, dtype, device, *, norm, act, residual, bias, cut=None) -> None:
    generator = torch.Generator(device).manual_seed(rows * outputs + inputs)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    weights = normal(outputs * 2 if act else outputs, inputs) / inputs**0.5
    tensors = {
        "bias": normal(weights.shape[0]) if bias else None,
        "norm_weight": normal(inputs) if norm else None,
        "residual": normal(rows, outputs) if residual else None,
    }
    x = 3 * normal(rows, inputs)
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    numbers = {"eps": 1e-5, "offset": 0.5} if norm else {}
    want = gemv_reference(x.double(), weights.double(), act=act, **wide, **numbers)
    b, n, r = tensors.values()
    if cut is None:
        got = gemv(x, weights, act=act, **tensors, **numbers, out_dtype=torch.float32)
    else:
        got = gemv_triton.run(x, weights, b, n, 1e-5, 0.5, act, r, torch.float32, cut)
    assert got.shape == want.shape
    error = ((got.double() - want).norm() / want.norm()).item()
    slack = 1 if got.numel() > 16 else 3  # the norm of a few numbers may be far below the usual
    assert error < slack * BOUNDS[dtype], (rows, outputs, inputs, norm, act, residual, bias, cut, error)


CUTS = [Tiles(4, 64, 1), Tiles(4, 64, 1, 2, 3), Tiles(8, 32, 1, 2, 1, False)]


def test_agrees_with_float64() -> None:
    for (rows, cut), (outputs, inputs) in product(
        ((1, CUTS[0]), (2, CUTS[0]), (2, CUTS[1]), (5, CUTS[2])), ((24, 64), (21, 144))
    ):
        for act, rest in ((None, False), ("silu", True)):
            flags = {"norm": rest, "act": act, "residual": not rest, "bias": rest}
            agree(rows, outputs, inputs, torch.float16, "cpu", cut=cut, **flags)
    for cut, inputs in ((CUTS[0], 48), (None, 64)):
        agree(1, 9, inputs, torch.float16, "cpu", cut=cut, norm=True, act=None, residual=True, bias=True)


def test_large_rows_stay_in_range() -> None:
    x = torch.full((3, 64), 30000.0, dtype=torch.float16)
    weight = torch.eye(64, dtype=torch.float16)[:16].contiguous()
    norm_weight = torch.full((64,), 8.0, dtype=torch.float16)
    for cut in CUTS[:2]:
        got = gemv_triton.run(x, weight, None, norm_weight, 0.0, 0.0, None, None, torch.float32, cut)
        torch.testing.assert_close(got, torch.full((3, 16), 8.0), rtol=2e-3, atol=0)


def test_errors() -> None:
    x, weight = torch.randn(1, 64).half(), torch.randn(8, 64).half()
    for args, kwargs, words in (
        ((x.float(), weight), {}, "of x's dtype"),
        ((x.expand(33, 64), weight), {}, "1 to 32 rows"),
        ((x, weight[:, :24]), {}, "contiguous weight"),
        ((x, weight), {"act": "swoosh"}, "'swoosh' is unknown"),
        ((x, weight), {"residual": x}, r"residual has shape \[1, 64\]; expected \[1, 8\]"),
        ((x[:, :32], weight), {}, r"x has shape \[1, 32\]; expected \[1, 64\]"),
    ):
        with pytest.raises(RequestError, match=words):
            gemv(*args, **kwargs)


def test_compiles() -> None:
    pointers = dict.fromkeys(("x", "weight", "bias", "norm_weight", "residual", "out"), "*bf16:16")
    pointers |= {"parts": "*fp32:16", "counters": "*i32:16", "N": "i32:16", "K": "i32:16", "span": "i32:16"}
    pointers |= {"eps": "fp32", "offset": "fp32", "NORM": True, "BIAS": True, "RESIDUAL": True, "EVEN": True}
    device, specs, limits = torch.device("cpu"), [], []
    for arch, rows, (outputs, inputs, act) in product(
        (80, 90), (1, 2, 8, 32), ((4096, 4096, ""), (12288, 4096, ""), (11008, 4096, "silu"), (1, 4096, ""))
    ):
        cut = gemv_triton.tiles(rows, outputs, inputs, act != "", device)
        sizes = {"ACT": f"={act}", "BLOCK_N": cut.block_n, "BLOCK_K": cut.block_k, "PDL": arch >= 90}
        if cut.stages:
            sizes |= {"M": "i32", "SPLITS": cut.splits, "BLOCK_M": max(rows, 16), "STAGES": cut.stages}
            sizes |= {"X_FIRST": cut.x_first}
        else:
            sizes |= {"M": rows}
        if outputs == 1:
            sizes |= {"N": 1}  # which launches make a constant
        kernel = "_by_tensor_cores" if cut.stages else "_by_hand"
        specs.append(
            Spec("taut.kernels.gemv_triton", kernel, arch, pointers | sizes, {"num_warps": cut.warps})
        )
        limits.append(166912 if arch == 80 else 232448)
    for spec, built, limit in zip(specs, cross_compile(specs), limits, strict=True):
        assert built.local == 0 and built.stack == 0 and built.shared <= limit, (spec, built)


@pytest.mark.gpu
def test_sweep_on_a_device() -> None:
    shapes = [(4096, 4096), (12288, 4096), (4096, 11008), (32000, 2048), (576, 576), (1000, 1536)]
    shapes += [(7, 16), (1, 48)]
    for rows, (outputs, inputs), dtype in product((1, 2, 3, 8, 16, 17, 32), shapes, BOUNDS):
        for norm, act, residual, bias in ((True, None, False, True), (False, None, True, False)):
            agree(rows, outputs, inputs, dtype, "cuda", norm=norm, act=act, residual=residual, bias=bias)
        agree(rows, outputs, inputs, dtype, "cuda", norm=True, act="silu", residual=False, bias=False)
    for act in ACTIVATIONS:
        agree(1, 512, 512, torch.bfloat16, "cuda", norm=False, act=act, residual=False, bias=True)


@pytest.mark.gpu
def test_runs_are_equal_bit_for_bit() -> None:
    x, weight = (torch.randn(n, 4096, device="cuda").half() for n in (8, 4096))
    first = gemv(x, weight)
    assert all(torch.equal(first, gemv(x, weight)) for _ in range(20))
