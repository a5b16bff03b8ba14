"""GGUF's 4- and 8-bit blocks kept packed: the values a read gives, in every layout and product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from taut.errors import CheckpointError
from taut.quant.affine import FORMATS, Affine
from taut.quant.base import join

gguf = pytest.importorskip("gguf")


def blocks(kind, w):
    kind = getattr(gguf.GGMLQuantizationType, kind)
    raw = torch.from_numpy(np.ascontiguousarray(gguf.quants.quantize(w.numpy(), kind)))
    values = torch.from_numpy(gguf.quants.dequantize(raw.numpy(), kind))
    return raw.view(w.shape[0], w.shape[1] // 32, -1), values


@pytest.mark.parametrize("kind", FORMATS)
def test_values_are_those_of_the_file_before_during_and_after_preparing(kind):
    for out, inputs in ((16, 32), (7, 64), (80, 96), (144, 160)):
        raw, want = blocks(kind, torch.randn(out, inputs))
        packed = Affine.from_blocks("w", kind, raw)
        rows = torch.tensor([out - 1, 0, 2])
        assert torch.equal(packed.dequantize(torch.float32), want)
        assert torch.equal(packed.dequantize_rows(torch.float32, None), want)
        assert torch.equal(packed.dequantize_rows(torch.float32, rows), want[rows])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_products_are_those_of_the_values(kind, dtype, rows):
    raw, want = blocks(kind, torch.randn(80, 96))
    packed, bias = Affine.from_blocks("w", kind, raw), torch.randn(80).to(dtype)
    x = torch.randn(rows, 96).to(dtype)
    expected = F.linear(x.double(), want.double(), bias.double())
    bound = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for context in (torch.inference_mode, torch.enable_grad):
        with context():
            assert (packed(x, bias).double() - expected).norm() < bound * expected.norm()


def test_gradients_flow():
    raw, want = blocks("Q4_1", torch.randn(80, 96))
    packed = Affine.from_blocks("w", "Q4_1", raw)
    x = torch.randn(2, 96, requires_grad=True)
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, want.sum(0).expand(2, -1))


def test_formats_join_only_with_their_own():
    made = {kind: Affine.from_blocks("w", kind, blocks(kind, torch.randn(16, 64))[0]) for kind in FORMATS}
    whole = join([made["Q4_0"], made["Q4_1"], made["Q8_0"]])
    x = torch.randn(2, 64)
    torch.testing.assert_close(whole(x), torch.cat([made[kind](x) for kind in FORMATS], -1))
    assert len(whole.parts) == 2
    assert [unit.out_features for unit in whole.units()] == [16, 16, 16]


def test_an_unknown_format_is_refused():
    with pytest.raises(CheckpointError, match="Q6_K can't be kept packed; known: Q4_0, Q4_1, Q8_0"):
        Affine.from_blocks("w", "Q6_K", torch.zeros(2, 2, 20, dtype=torch.uint8))
