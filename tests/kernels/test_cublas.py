"""Products on a GPU with the activation behind them: as close to float64 as one after the other."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from taut.kernels import cublas
from taut.kernels.act import ACTIVATIONS
from taut.layers.linear import Linear

HALF = (torch.float16, torch.bfloat16)


def error(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """Mean squared and largest."""
    off = got.double() - want
    return off.square().mean().item(), off.abs().max().item()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_approximation_of_gelu_rounded_once_is_closer_than_gelu_rounded_twice(dtype):
    """What `kernels.cublas` says of its GELU, of float32 sums of any size that models have."""
    for scale in (0.25, 0.5, 1.0, 2.0, 4.0):
        sums = torch.randn(100_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * scale
        want = F.gelu(sums)
        once = error(F.gelu(sums.float(), approximate="tanh").to(dtype), want)
        twice = error(F.gelu(sums.to(dtype).float()).to(dtype), want)
        assert once[0] < twice[0] and once[1] <= twice[1], scale


def operands(dtype: torch.dtype, device: str, rows: int = 200, scale: float = 1.0):
    generator = torch.Generator().manual_seed(2)
    shapes = (rows, 96), (64, 96), (64,)
    x, weight, bias = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return x, weight * scale / 96**0.5, bias * scale


def test_what_it_refuses(monkeypatch):
    x, weight, bias = operands(torch.bfloat16, "cpu")
    assert cublas.refuses(x, weight, bias, "gelu") == "runs on NVIDIA GPUs, not on cpu"
    monkeypatch.setattr(cublas, "device_refuses", lambda device: None)
    assert all(cublas.takes(x, weight, bias, act) for act in cublas.POINTWISE)
    assert "behind a bias alone" in cublas.refuses(x, weight, None, "gelu")
    assert "not silu" in cublas.refuses(x, weight, bias, "silu")
    assert "wants float16 or bfloat16" in cublas.refuses(x.float(), weight, bias, "gelu")
    assert "wants rows" in cublas.refuses(x[None], weight, bias, "gelu")
    assert not cublas.takes(x, weight, bias, None)
    weight.requires_grad_()
    assert cublas.refuses(x, weight, bias, "gelu") == "has no gradients"
    with torch.no_grad():
        assert cublas.takes(x, weight, bias, "gelu")


@pytest.mark.parametrize("act", ["gelu", "relu", "silu"])
def test_a_layer_hands_it_products_for_inference_alone(monkeypatch, act):
    """With the device's refusal aside, a CPU's own implementation stands for cuBLAS."""
    calls = []
    monkeypatch.setattr(cublas, "device_refuses", lambda device: None)
    real = cublas.linear
    monkeypatch.setattr(cublas, "linear", lambda *given: calls.append(given) or real(*given))
    layer = Linear(96, 64, bias=True, dtype=torch.bfloat16)
    x, weight, bias = operands(torch.bfloat16, "cpu")
    layer.weight.data, layer.bias.data = weight, bias
    want = ACTIVATIONS[act](F.linear(x.double(), weight.double(), bias.double()))
    got = layer(x, pointwise=act)
    assert not calls
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)
    got.sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(layer(x, pointwise=act).double(), want, rtol=2e-2, atol=2e-2)
    assert len(calls) == (act in cublas.POINTWISE)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@torch.no_grad()
def test_products_on_a_device_are_as_close_as_their_steps(dtype):
    for act, scale in product(cublas.POINTWISE, (0.25, 1.0, 2.0)):
        x, weight, bias = operands(dtype, "cuda", 4096, scale)
        assert cublas.takes(x, weight, bias, act)
        want = ACTIVATIONS[act](F.linear(x.double(), weight.double(), bias.double()))
        got = error(cublas.linear(x, weight, bias, act), want)
        steps = error(ACTIVATIONS[act](F.linear(x, weight, bias)), want)
        assert got[0] <= 1.01 * steps[0] and got[1] <= 1.01 * steps[1] + 5e-4, (act, scale, got, steps)
