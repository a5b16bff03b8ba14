"""Kernels of a mixture of experts beside the float64 reference, forward and backward, and the plans they work
by; compiled for sm_80 and sm_90."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from taut.config import Moe
from taut.errors import RequestError
from taut.kernels import moe, moe_products, moe_routing, moe_triton
from taut.kernels.moe_products import DenseMatrices, Tiles, block_of
from taut.layers.moe import MoeMlp
from taut.quant.config import BitsAndBytesConfig
from taut.quant.stored import Quantize
from tests.kernels.compile import Spec, cross_compile

BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


@dataclass(frozen=True)
class Case:
    """`used`: how many of the experts the router may choose."""

    tokens: int
    experts: int
    chosen: int
    dim: int = 48
    hidden: int = 40
    used: int | None = None
    bias: bool = False
    act: str = "silu"
    limit: float | None = None


CASES = {
    "one token": Case(1, 8, 2),
    "few tokens of many experts": Case(3, 33, 4, hidden=24),
    "experts without tokens": Case(23, 9, 2, used=3),
    "one expert for all": Case(37, 4, 1, used=1),
    "every expert, ends of tiles": Case(50, 3, 3, dim=70, hidden=33),
    "biases and limits": Case(21, 5, 2, bias=True, act="gelu_quick", limit=0.7),
    "no tokens": Case(0, 4, 2),
}


def chosen_of(case: Case, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(case.tokens)
    picks = [torch.randperm(case.used or case.experts, generator=generator) for _ in range(case.tokens)]
    picks = [pick[: case.chosen] for pick in picks]
    return (torch.stack(picks) if picks else torch.empty(0, case.chosen).long()).to(device)


def product_of(weight: Tensor, bias: Tensor | None) -> moe.Product:
    return lambda expert, rows: F.linear(rows, weight[expert], None if bias is None else bias[expert])


def agree(case: Case, dtype: torch.dtype, device: str, gradients: bool) -> None:
    generator = torch.Generator(device).manual_seed(case.tokens * 7 + case.dim)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    given = {
        "x": normal(case.tokens, case.dim),
        "weights": torch.rand(case.tokens, case.chosen, generator=generator, device=device),
        "gate_up": normal(case.experts, 2 * case.hidden, case.dim) / case.dim**0.5,
        "down": normal(case.experts, case.dim, case.hidden) / case.hidden**0.5,
        "residual": normal(case.tokens, case.dim),
    }
    if case.bias:
        given |= {"in": normal(case.experts, 2 * case.hidden), "out": normal(case.experts, case.dim)}
    chosen, seed = chosen_of(case, device), normal(case.tokens, case.dim)
    results = []
    for wide in (None, torch.float64):
        t = {name: t.to(wide or t.dtype).requires_grad_(gradients) for name, t in given.items()}
        if wide is None:
            gate_up, down = DenseMatrices(t["gate_up"], t.get("in")), DenseMatrices(t["down"], t.get("out"))
            made = moe_triton.mixture(
                t["x"], t["weights"], chosen, gate_up, down, case.act, case.limit, t["residual"]
            )
        else:
            gate_up, down = product_of(t["gate_up"], t.get("in")), product_of(t["down"], t.get("out"))
            made = moe.mixture(
                t["x"], t["weights"], chosen, case.experts, gate_up, down, case.act, case.limit
            )
            made = made + t["residual"]
        out, seed = made.detach(), seed.to(made.dtype)
        grads = torch.autograd.grad(made, t.values(), seed, materialize_grads=True) if gradients else ()
        results.append((out, *grads))
    for name, got, want in zip(("out", *given), *results, strict=False):
        assert got.shape == want.shape and torch.isfinite(got).all(), name
        error = (got.double() - want).norm() / want.norm().clamp_min(1e-9)
        assert not got.numel() or error < BOUNDS[dtype], (name, case, error)


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where no GPU is")


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_float64(name, monkeypatch):
    monkeypatch.setattr(moe_products, "tiles", lambda *_: Tiles(32, 32, 4, 1))
    case = CASES[name]
    agree(case, torch.float16, "cpu", gradients=False)
    agree(case, torch.float32, "cpu", gradients=True)


@pytest.mark.parametrize("rows", [1, 40, 700, 2000])  # the last: sorted by PyTorch
def test_a_plan_has_every_row_once_with_its_expert(rows):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(rows)
    for experts, block in ((1, 16), (5, 16), (60, 64)):
        chosen = torch.randint(experts, (rows, 1), generator=generator)
        chosen[chosen == 2] = 0  # an expert without rows
        plan = moe_routing.arrange(chosen.to(device), experts, block)
        order, offsets = plan.order.tolist(), plan.offsets.tolist()
        assert order == chosen.flatten().argsort(stable=True).tolist()
        assert offsets == [0, *chosen.flatten().bincount(minlength=experts).cumsum(0).tolist()]
        tiles = [(e, r) for e, r in zip(plan.tile_expert.tolist(), plan.tile_row.tolist(), strict=True)]
        covered = [(e, i) for e, r in tiles if e >= 0 for i in range(r, min(r + block, offsets[e + 1]))]
        assert covered == [(chosen[row].item(), at) for at, row in enumerate(order)]


def test_routing_is_the_references_and_scores_that_are_not_finite_stay_within_bounds():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores = torch.randn(17, 13, generator=torch.Generator().manual_seed(0)).to(device)
    for normalised, chosen in ((False, 3), (True, 3), (True, 1), (False, 13)):
        got, want = moe_triton.route(scores, chosen, normalised), moe.route(scores, chosen, normalised)
        assert got[1].tolist() == want[1].tolist()
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-7)
    scores[0, 3], scores[1], scores[2, 1:] = float("nan"), float("nan"), float("-inf")
    weights, experts = moe_triton.route(scores, 4, True)
    assert all(len({*row}) == 4 and min(row) >= 0 and max(row) < 13 for row in experts.tolist())
    assert weights[:2].isnan().all() and weights[2].tolist() == [1, 0, 0, 0]


def test_scores_are_not_rounded_to_16_bits():
    x, weight, bias = torch.randn(5, 64).bfloat16(), torch.randn(7, 64).bfloat16(), torch.randn(7).bfloat16()
    scores = moe.scores_of(x, weight, bias)
    assert scores.dtype is torch.float32
    want = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(scores.double(), want, rtol=1e-5, atol=1e-5)
    assert moe.scores_of(x.double(), weight.double()).dtype is torch.float64


def test_equal_calls_give_equal_bits():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = CASES["few tokens of many experts"]
    x, chosen = torch.randn(3, 48, device=device).half(), chosen_of(case, device)
    gate_up, down = (
        torch.randn(33, 48, 48, device=device).half(),
        torch.randn(33, 48, 24, device=device).half(),
    )
    weights = torch.rand(3, 4, device=device)
    gate_up, down = DenseMatrices(gate_up, None), DenseMatrices(down, None)
    runs = [moe_triton.mixture(x, weights, chosen, gate_up, down, "silu") for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    # A token's result does not depend on the others beside it.
    alone = moe_triton.mixture(x[1:2], weights[1:2], chosen[1:2], gate_up, down, "silu")
    assert torch.equal(runs[0][1:2], alone)


@interpreted
@pytest.mark.parametrize("packed", [None, "nf4"])
def test_a_layer_gives_the_same_on_either_way(packed, monkeypatch):
    """The layer as it runs on a GPU, in the interpreter, beside the layer as it runs on a CPU."""
    config = Moe(6, 2, 64, "silu", normalised=True, shared=24)
    layer = MoeMlp(config, 128)
    for param in layer.parameters():
        torch.nn.init.normal_(param, std=0.1)
    if packed:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=packed, bnb_4bit_compute_dtype="float16"
        )
        for linear in (layer.experts.gate_up_proj, layer.experts.down_proj):
            matrices = [m for expert in linear.weight for m in expert.split(64)]
            linear.pack([Quantize(settings)(None, lambda m=m: m, m.device) for m in matrices])
    x, residual = torch.randn(2, 5, 128)
    want = layer(x, residual=residual)
    monkeypatch.setattr("taut.layers.moe.triton_refuses", lambda x: None)
    monkeypatch.setattr("taut.layers.moe.ops", lambda name, x: moe_triton)
    with torch.no_grad():
        got = layer(x, residual=residual)
    assert (got - want).norm() / want.norm() < (2e-3 if packed else 1e-6)
    assert (layer(x, residual=residual) - want).norm() / want.norm() < (2e-3 if packed else 1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_layer_in_16_bits_rounds_what_it_multiplies_and_no_shares(dtype, device):
    """Beside float64 over the same weights: rounding products and activations to 16 bits is 0.6 of the bound,
    rounding the shares of experts to float8, in the router or in the sum, 2.8 times it at least."""
    for normalised, chosen in product((False, True), (2, 8)):
        torch.manual_seed(0)
        layer = MoeMlp(Moe(8, chosen, 40, "silu", normalised=normalised), 48)
        for param in layer.parameters():
            torch.nn.init.normal_(param, std=param.shape[-1] ** -0.5)
        layer, x = layer.to(device, dtype), torch.randn(60, 48).to(device, dtype)
        with torch.no_grad():
            got = layer(x).double().cpu()
            want = layer.double().cpu()(x.double().cpu())
        assert (got - want).norm() / want.norm() < torch.finfo(dtype).eps, (normalised, chosen)


def test_errors():
    x = torch.randn(1, 4)
    with pytest.raises(RequestError, match="activation 'swoosh' is unknown; known: silu"):
        moe_triton.mixture(x, x, x.int(), DenseMatrices(x, None), DenseMatrices(x, None), "swoosh")


def test_compiles():
    device = torch.device("cpu")
    pointers = dict.fromkeys(("x", "weight", "bias", "out", "grad", "d_weight", "d_bias"), "*bf16:16")
    pointers |= dict.fromkeys(("order", "offsets", "tile_expert", "tile_row", "chosen"), "*i32:16")
    pointers |= {"scores": "*bf16:16", "weights": "*fp32:16", "d_weights": "*fp32:16"}
    pointers |= dict.fromkeys(("each", "residual", "d_each"), "*bf16:16")
    numbers = dict.fromkeys(("outputs", "inputs", "x_row", "g_row", "w_expert", "dim", "row"), "i32:16")
    numbers |= {"rows": "i32", "experts": "i32", "tiles": "i32"}
    specs = []
    for arch in (80, 90):
        pdl = {"PDL": arch == 90}
        for rows, experts, (outputs, inputs), act, turned in (
            (8, 128, (768, 2048), "silu", False), (8, 128, (2048, 768), "", False),
            (64, 8, (14336, 4096), "silu", False), (8192, 8, (14336, 4096), "silu", False),
            (8192, 8, (4096, 14336), "", False), (8192, 8, (4096, 14336), "", True),
        ):  # fmt: skip
            block = block_of(rows, experts, torch.bfloat16)
            plan = moe_routing.Plan(rows, 1, experts, block, *[torch.empty(0)] * 4)
            cut = moe_products.tiles(plan, outputs, inputs, 2 if act else 1, torch.bfloat16, device)
            strides = {"w_out": "i32:16", "w_in": 1} if not turned else {"w_out": 1, "w_in": "i32:16"}
            flags = {"GATHER": 0 if turned else 2, "SCATTER": turned, "BIAS": bool(act), "ACT": f"={act}"}
            flags |= {"LIMIT": 7.0 if act else 0.0, "EVEN": inputs % cut.block_k == 0, "PRECISION": "=tf32"}
            flags |= {"BM": block, "BN": cut.block_n, "BK": cut.block_k}
            options = {"num_warps": cut.warps, "num_stages": cut.stages}
            arguments = pointers | numbers | strides | flags | pdl
            specs.append(Spec("taut.kernels.moe_products", "_product", arch, arguments, options))
        flags = {"GATHER": 2, "SCATTER": True, "BIAS": True, "PRECISION": "=tf32", "BN": 128, "BK": 128}
        arguments, options = pointers | numbers | flags | {"BR": 64}, {"num_warps": 8, "num_stages": 2}
        specs.append(Spec("taut.kernels.moe_products", "_weight_gradient", arch, arguments, options))
        small = {"BLOCK": 1024, "EXPERTS": 128, "STEP": 16, "ROWS": 16} | pdl
        route = {"CHOSEN": 8, "NORMALISED": True, "BLOCK": 128, "WIDTH": 8} | pdl
        sums = {"CHOSEN": 8, "WIDTH": 8, "WEIGHTED": True, "RESIDUAL": True, "BLOCK": 1024} | pdl
        for kernel, own, warps in (
            ("_arrange", small, 8), ("_map", small, 4), ("_route", route, 1), ("_combine", sums, 4),
            ("_combine_backward", sums, 4),
        ):  # fmt: skip
            arguments = pointers | numbers | own
            specs.append(Spec("taut.kernels.moe_routing", kernel, arch, arguments, {"num_warps": warps}))
    for spec, built in zip(specs, cross_compile(specs, processes=2), strict=True):
        limit = 166912 if spec.arch == 80 else 232448
        assert built.local == 0 and built.stack == 0 and built.shared <= limit, (spec, built)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_sweep_on_a_device(dtype):
    for case in CASES.values():
        # Rounded to bfloat16, a few inputs of a limited gate cross the limit, where the gradient has a step.
        agree(case, dtype, "cuda", gradients=case.limit is None or dtype is not torch.bfloat16)
        agree(case, dtype, "cuda", gradients=False)
    big = Case(1, 128, 8, dim=2048, hidden=768)
    for tokens, case in product((1, 5, 33, 300, 1111), (big, replace(big, experts=8, chosen=2, hidden=1000))):
        agree(replace(case, tokens=tokens), dtype, "cuda", gradients=tokens in (5, 300))
