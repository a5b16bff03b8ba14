"""Products with the experts' 4- and 8-bit matrices beside the same with what they stand for; compiled for
sm_80 and sm_90."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from taut.kernels import moe, moe_packed, moe_triton
from taut.kernels.moe_products import DenseMatrices, Tiles, block_of
from taut.kernels.moe_routing import Plan
from taut.kernels.packed import Codes, Scales
from taut.layers.experts import ExpertLinear
from taut.quant.blockwise import CODES, Blockwise, code_values
from taut.quant.int8 import Int8
from tests.kernels.compile import Spec, cross_compile
from tests.kernels.test_packed import run_ptx

BOUNDS = {torch.float16: 3e-3, torch.bfloat16: 2e-2}
FORMATS = {
    "nf4": lambda w: Blockwise.pack(w, "nf4", 64, False),
    "fp4-double": lambda w: Blockwise.pack(w, "fp4", 32, True),
    "nf4-wide": lambda w: Blockwise.pack(w, "nf4", 128, False),
    "int8": lambda w: Int8.pack(w, 6.0),
}


def packed(form: str, experts: int, out: int, inputs: int, bias: bool, device: str) -> ExpertLinear:
    """A projection whose experts are each made of two matrices."""
    layer = ExpertLinear(experts, 2, inputs, {"a": out // 2, "b": out // 2}, bias=bias)
    if bias:
        torch.nn.init.normal_(layer.bias)
    units = [FORMATS[form](torch.randn(out // 2, inputs) / inputs**0.5) for _ in range(2 * experts)]
    layer.pack(units)
    return layer.to(device)


def agree(form: str, tokens: int, dtype: torch.dtype, device: str, *, bias=False, gradients=False) -> None:
    torch.manual_seed(tokens)
    experts, count, dim, hidden = 5, 2, 128, 256
    gate_up = packed(form, experts, 2 * hidden, dim, bias, device)
    down = packed(form, experts, dim, hidden, bias, device)
    x = torch.randn(tokens, dim, device=device).to(dtype)
    weights = torch.rand(tokens, count, device=device)
    chosen = torch.stack([torch.randperm(3)[:count] for _ in range(tokens)]).to(device)  # two are idle
    seed = torch.randn(tokens, dim, device=device).to(dtype)
    results = []
    for wide in (None, torch.float64):
        leaf, shares = (t.to(wide or t.dtype).requires_grad_(gradients) for t in (x, weights))
        biases = [None if b is None else b.to(wide or dtype) for b in (gate_up.bias, down.bias)]
        if wide is None:
            first, second = gate_up.matrices(dtype), down.matrices(dtype)
            assert isinstance(first, moe_packed.PackedMatrices)
            made = moe_triton.mixture(leaf, shares, chosen, first, second, "silu")
        else:
            values = [m.packed.dequantize(torch.float64) for m in (gate_up, down)]
            first, second = (
                lambda e, rows, w=w, b=b: torch.nn.functional.linear(rows, w[e], None if b is None else b[e])
                for w, b in zip(values, biases, strict=True)
            )
            made = moe.mixture(leaf, shares, chosen, experts, first, second, "silu")
        grads = torch.autograd.grad(made, (leaf, shares), seed.to(made.dtype)) if gradients else ()
        results.append((made.detach(), *grads))
    for got, want in zip(*results, strict=True):
        assert torch.isfinite(got).all()
        assert (got.double() - want).norm() / want.norm() < BOUNDS[dtype]


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where no GPU is")


@interpreted
@pytest.mark.parametrize("form", FORMATS)
def test_agrees_with_what_the_codes_stand_for(form, monkeypatch):
    block_k = {"fp4-double": 32, "nf4": 64}.get(form, 128)
    monkeypatch.setattr(moe_packed, "tiles", lambda *_: Tiles(32, block_k, 4, 1))
    agree(form, 1, torch.float16, "cpu", bias=True)
    agree(form, 40, torch.float16, "cpu", gradients=form != "nf4-wide")


def test_other_dtypes_and_shapes_are_unpacked():
    layer = packed("nf4", 2, 8, 128, False, "cpu")
    assert isinstance(layer.matrices(torch.bfloat16), moe_packed.PackedMatrices)
    assert isinstance(layer.matrices(torch.float32), DenseMatrices)
    odd = packed("nf4", 2, 8, 96, False, "cpu")  # blocks span rows
    assert isinstance(odd.matrices(torch.bfloat16), DenseMatrices)
    codes = layer.packed.codes()
    assert "takes float16 and bfloat16" in moe_packed.refuses(codes, 128, torch.float32)
    assert "wants rows of whole blocks" in moe_packed.refuses(codes, 96, torch.float16)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_the_decoder_gives_the_values_of_all_bytes(dtype):
    for kind in CODES:
        values = code_values(kind, torch.device("cpu"))
        text = moe_packed.decoder(tuple(values.tolist()), dtype)
        for first in range(0, 256, 4):
            registers = run_ptx(text, {"$4": int.from_bytes(bytes(range(first, first + 4)), "little")})
            out = torch.tensor([registers[f"${i}"] for i in range(4)]).to(torch.int32).view(dtype)
            codes = torch.arange(first, first + 4)
            assert torch.equal(out, torch.cat((values[codes >> 4], values[codes & 15])).to(dtype))


def test_compiles():
    device, nf4 = torch.device("cpu"), tuple(code_values("nf4", torch.device("cpu")).tolist())
    pointers = dict.fromkeys(("order", "offsets", "tile_expert", "tile_row"), "*i32:16")
    pointers |= dict.fromkeys(("x", "out", "bias", "values"), "*bf16:16")
    pointers |= dict.fromkeys(("outputs", "inputs", "x_row"), "i32:16")
    specs = []
    for arch in (80, 90):
        for bits, rows, experts, outputs, act, double in (
            (4, 8, 128, 768, "silu", False), (4, 8192, 8, 14336, "silu", True), (4, 8192, 8, 4096, "", False),
            (4, 64, 8, 14336, "silu", False), (8, 8, 128, 768, "silu", False),
            (8, 8192, 8, 14336, "silu", False), (8, 300, 8, 4096, "", False),
        ):  # fmt: skip
            codes = Codes(torch.empty(0), Scales(torch.empty(0)), nf4 if bits == 4 else None)
            block = block_of(rows, experts, torch.bfloat16)
            plan = Plan(rows, 1, experts, block, *[torch.empty(0)] * 4)
            cut = moe_packed.tiles(plan, outputs, 2 if act else 1, codes, device)
            scales = {"scales": "*u8:16" if double else "*fp32:16", "DOUBLE": double}
            scales |= dict.fromkeys(("table", "nested", "offset"), "*fp32:16" if double else None)
            flags = {"codes": "*u8:16" if bits == 4 else "*i8:16", "BITS": bits, "BLOCK": 64}
            flags |= {"DECODER": "=" + (moe_packed.decoder(nf4, torch.bfloat16) if bits == 4 else "")}
            flags |= {"GATHER": 2, "SCATTER": not act, "BIAS": bool(act), "ACT": f"={act}", "LIMIT": 0.0}
            flags |= {"EVEN": True, "BM": block, "BN": cut.block_n, "BK": cut.block_k, "PDL": arch == 90}
            options = {"num_warps": cut.warps, "num_stages": cut.stages}
            arguments = pointers | scales | flags
            specs.append(Spec("taut.kernels.moe_packed", "_product", arch, arguments, options))
    for spec, built in zip(specs, cross_compile(specs, processes=2), strict=True):
        limit = 166912 if spec.arch == 80 else 232448
        assert built.local == 0 and built.stack == 0 and built.shared <= limit, (spec, built)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("form", FORMATS)
def test_sweep_on_a_device(form, dtype):
    for tokens in (1, 7, 70, 900):
        agree(form, tokens, dtype, "cuda", bias=tokens == 7, gradients=tokens == 70)
