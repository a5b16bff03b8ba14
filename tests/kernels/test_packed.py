"""Kernels of packed weights beside the dequantized product; compiled for sm_80 and sm_90."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from taut.kernels import packed_triton
from taut.kernels.packed_triton import Scales
from taut.quant.blockwise import CODES, Blockwise, code_values, scale_values
from taut.quant.int8 import Int8
from tests.kernels.compile import Spec, cross_compile

BOUNDS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def four_bit(kind: str, block: int, double: bool, shape: tuple[int, int], device: str):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    packed = Blockwise.pack(weight, kind, block, double)
    extra = (scale_values(packed.codes.device), packed.nested, packed.offset) if double else ()
    return packed, code_values(kind, packed.codes.device), Scales(packed.absmax, *extra)


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape and torch.isfinite(got).all()
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def check_four_bit(kind: str, block: int, double: bool, dtype: torch.dtype, device: str) -> None:
    for outputs, inputs in ((37, 2 * block), (9, 1024 + block)):
        packed, values, scales = four_bit(kind, block, double, (outputs, inputs), device)
        x = torch.randn(1, inputs, device=device).to(dtype)
        for bias in (None, torch.randn(outputs, device=device).to(dtype)):
            got = packed_triton.product4(
                x, packed.codes, values, tuple(values.tolist()), scales, block, outputs, bias
            )
            wide = None if bias is None else bias.double()
            want = F.linear(x.double(), packed.dequantize(torch.float64), wide)
            assert got.dtype is dtype and off(got, want) < BOUNDS[dtype]


def check_int8(rows: int, dtype: torch.dtype, device: str) -> None:
    for outputs, inputs in ((37, 130), (9, 1111)):
        packed = Int8.pack(torch.randn(outputs, inputs, device=device), 6.0)
        x, bias = (torch.randn(*s, device=device).to(dtype) for s in ((rows, inputs), (outputs,)))
        got = packed_triton.product8(x, packed.values, packed.scale, bias)
        want = F.linear(x.double(), packed.dequantize(torch.float64), bias.double())
        assert got.dtype is dtype and off(got, want) < BOUNDS[dtype]


def check_unpacked(dtype: torch.dtype, device: str) -> None:
    for kind, block, double in (("nf4", 64, False), ("fp4", 32, True), ("nf4", 4096, True)):
        for shape in ((130, 96), (33, 50), (70, 1024)):
            packed, values, scales = four_bit(kind, block, double, shape, device)
            got = packed_triton.unpack4(packed.codes, values, scales, block, shape, dtype)
            assert off(got, packed.dequantize(torch.float64)) < BOUNDS[dtype]
    packed = Int8.pack(torch.randn(5, 2100, device=device), 6.0)
    got = packed_triton.unpack8(packed.values, packed.scale, dtype)
    assert off(got, packed.dequantize(torch.float64)) < BOUNDS[dtype]


interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where no GPU is")


@interpreted
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_four_bit_products(double):
    check_four_bit("nf4", 64, double, torch.float16, "cpu")
    check_four_bit("fp4", 32, double, torch.float16, "cpu")


@interpreted
@pytest.mark.parametrize("rows", [1, 5])
def test_int8_products(rows):
    check_int8(rows, torch.float16, "cpu")


@interpreted
def test_unpacking():
    check_unpacked(torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 8, 17, 33, 64])
def test_on_a_gpu(rows, dtype):
    for kind in CODES:
        for block in (32, 64, 256, 1024) if rows == 1 else ():
            for double in (False, True):
                check_four_bit(kind, block, double, dtype, "cuda")
    check_int8(rows, dtype, "cuda")
    check_unpacked(dtype, "cuda")


def test_refusals_say_why():
    x = torch.zeros(2, 96)
    assert "takes float16 and bfloat16" in packed_triton.refuses(x)
    assert "takes up to 64 rows, not 65" in packed_triton.refuses(torch.zeros(65, 96).half())
    assert "takes up to 1 row, not 2" in packed_triton.refuses(x.half(), 32)
    assert "whole blocks" in packed_triton.refuses(x[:1].half(), 64)
    assert packed_triton.refuses(x[:1].half(), 32) is None


def test_the_decoder_gives_the_values_of_all_bytes():
    """Its PTX, carried out here: the interpreter knows none."""

    def permute(a: int, b: int, selector: int) -> int:
        pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        return int.from_bytes(bytes(pool[selector >> 4 * i & 7] for i in range(4)), "little")

    carry_out = {
        "shr": lambda a, b: a >> b,
        "and": int.__and__,
        "or": int.__or__,
        "mov": int,
        "prmt": permute,
    }
    for kind in CODES:
        values = code_values(kind, torch.device("cpu"))
        lines = packed_triton._decoder(tuple(values.tolist())).strip("{ }").split(";")
        for first in range(0, 256, 4):
            registers = {"$4": int.from_bytes(bytes(range(first, first + 4)), "little")}
            for line in lines:
                op, _, operands = line.strip().partition(" ")
                target, *given = [word.strip() for word in operands.split(",")]
                name = op.partition(".")[0]
                if name in carry_out:
                    words = [registers[w] if w in registers else int(w, 0) for w in given]
                    registers[target] = carry_out[name](*words)
            out = torch.tensor([registers[f"${i}"] for i in range(4)]).to(torch.int32).view(torch.float16)
            codes = torch.arange(first, first + 4)
            assert torch.equal(out, torch.cat((values[codes & 15], values[codes >> 4])).half())


def test_compiles():
    module = "taut.kernels.packed_triton"
    common = {
        "x": "*bf16:16",
        "y": "*bf16:16",
        "bias": None,
        "BIAS": False,
        "outputs": "i32:16",
        "inputs": "i32:16",
    }
    four = common | {
        "codes": "*u8:16",
        "values": "*fp32:16",
        "BLOCK": 64,
        "ASM": "=" + packed_triton._decoder(tuple(code_values("nf4", torch.device("cpu")).tolist())),
        "out": "*bf16:16",
        "count": "i32:16",
    }
    single = {"absmax": "*fp32:16", "scale_table": None, "nested": None, "offset": None, "DOUBLE": False}
    double = {
        "absmax": "*u8:16",
        **dict.fromkeys(("scale_table", "nested", "offset"), "*fp32:16"),
        "DOUBLE": True,
    }
    eight = common | {"values": "*i8:16", "scale": "*fp32:16", "out": "*bf16:16", "SIZE": 2048}
    specs = []
    for arch in (80, 90):
        for scales in (single, double):
            specs += [
                Spec(module, "_one_row4", arch, four | scales | {"BN": 2, "BK": 1024}, {"num_warps": 1}),
                Spec(module, "_unpack4", arch, four | scales | {"SIZE": 1024}),
            ]
        specs += [
            Spec(module, "_one_row8", arch, eight | {"BN": 2, "BK": 2048}),
            Spec(module, "_few_rows8", arch, eight | {"rows": "i32", "BM": 16, "BN": 32, "BK": 128}),
            Spec(module, "_unpack8", arch, eight),
        ]
    for spec, built in zip(specs, cross_compile(specs), strict=True):
        assert built.local == 0 and built.registers < 255, spec
