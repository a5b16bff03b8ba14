"""Rotation, its gradient, angles and the cache write beside the references; compiled for sm_80 and sm_90."""

from __future__ import annotations

from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from taut.errors import RequestError
from taut.kernels import rope, rope_triton
from tests.kernels.compile import Spec, cross_compile

BOUNDS = {torch.float32: 1e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


def distance(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-9)).item()


def angles(tokens: int, dim: int, device: str):
    positions = torch.arange(tokens, device=device, dtype=torch.int32) * 977
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, device=device).float() / dim)
    turns = (positions.float()[:, None] * frequencies).double()
    cos, sin = (torch.cat((f * 1.25, s * f * 1.25), -1) for f, s in ((turns.cos(), 1), (turns.sin(), -1)))
    return positions, frequencies, cos[:, None], -sin[:, None]


def agree_rotation(tokens, heads, head_dim, dim, dtype, device, interleaved=False) -> None:
    positions, frequencies, cos, sin = angles(tokens, dim, device)
    got = rope_triton.angles(positions, frequencies, 1.25, torch.float32)
    for g, want in zip(got, (cos, sin), strict=True):
        assert g.shape == want.shape and (not tokens or (g.double() - want).abs().max() < 1e-6)
    x, seed = torch.randn(2, tokens, heads + 1, head_dim, device=device, dtype=dtype)
    results = []
    for module, wide in ((rope_triton, dtype), (rope, torch.float64)):
        leaf = x[:, 1:].to(wide).requires_grad_()
        c, s = (t.to(dtype).to(wide) for t in (cos, sin))
        out = module.rotate(leaf, c, s, interleaved)
        results.append((out, *torch.autograd.grad(out, leaf, seed[:, 1:].to(wide))))
    for g, want in zip(*results, strict=True):
        assert not g.numel() or distance(g, want) < BOUNDS[dtype]


def agree_store(
    tokens, heads, kv_heads, head_dim, dim, normed, offset, dtype, device, interleaved=False
) -> None:
    _, _, cos, sin = angles(tokens, dim or 2, device)
    cos, sin = (None, None) if dim == 0 else (cos.to(dtype), sin.to(dtype))
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device=device, dtype=dtype)
    weights = torch.randn(2, head_dim, device=device, dtype=dtype) if normed else (None, None)
    slots = torch.randperm(5 * 16, device=device)[:tokens]
    slots[tokens // 2 : tokens // 2 + 1] = -1
    results = []
    for module, wide in ((rope_triton, dtype), (rope, torch.float64)):
        cache = [torch.zeros(5, 16, kv_heads, head_dim, device=device, dtype=wide) for _ in range(2)]
        c, s, *w = (None if t is None else t.to(wide) for t in (cos, sin, *weights))
        call = (qkv.to(wide), heads, kv_heads, c, s, *cache, slots, *w, 1e-6, offset, interleaved)
        q, qk = module.rotate_and_store(*call), module.rotate_and_store(*call, keep_keys=True)
        results.append((q, qk, *cache))
    for g, want in zip(*results, strict=True):
        assert g.shape == want.shape and distance(g, want) < BOUNDS[dtype]


def test_rotation_agrees_with_float64() -> None:
    for tokens, heads, head_dim, dim in ((5, 3, 16, 16), (3, 7, 24, 20), (2, 1, 40, 16), (0, 2, 16, 16)):
        for interleaved in (False, True):
            agree_rotation(tokens, heads, head_dim, dim, torch.float32, "cpu", interleaved)


def test_store_agrees_with_float64() -> None:
    for (heads, kv_heads, head_dim, dim), normed, offset in product(
        ((4, 2, 16, 16), (5, 1, 24, 12), (2, 2, 20, 0)), (False, True), (0.0, 1.0)
    ):
        for interleaved in (False, True):
            agree_store(3, heads, kv_heads, head_dim, dim, normed, offset, torch.float32, "cpu", interleaved)


def test_angles_of_each_token() -> None:
    frequencies = torch.rand(3, 4)
    cos, sin = rope_triton.angles(torch.tensor([1, 5, 9]), frequencies, 1.0, torch.float32)
    turns = torch.tensor([1.0, 5, 9])[:, None] * frequencies
    torch.testing.assert_close(cos[:, 0], turns.cos().repeat(1, 2))
    torch.testing.assert_close(sin[:, 0], torch.cat((-turns.sin(), turns.sin()), -1))


def test_errors() -> None:
    cos = torch.ones(2, 1, 12)
    with pytest.raises(RequestError, match="even dim of at most 8"):
        rope_triton.rotate(torch.randn(2, 3, 8), cos, cos)
    cache = torch.zeros(1, 16, 1, 8)
    with pytest.raises(RequestError, match=r"qkv has shape \[2, 20\]; expected \[tokens, 32\]"):
        qkv, slots = torch.randn(2, 20), torch.zeros(2).long()
        rope_triton.rotate_and_store(qkv, 2, 1, None, None, cache, cache, slots)


def test_compiles() -> None:
    pointers = ["x", "cos", "sin", "out", "qkv", "q_weight", "k_weight", "q_out", "keys", "values"]
    common = dict.fromkeys(pointers, "*bf16:16")
    common |= dict.fromkeys(("head_dim", "dim", "x_token", "x_head", "qkv_token"), "i32:16")
    common |= {
        "slots": "*i64",
        "heads": "i32",
        "kv_heads": "i32",
        "kept": "i32",
        "eps": "fp32",
        "offset": "fp32",
    }
    common |= {"HEADS": 8, "HALF": 64, "REST": 32, "SIGN": -1}
    common |= dict.fromkeys(("PAIRS", "ROTATE", "NORM", "SHIFT"), True)
    turns = {"positions": "*i32", "frequencies": "*fp32", "half": "i32", "frequency_row": "i32"}
    turns |= {"magnitude": "fp32"}
    specs = [
        Spec("taut.kernels.rope_triton", kernel, arch, common | turns | {"PDL": arch >= 90})
        for kernel, arch in product(("_rotate", "_store", "_angles"), (80, 90))
    ]
    assert all(built.local == 0 for built in cross_compile(specs))


@pytest.mark.gpu
def test_sweep_on_a_device() -> None:
    for dtype in BOUNDS:
        for tokens, heads, head_dim, dim in ((1, 64, 128, 128), (777, 72, 64, 64), (33, 5, 256, 64)):
            for interleaved in (False, True):
                agree_rotation(tokens, heads, head_dim, dim, dtype, "cuda", interleaved)
        for heads, kv_heads, head_dim, dim in ((32, 32, 128, 128), (71, 1, 64, 64), (16, 8, 256, 64)):
            for normed, interleaved in product((False, True), (False, True)):
                agree_store(41, heads, kv_heads, head_dim, dim, normed, 0.0, dtype, "cuda", interleaved)
