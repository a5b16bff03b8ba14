"""Gated activations beside the float64 reference; compiled for sm_80 and sm_90."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from taut.errors import RequestError
from taut.kernels import act, act_triton
from tests.kernels.compile import Spec, cross_compile

BOUNDS = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def agree(name: str, tokens: int, hidden: int, dtype: torch.dtype, device: str, limit=None) -> None:
    generator = torch.Generator(device).manual_seed(3)
    gate_up = 2 * torch.randn(tokens, 2 * hidden, generator=generator, device=device, dtype=dtype)
    seed = torch.randn(tokens, hidden, generator=generator, device=device, dtype=dtype)
    results = []
    for module, wide in ((act_triton, dtype), (act, torch.float64)):
        leaf = gate_up.to(wide).requires_grad_()
        out = module.glu(leaf, name, limit)
        results.append((out, *torch.autograd.grad(out, leaf, seed.to(wide))))
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape and got.dtype == dtype
        error = (got.double() - want).norm() / want.norm().clamp_min(1e-9)
        assert not got.numel() or error < BOUNDS[dtype], (name, tokens, hidden, dtype)


def test_agrees_with_float64() -> None:
    for name in act.ACTIVATIONS:
        for tokens, hidden in ((3, 37), (1, 1030), (0, 8)):
            agree(name, tokens, hidden, torch.float32, "cpu")
    agree("gelu_quick", 3, 37, torch.float32, "cpu", limit=1.5)


def test_errors() -> None:
    with pytest.raises(RequestError, match="'sigmoid' is unknown; known: silu"):
        act_triton.glu(torch.randn(2, 4), "sigmoid")
    with pytest.raises(RequestError, match=r"got shape \[2, 5\]"):
        act_triton.glu(torch.randn(2, 5), "silu")


def test_compiles() -> None:
    pointers = dict.fromkeys(("gate_up", "out", "d_out", "d_gate_up"), "*bf16:16")
    numbers = dict.fromkeys(("hidden", "row", "d_row"), "i32:16")
    specs = [
        Spec(
            "taut.kernels.act_triton",
            kernel,
            arch,
            pointers | numbers | {"ACT": f"={name}", "LIMIT": limit, "BLOCK": 1024, "PDL": arch >= 90},
        )
        for kernel, arch in product(("_forward", "_backward"), (80, 90))
        for name, limit in [*((name, 0.0) for name in act.ACTIVATIONS), ("gelu_quick", 7.0)]
    ]
    assert all(built.local == 0 for built in cross_compile(specs))


@pytest.mark.gpu
def test_sweep_on_a_device() -> None:
    for name, (tokens, hidden), dtype in product(act.ACTIVATIONS, [(1, 11008), (700, 1000), (9, 7)], BOUNDS):
        agree(name, tokens, hidden, dtype, "cuda")
