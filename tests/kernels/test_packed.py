"""Kernels of packed weights beside the dequantized product: of few rows, of many, and unpacking; compiled for
sm_80 and sm_90."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from taut.kernels import int8_triton, packed_rows, packed_triton
from taut.kernels.act import glu
from taut.kernels.packed import Scales
from taut.quant.blockwise import CODES, Blockwise, code_values, scale_values
from taut.quant.int8 import Int8
from tests.kernels.compile import Spec, cross_compile

HALVES = (torch.float16, torch.bfloat16)
BOUNDS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def four_bit(kind: str, block: int, double: bool, shape: tuple[int, int], device: str):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    packed = Blockwise.pack(weight, kind, block, double)
    extra = (scale_values(packed.codes.device), packed.nested, packed.offset) if double else ()
    return packed, code_values(kind, packed.codes.device), Scales(packed.absmax, *extra)


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape and torch.isfinite(got).all()
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def check_rows(packed, rows: int, dtype: torch.dtype, **around: bool) -> None:
    """A product of few rows by `packed`, with what stands around it, against the same in float64."""
    device = next(packed.buffers()).device
    act = "silu" if around.get("act") else None
    outputs = packed.out_features // 2 if act else packed.out_features
    x = torch.randn(rows, packed.in_features, device=device).to(dtype)
    bias = torch.randn(packed.out_features, device=device).to(dtype) if around.get("bias") else None
    residual = torch.randn(rows, outputs, device=device).to(dtype) if around.get("residual") else None
    got = packed.fused(x, bias, act, residual)
    assert got is not None and got.dtype is dtype
    wide = None if bias is None else bias.double()
    want = F.linear(x.double(), packed.dequantize(torch.float64), wide)
    want = want if act is None else glu(want, act)
    want = want if residual is None else want + residual.double()
    # The 16 values of 4-bit codes are rounded to the dtype of x, as bitsandbytes rounds what it unpacks.
    assert off(got, want) < BOUNDS[dtype], (packed, rows, around)


SHAPES = [(37, 64), (192, 1088), (9, 4096), (4096, 576)]
AROUND = [{}, {"bias": True}, {"residual": True}, {"bias": True, "residual": True}]


def check_int8(rows: int, dtype: torch.dtype, device: str, outliers: int, act: str | None, tile=None) -> None:
    """LLM.int8() of many rows beside what the CPU computes with PyTorch alone; with more outliers than
    the kernel has room for, beside the product in 16 bit."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 96, generator=generator).clamp(-4, 4).to(dtype)
    for at in range(outliers):
        x[at % rows, (7 * at) % 96] = (7.0 + at % 5) * (-1) ** at
    packed = Int8.pack(torch.randn(76, 96, generator=generator), 6.0)
    bias, outputs = torch.randn(76, generator=generator).to(dtype), 38 if act else 76
    residual = torch.randn(rows, outputs, generator=generator).to(dtype)
    y = packed.product(x, bias).float()
    if outliers > int8_triton.CAPACITY:
        y = F.linear(x.float(), packed.dequantize(torch.float32), bias.float())
    want = residual + (y if act is None else glu(y, act))
    packed.to(device)
    got = int8_triton.product(
        x.to(device), packed.values, packed.scale, 6.0, bias.to(device), act, residual.to(device), tile
    )
    assert got.dtype is dtype and off(got.cpu(), want) < BOUNDS[dtype]


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


SMALL = (32, 32, 32, 4, 2)  # a tile


@interpreted
@pytest.mark.parametrize(
    ("outliers", "act"), [(0, None), (5, "silu"), (60, None)], ids=["none", "some", "too-many"]
)
def test_int8_products_of_many_rows(outliers, act, monkeypatch):
    monkeypatch.setattr(int8_triton, "CAPACITY", 32)
    check_int8(70, torch.float16, "cpu", outliers, act, SMALL)


@interpreted
def test_unpacking():
    check_unpacked(torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 17, 33, 64])
