"""LLM.int8(): the same bytes as bitsandbytes', outliers in 16 bit, products within the method's own error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from taut.errors import CheckpointError
from taut.quant import int8
from taut.quant.base import join
from taut.quant.int8 import Int8

bnb = pytest.importorskip("bitsandbytes.functional")


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_byte_is_the_oracles(dtype):
    for shape in ((1, 1), (3, 5), (130, 512), (65, 33)):
        w = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        values, scale, _ = bnb.int8_vectorwise_quant(w.half())
        packed = Int8.pack(w, 6.0)
        assert torch.equal(packed.values, values) and torch.equal(packed.scale, scale)


def test_chunks_give_the_bytes_of_the_whole(monkeypatch):
    w = torch.randn(37, 50)
    whole = Int8.pack(w, 6.0)
    monkeypatch.setattr(int8, "_CHUNK", 500)
    chunked = Int8.pack(w, 6.0)
    assert torch.equal(chunked.values, whole.values) and torch.equal(chunked.scale, whole.scale)


def test_a_row_of_zeros_stays_zero():
    packed = Int8.pack(torch.zeros(2, 8), 6.0)
    assert not packed.dequantize(torch.float32).any()
    assert not packed(torch.randn(3, 8)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_row_is_the_dequantized_product_and_more_rows_are_within_the_methods_error(dtype):
    torch.manual_seed(0)
    packed, bias = Int8.pack(torch.randn(130, 96), 6.0), torch.randn(130).to(dtype)
    dense = packed.dequantize(torch.float64)
    for rows, bound in ((1, 8e-3 if dtype is torch.bfloat16 else 1e-3), (2, 2e-2), (33, 2e-2)):
        x = torch.randn(rows, 96).to(dtype)
        assert relative(packed(x, bias), F.linear(x.double(), dense, bias.double())) < bound
    assert packed(torch.empty(0, 96, dtype=dtype)).shape == (0, 130)


def test_one_row_of_any_length_reads_nothing_past_its_end():
    for inputs in (16, 90, 180):
        packed = Int8.pack(torch.randn(24, inputs), 6.0)
        beyond = torch.full((inputs + 64,), float("nan"), dtype=torch.bfloat16)
        beyond[:inputs] = x = torch.randn(inputs).bfloat16()
        got = packed(beyond[:inputs].view(1, -1), None)
        assert relative(got, F.linear(x[None].double(), packed.dequantize(torch.float64))) < 8e-3


def test_gradients_go_through_the_dequantized_weight():
    packed, bias = Int8.pack(torch.randn(13, 9), 6.0), torch.randn(13, requires_grad=True)
    x, grad = torch.randn(5, 9, requires_grad=True), torch.randn(5, 13)
    got = torch.autograd.grad(packed(x, bias), (x, bias), grad)
    torch.testing.assert_close(got[0], grad @ packed.dequantize(torch.float32))
    torch.testing.assert_close(got[1], grad.sum(0))


def test_many_rows_agree_with_the_oracle():
    from bitsandbytes import nn as bnb_nn

    torch.manual_seed(0)
    w, x = torch.randn(64, 128), torch.randn(20, 128)
    x[3, 17], x[7, 17], x[2, 90] = 40.0, -25.0, 11.0
    theirs = bnb_nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False, threshold=6.0)
    theirs.weight = bnb_nn.Int8Params(w, requires_grad=False, has_fp16_weights=False)
    theirs = theirs.to("cpu").eval()
    with torch.no_grad():
        assert relative(Int8.pack(w, 6.0)(x), theirs(x)) < 2e-3


def test_planted_outliers_cost_nothing_with_decomposition_and_much_without():
    torch.manual_seed(0)
    w, x = torch.randn(256, 512), torch.randn(40, 512)
    x[:, 100] *= 60
    x[5, 300] = -300.0
    with_it, without = Int8.pack(w, 6.0), Int8.pack(w, 0.0)
    exact = F.linear(x.double(), with_it.dequantize(torch.float64))
    # The error on what the ordinary columns contribute is what a model feels.
    rest = F.linear(x.index_fill(1, torch.tensor([100, 300]), 0).double(), w.double()).norm()
    good, bad = ((packed(x).double() - exact).norm() / rest for packed in (with_it, without))
    assert good < 0.015 and bad > 10 * good


def test_parts_join_and_come_apart():
    units = [Int8.pack(torch.randn(n, 24), 6.0) for n in (5, 7)]
    whole = join(units)
    x = torch.randn(1, 24)
    torch.testing.assert_close(whole(x), torch.cat([unit(x) for unit in units], -1))
    for unit, back in zip(units, whole.units(), strict=True):
        assert torch.equal(unit.values, back.values) and torch.equal(unit.scale, back.scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_format": torch.tensor(2, dtype=torch.uint8)}, "'weight_format' is 2"),
        ({"SCB": torch.ones(4)}, r"'SCB' is torch.float32 \[4\]"),
        ({"SCB": torch.ones(5, dtype=torch.float16)}, "'SCB' is torch.float16"),
    ],
    ids=["format", "count", "dtype"],
)
def test_files_that_do_not_fit_together_are_refused(change, message):
    tensors = Int8.pack(torch.randn(5, 8), 6.0).stored(torch.float32) | change
    with pytest.raises(CheckpointError, match=message):
        int8.read("q", {name: (lambda t=tensor: t) for name, tensor in tensors.items()}, 6.0)
