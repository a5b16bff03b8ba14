"""Norms, with and without the residual, beside the float64 reference; compiled for sm_80 and sm_90."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from taut.errors import RequestError
from taut.kernels import norm, norm_triton
from tests.kernels.compile import Spec, cross_compile

BOUNDS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
OPS = {  # name, takes a residual, takes a bias, offset
    "rms": ("rms_norm", False, None, 0.0),
    "rms, offset": ("rms_norm", False, None, 1.0),
    "layer": ("layer_norm", False, True, None),
    "layer without bias": ("layer_norm", False, False, None),
    "add rms": ("add_rms_norm", True, None, 0.0),
    "add layer": ("add_layer_norm", True, True, None),
}


def distance(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-9)).item()


def agree(op: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    name, adds, bias, offset = OPS[op]
    generator = torch.Generator(device).manual_seed(7)
    sizes = [shape, *([shape] if adds else []), shape[-1:], *([shape[-1:]] if bias else [])]
    inputs = [torch.randn(size, generator=generator, device=device, dtype=dtype) for size in sizes]
    tail = [None] if bias is False else []
    tail += [1e-5] if offset is None else [1e-5, offset]
    results = []
    for module, wide in ((norm_triton, dtype), (norm, torch.float64)):
        leaves = [t.to(wide).requires_grad_() for t in inputs]
        out = getattr(module, name)(*leaves, *tail)
        seed = torch.sin(torch.arange(out.numel(), device=device)).view_as(out).to(dtype).to(wide)
        with torch.no_grad():
            alone = getattr(module, name)(*leaves, *tail)
        results.append((out, alone, *torch.autograd.grad(out, leaves, seed)))
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape
        assert not got.numel() or distance(got, want) < BOUNDS[dtype], (op, shape, dtype)


def test_agrees_with_float64() -> None:
    for op, shape in product(OPS, [(5, 72), (0, 24), (3, 2, 20)]):
        agree(op, shape, torch.float32, "cpu")
    agree("add rms", (3, 40), torch.float16, "cpu")


def test_heads_of_a_fused_projection_keep_their_strides() -> None:
    qkv = torch.randn(3, 6, 16)
    weight = torch.randn(16)
    got = norm_triton.rms_norm(qkv[:, 1:4], weight, 1e-6)
    torch.testing.assert_close(got, norm.rms_norm(qkv[:, 1:4], weight, 1e-6))


def test_errors() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(RequestError, match=r"rows of 8 got a weight of shape \[7\]"):
        norm_triton.rms_norm(x, torch.ones(7), 1e-6)
    with pytest.raises(RequestError, match="residual is"):
        norm_triton.add_rms_norm(x, torch.randn(3, 8), torch.ones(8), 1e-6)


def test_compiles() -> None:
    pointers = dict.fromkeys(("x", "residual", "weight", "bias", "y", "total", "dy", "dx"), "*bf16:16")
    floats = dict.fromkeys(("means", "rstds", "dw_parts", "db_parts"), "*fp32:16")
    numbers = {"rows": "i32", "inner": "i32", "x_outer": "i32:16", "x_inner": "i32", "dim": "i32:16"}
    common = pointers | floats | numbers | {"eps": "fp32", "offset": "fp32", "SHIFT": False, "SAVE": True}
    specs = [
        Spec(
            "taut.kernels.norm_triton",
            kernel,
            arch,
            common | {"LAYER": layer, "ADD": True, "BIAS": layer, "WEIGHT": True, "ROWS": 1, "BLOCK": 8192}
            | {"PDL": arch >= 90},
            {"num_warps": 16},
        )
        for kernel, arch, layer in product(("_forward", "_backward"), (80, 90), (False, True))
    ]  # fmt: skip
    assert all(built.local == 0 and built.stack == 0 for built in cross_compile(specs))


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_sweep_on_a_device(op) -> None:
    shapes = [(1, 4096), (4097, 4096), (300, 32, 128), (17, 71, 64), (5, 1000), (33, 16384), (2, 65536)]
    for shape, dtype in product(shapes, BOUNDS):
        agree(op, shape, dtype, "cuda")