def test_few_rows_on_a_gpu(rows, dtype):
    for shape in SHAPES:
        for kind, block, double in (("nf4", 64, False), ("fp4", 64, True), ("nf4", 128, True)):
            if shape[1] % block == 0:
                packed = four_bit(kind, block, double, shape, "cuda")[0]
                for around in AROUND if kind == "nf4" and block == 64 else ({},):
                    check_rows(packed, rows, dtype, **around)
        packed = Int8.pack(torch.randn(shape, device="cuda"), 6.0)
        for around in AROUND:
            check_rows(packed, rows, dtype, **around)
    four = four_bit("nf4", 64, False, (192, 1088), "cuda")[0]
    for packed in (four, Int8.pack(four.dequantize(dtype), 6.0)):
        check_rows(packed, rows, dtype, act=True)
        check_rows(packed, rows, dtype, act=True, bias=True, residual=True)


BLOCKS = ((64, False), (64, True), (128, True), (512, True), (128, False))  # and whether scales have scales


@pytest.mark.gpu
def test_cuts_give_the_same_product():
    x = torch.randn(11, 4096, device="cuda").half()
    weights = [four_bit("nf4", *blocks, (320, 4096), "cuda")[0] for blocks in BLOCKS]
    wanted = [F.linear(x.double(), packed.dequantize(torch.float64)) for packed in weights]
    cuts = itertools.product((2, 4), (1, 2, 4), (1, 2), (1, 2, 4, 8), (1, 2, 5), (0, 2, 4))
    for at, cut in enumerate(list(cuts)[::13]):  # every value of each, beside most of the others
        packed, want = weights[at % len(BLOCKS)], wanted[at % len(BLOCKS)]
        got = packed_rows.product(
            x,
            packed.codes,
            packed._kernel_scales(),
            320,
            values=tuple(code_values("nf4", x.device).tolist()),
            block=packed.block,
            cut=packed_rows.Cut(*cut),
        )
        assert off(got, want) < BOUNDS[torch.float16], (cut, packed.block)


@pytest.mark.gpu
def test_a_product_is_the_same_bit_for_bit_every_time():
    packed = four_bit("nf4", 64, True, (4096, 4096), "cuda")[0]
    x = torch.randn(3, 4096, device="cuda").half()
    first = packed(x)
    assert all(torch.equal(first, packed(x)) for _ in range(20))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_many_rows_on_a_gpu(dtype, monkeypatch):
    check_unpacked(dtype, "cuda")
    for rows in (65, 130, 257):
        for outliers, act in ((0, None), (5, None), (20, "silu")):
            check_int8(rows, dtype, "cuda", outliers, act)
    monkeypatch.setattr(int8_triton, "CAPACITY", 32)
    check_int8(130, dtype, "cuda", 60, "silu")


def test_refusals_say_why():
    x = torch.zeros(2, 96)
    assert "takes float16 and bfloat16" in packed_rows.refuses(x)
    assert "takes 1 to 64 rows, not 65" in packed_rows.refuses(torch.zeros(65, 128).half())
    assert "divisible by 64, not 96" in packed_rows.refuses(x.half())
    assert "whole blocks of 64 or more" in packed_rows.refuses(torch.zeros(2, 192).half(), 128)
    assert "whole blocks of 64 or more" in packed_rows.refuses(torch.zeros(2, 192).half(), 32)
    assert packed_rows.refuses(torch.zeros(2, 192).half(), 64) is None
    assert "divisible by 16, not 90" in int8_triton.refuses(torch.zeros(70, 90).half())


def _permute(a: int, b: int, selector: int) -> int:
    pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    return int.from_bytes(bytes(pool[selector >> 4 * i & 7] for i in range(4)), "little")


def _halves(a: int, b: int, dtype: torch.dtype, op) -> int:
    x, y = (torch.tensor([v & 0xFFFF, v >> 16]).to(torch.int16).view(dtype) for v in (a, b))
    low, high = op(x.float(), y.float()).to(dtype).view(torch.int16).tolist()
    return (low & 0xFFFF) | (high & 0xFFFF) << 16


