"""Cross-entropy of the head in chunks beside PyTorch's, with gradients; compiled for sm_80 and sm_90."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from taut.errors import RequestError
from taut.kernels import linear_ce
from taut.kernels.linear_ce import cross_entropy_reference, linear_cross_entropy
from tests.kernels.compile import Spec, cross_compile


def inputs(tokens, dim, vocab, dtype, device, ignored=True):
    generator = torch.Generator(device).manual_seed(tokens + vocab)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_()
        for shape in ((tokens, dim), (vocab, dim), (vocab,))
    )
    labels = torch.randint(vocab, (tokens,), generator=generator, device=device)
    if ignored:
        labels[1::3] = -100
    return hidden, weight, bias, labels


def expected(hidden, weight, bias, labels, softcap, scale=1.0):
    logits = scale * F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels)


def test_agrees_with_pytorch_in_float64() -> None:
    for softcap, chunk, with_bias, scale in product((None, 3.0), (None, 4), (False, True), (1.0, 0.3)):
        hidden, weight, bias, labels = inputs(11, 6, 37, torch.float64, "cpu")
        bias = bias if with_bias else None
        leaves = [t for t in (hidden, weight, bias) if t is not None]
        got = linear_cross_entropy(hidden, weight, labels, bias, scale=scale, softcap=softcap, chunk=chunk)
        want = expected(hidden, weight, bias, labels, softcap, scale)
        torch.testing.assert_close(got, want)
        for g, w in zip(
            torch.autograd.grad(3 * got, leaves), torch.autograd.grad(3 * want, leaves), strict=True
        ):
            torch.testing.assert_close(g, w)


def test_divisor_frozen_parts_and_nothing_to_learn() -> None:
    hidden, weight, _, labels = inputs(7, 6, 20, torch.float32, "cpu")
    total = linear_cross_entropy(hidden, weight, labels, divisor=1)
    fifth = linear_cross_entropy(hidden, weight, labels, divisor=torch.tensor(5))
    torch.testing.assert_close(total / 5, fifth)
    frozen = linear_cross_entropy(hidden, weight.detach(), labels, chunk=3)
    want = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden)
    torch.testing.assert_close(torch.autograd.grad(frozen, hidden), want)
    nothing = linear_cross_entropy(hidden, weight, torch.full((7,), -100))
    assert nothing.isnan() and not torch.autograd.grad(nothing, hidden)[0].any()
    empty = linear_cross_entropy(hidden[:0], weight, labels[:0], divisor=1)
    assert empty == 0 and not torch.autograd.grad(empty, weight)[0].any()


def test_logits_exist_a_chunk_at_a_time(monkeypatch) -> None:
    seen = []

    def spy(logits, *rest):
        seen.append(logits.shape[0])
        return cross_entropy_reference(logits, *rest)

    monkeypatch.setattr(linear_ce, "_cross_entropy", spy)
    hidden, weight, _, labels = inputs(10, 4, 8, torch.float32, "cpu")
    linear_cross_entropy(hidden, weight, labels, chunk=4)
    monkeypatch.setattr(linear_ce, "CHUNK_LOGITS", 24)
    linear_cross_entropy(hidden, weight, labels)
    assert seen == [4, 4, 2, 3, 3, 3, 1]


def test_kernel_agrees_with_reference() -> None:
    from taut.kernels.linear_ce_triton import cross_entropy

    for vocab, softcap, gradient in ((37, None, True), (5000, 4.0, True), (4097, None, False)):
        logits = 4 * torch.randn(5, vocab)
        labels = torch.randint(vocab, (5,))
        labels[2], labels[3] = -100, vocab - 1
        want = cross_entropy_reference(logits.double(), labels, 0.7, softcap, -100, gradient)
        got = cross_entropy(logits.clone(), labels, 0.7, softcap, -100, gradient)
        torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-5)
        if gradient:
            torch.testing.assert_close(got[1].double(), want[1], rtol=1e-4, atol=1e-6)


def test_errors() -> None:
    hidden, weight, _, labels = inputs(3, 4, 5, torch.float32, "cpu")
    with pytest.raises(RequestError, match=r"head \[5, 3\]"):
        linear_cross_entropy(hidden, weight[:, :3], labels)
    with pytest.raises(RequestError, match=r"expected \[3\], one a token"):
        linear_cross_entropy(hidden, weight, labels[:2])
    with pytest.raises(RequestError, match="softcap is -1"):
        linear_cross_entropy(hidden, weight, labels, softcap=-1.0)


def test_compiles() -> None:
    common = {"logits": "*bf16:16", "labels": "*i64:16", "losses": "*fp32:16", "ignore_index": "i32"}
    common |= {
        "vocab": "i32:16",
        "row_stride": "i32:16",
        "scale": "fp32",
        "softcap": "fp32",
        "BLOCK": 4096,
        "GRADIENT": True,
    }
    module, kernel = "taut.kernels.linear_ce_triton", "_cross_entropy"
    specs = [
        Spec(module, kernel, arch, common | {"SOFTCAP": cap}, {"num_warps": 8})
        for arch, cap in product((80, 90), (False, True))
    ]
    assert all(built.local == 0 for built in cross_compile(specs))


@pytest.mark.gpu
def test_sweep_on_a_device() -> None:
    bounds = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
    for dtype, softcap, (tokens, dim, vocab) in product(
        bounds, (None, 30.0), ((300, 256, 32000), (37, 128, 50257), (1, 64, 128256))
    ):
        hidden, weight, bias, labels = inputs(tokens, dim, vocab, dtype, "cuda")
        labels[0] = 5
        with torch.no_grad():
            weight /= dim**0.5
        got = linear_cross_entropy(hidden, weight, labels, bias, softcap=softcap, chunk=128)
        wide = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
        want = expected(*wide, labels, softcap)
        assert abs(got.item() - want.item()) < bounds[dtype] * abs(want.item())
        for g, w in zip(
            torch.autograd.grad(got, (hidden, weight, bias)), torch.autograd.grad(want, wide), strict=True
        ):
            assert (g.double() - w).norm() < bounds[dtype] * w.norm()