CARRIED_OUT = {
    "and.b32": int.__and__,
    "or.b32": int.__or__,
    "shr.b32": int.__rshift__,
    "xor.b32": int.__xor__,
    "mov.b32": int,
    "mul.hi.u32": lambda a, b: a * b >> 32,
    "dp4a.u32.u32": lambda a, b, c: (
        c + sum(x * y for x, y in zip(a.to_bytes(4, "little"), b.to_bytes(4, "little"), strict=True))
    ),
    "lop3.b32": lambda a, b, c, table: a & b | c,
    "prmt.b32": _permute,
    "sub.f16x2": lambda a, b: _halves(a, b, torch.float16, torch.sub),
    "fma.rn.bf16x2": lambda a, b, c: _halves(a, c, torch.bfloat16, lambda x, y: y - x),
}


def run_ptx(text: str, registers: dict[str, int], shared: list[int] | None = None) -> dict[str, int]:
    """The registers after the PTX, carried out here, with shared memory: the interpreter knows none."""
    carried_out = CARRIED_OUT | {"ld.shared.b32": lambda at: shared[at // 4]}
    for line in text.strip("{ }").split(";"):
        op, _, operands = line.strip().partition(" ")
        if op in carried_out:
            target, *given = [word.strip(" []") for word in operands.split(",")]
            words = [registers[w] if w in registers else int(w, 0) & 0xFFFFFFFF for w in given]
            registers[target] = carried_out[op](*words)
        else:
            assert op in ("", ".reg"), op
    return registers


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_decoders_give_the_values_of_all_bytes(dtype):
    for kind in CODES:
        values = code_values(kind, torch.device("cpu"))
        held, text = packed_rows.tables4(tuple(values.tolist()), dtype)
        pairs = packed_rows.pairs4(tuple(values.tolist()), dtype).repeat_interleave(32).tolist()
        for first in range(0, 256, 4):
            codes = torch.arange(first, first + 4)
            want = values[torch.stack((codes >> 4, codes & 15), 1).flatten()].to(dtype)
            word = int.from_bytes(bytes(range(first, first + 4)), "little")
            lane = first % 32
            for ptx, given in ((text, held), (packed_rows.finder4(), (4 * lane,))):
                registers = {f"${5 + i}": number & 0xFFFFFFFF for i, number in enumerate(given)}
                registers = run_ptx(ptx, registers | {"$4": word}, pairs)
                out = torch.tensor([registers[f"${i}"] for i in range(4)]).to(torch.int32).view(dtype)
                assert torch.equal(out, want)
    for first in range(0, 256, 4):
        registers = {"$2": int.from_bytes(bytes(range(first, first + 4)), "little")}
        run_ptx(packed_rows.decoder8(dtype), registers)
        out = torch.tensor([registers[f"${i}"] for i in range(2)]).to(torch.int32).view(dtype)
        assert out.tolist() == torch.arange(first, first + 4).to(torch.int8).tolist()


def few_rows(
    arch: int, bits: int, rows: int, act: str, double: bool, dtype: torch.dtype, outputs: int = 4096
) -> Spec:
    kind = "*bf16:16" if dtype is torch.bfloat16 else "*fp16:16"
    cut = packed_rows.cut_of(rows, outputs, 11008, act != "", bits, torch.device("cpu"))
    values = tuple(code_values("nf4", torch.device("cpu")).tolist())
    decoder = packed_rows.tables4(values, dtype)[1] if bits == 4 else packed_rows.decoder8(dtype)
    arguments = dict.fromkeys(("x", "bias", "residual", "out"), kind)
    arguments |= {"codes": "*u8:16" if bits == 4 else "*i8:16", "lookup": "*i32:16" if bits == 4 else None}
    arguments |= {"scales": "*u8:16" if double else "*fp32:16"}
    arguments |= dict.fromkeys(("table", "nested", "offset"), "*fp32:16" if double else None)
    arguments |= {"parts": "*fp32:16", "counters": "*i32:16"}
    arguments |= {"rows": "i32", "outputs": "i32:16", "inputs": "i32:16", "steps": "i32"}
    arguments |= {"BITS": bits, "BLOCK": 64, "DOUBLE": double, "BIAS": True, "ACT": f"={act}"}
    arguments |= {
        "RESIDUAL": True,
        "DECODER": f"={decoder}",
        "MULTIPLIER": f"={packed_rows.multiplier(dtype)}",
    }
    arguments |= {
        "COLUMNS": max(1, rows // 8),
        "TILES": cut.tiles,
        "AHEAD": cut.ahead,
        "WHOLE": True,
        "WN": cut.wn,
    }
    arguments |= {"WK": cut.wk, "SPLITS": 2, "LOOKUPS": cut.lookups, "PDL": arch >= 90}
    return Spec("taut.kernels.packed_rows", "_product", arch, arguments, {"num_warps": cut.wn * cut.wk})


def test_compiles():
    unpack = "taut.kernels.packed_triton"
    out = {"out": "*bf16:16", "count": "i32:16"}
    four = out | {"codes": "*u8:16", "values": "*fp32:16", "BLOCK": 64, "SIZE": 1024}
    single = {"absmax": "*fp32:16", "scale_table": None, "nested": None, "offset": None, "DOUBLE": False}
    double = {"absmax": "*u8:16", "DOUBLE": True}
    double |= dict.fromkeys(("scale_table", "nested", "offset"), "*fp32:16")
    eight = {"values": "*i8:16", "scale": "*fp32:16", "out": "*bf16:16", "inputs": "i32:16", "SIZE": 2048}
    many = dict.fromkeys(("x", "strip", "weight_strip", "wide", "bias", "residual", "out"), "*bf16:16")
    many |= dict.fromkeys(("values", "weight"), "*i8:16") | dict.fromkeys(
        ("scale", "weight_scale"), "*fp32:16"
    )
    many |= {"found": "*i32:16", "flags": "*i32:16", "rows": "i32", "outputs": "i32:16", "inputs": "i32:16"}
    many |= {"OUTLIERS": True, "BIAS": True, "RESIDUAL": True, "CAPACITY": 128, "EVEN": True, "GROUP": 8}
    many |= {"threshold": "fp32", "span": "i32", "count": "i32:16", "BLOCK": 4096, "SIZE": 4096}
    specs = []
    for arch in (80, 90):
        specs += [Spec(unpack, "_unpack4", arch, four | scales) for scales in (single, double)]
        specs += [Spec(unpack, "_unpack8", arch, eight)]
        specs += [
            few_rows(arch, 4, 1, "", False, torch.float16),
            few_rows(arch, 4, 16, "", True, torch.bfloat16, 12288),
            few_rows(arch, 8, 32, "", False, torch.bfloat16),
        ]
        specs += [
            few_rows(arch, 4, 32, "silu", True, torch.bfloat16),
            few_rows(arch, 8, 1, "silu", False, torch.float16),
        ]
        for name, sizes in (
            ("_find", {"BLOCK": 256}),
            ("_list", {}),
            ("_quantize", {}),
            ("_gather", {"BLOCK": 32}),
            ("_widen", {}),
        ):
            specs.append(Spec("taut.kernels.int8_triton", name, arch, many | sizes, {"num_warps": 8}))
        for rows, act in ((4096, ""), (512, ""), (4096, "silu")):
            bm, bn, bk, warps, stages = int8_triton.tiles(rows, 4096, act != "", torch.device("cpu"))
            sizes = {"BM": bm, "BN": bn, "BK": bk, "ACT": f"={act}"}
            options = {"num_warps": warps, "num_stages": stages}
            specs.append(Spec("taut.kernels.int8_triton", "_product", arch, many | sizes, options))
        none = dict.fromkeys(("found", "strip", "weight_strip")) | {"OUTLIERS": False}
        specs.append(Spec("taut.kernels.int8_triton", "_product", arch, many | sizes | none, options))
    for spec, built in zip(specs, cross_compile(specs), strict=True):
        assert built.local == 0 and (built.stack == 0 or "packed" not in spec.module), (spec, built)
        assert built.shared <= (166912 if spec.arch == 80 else 232448), (spec, built)
        if spec.module.endswith("packed_rows"):
            # One piece of memory and nothing before it: values are looked up from where memory begins.
            sums = 128 * spec.options["num_warps"] * spec.arguments["COLUMNS"] * spec.arguments["TILES"] * 4
            assert built.shared == max(sums, 32768 if spec.arguments["LOOKUPS"] else 0), (spec, built)
        assert built.wgmma == (
            spec.arch == 90 and spec.module.endswith("int8_triton") and spec.kernel == "_product"
        )
