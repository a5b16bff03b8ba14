"""NF4 and FP4: the same bytes as bitsandbytes', products within rounding of the dequantized weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from taut.errors import CheckpointError
from taut.quant import blockwise
from taut.quant.base import join
from taut.quant.blockwise import BLOCKS, CODES, Blockwise

bnb = pytest.importorskip("bitsandbytes.functional")

# Odd sizes, blocks across rows and a shorter last block; the last needs nested blocks.
SHAPES = [(3, 5), (7, 129), (1, 1), (48, 80), (130, 512), (1030, 256)]
both_kinds = pytest.mark.parametrize("kind", CODES)


def weight(shape, dtype=torch.float32, seed=0):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if shape[0] > 40:
        w[3], w[5, :7] = 0, 20.0  # a row of nothing, and scales that differ
    return w.to(dtype)


@both_kinds
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_byte_is_the_oracles(kind, double, dtype):
    for shape in SHAPES:
        for block in BLOCKS:
            w = weight(shape, dtype)
            codes, state = bnb.quantize_4bit(w, blocksize=block, compress_statistics=double, quant_type=kind)
            packed = Blockwise.pack(w, kind, block, double)
            assert torch.equal(packed.codes, codes.view(-1)), (shape, block)
            ours = packed.stored(dtype)
            for name, tensor in state.as_dict(packed=True).items():
                assert torch.equal(ours[f"weight.{name}"], tensor), (shape, block, name)


@both_kinds
def test_chunks_give_the_bytes_of_the_whole(kind, monkeypatch):
    w = weight((130, 512))
    whole = blockwise.quantize(w, kind, 128)
    monkeypatch.setattr(blockwise, "_CHUNK", 4096)
    for chunked, one in zip(blockwise.quantize(w, kind, 128), whole, strict=True):
        assert torch.equal(chunked, one)


@both_kinds
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_dequantized_values_are_the_definition(kind, double):
    for shape in SHAPES:
        for block in (32, 64, 4096):
            w = weight(shape)
            packed = Blockwise.pack(w, kind, block, double)
            nibbles = torch.stack((packed.codes >> 4, packed.codes & 15), 1).view(-1)[: w.numel()]
            _, state = bnb.quantize_4bit(w, blocksize=block, compress_statistics=double, quant_type=kind)
            scales = state.absmax
            if double:
                scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
            scales = scales.repeat_interleave(block)[: w.numel()]
            want = (state.code[nibbles.int()] * scales).view(shape)
            torch.testing.assert_close(packed.dequantize(torch.float32), want, rtol=1e-6, atol=1e-6)


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 17])
def test_products_and_gradients_are_those_of_the_dequantized_weight(kind, dtype, rows):
    packed = Blockwise.pack(weight((130, 96)), kind, 64, False)
    dense, bias = packed.dequantize(torch.float64), torch.randn(130, dtype=dtype, requires_grad=True)
    x = torch.randn(rows, 96, dtype=dtype, requires_grad=True)
    y = packed(x, bias)
    want = F.linear(x.double(), dense, bias.double())
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert y.dtype is dtype and y.shape == (rows, 130)
    torch.testing.assert_close(y.double(), want, rtol=bound, atol=bound * 20)
    grad = torch.randn(rows, 130)
    got = torch.autograd.grad(y, (x, bias), grad.to(dtype))
    expected = torch.autograd.grad(want, (x, bias), grad.to(dtype).double())
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=bound, atol=bound * 20)


@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_joined_matrices_multiply_as_one_and_come_apart_with_the_same_bytes(double):
    # With whole rows of blocks the three join; with 33 inputs no two do.
    for inputs, joined in ((512, 1), (33, 3)):
        units = [Blockwise.pack(weight((n, inputs), seed=n), "nf4", 64, double) for n in (64, 96, 32)]
        before = [unit.stored(torch.float32) for unit in units]
        whole = join(units)
        assert len(getattr(whole, "parts", [whole])) == joined
        x = torch.randn(3, inputs)
        torch.testing.assert_close(whole(x), torch.cat([unit(x) for unit in units], -1))
        for unit, want in zip(whole.units(), before, strict=True):
            got = unit.stored(torch.float32)
            assert got.keys() == want.keys()
            assert all(torch.equal(got[name], want[name]) for name in want)


def test_moving_to_another_dtype_leaves_the_buffers_alone():
    packed = Blockwise.pack(weight((64, 64)), "nf4", 64, True)
    before = {name: b.clone() for name, b in packed.named_buffers()}
    packed.to(torch.bfloat16).to("cpu", torch.float16)
    for name, b in packed.named_buffers():
        assert b.dtype is before[name].dtype and torch.equal(b, before[name])


def _getters(tensors):
    return {name: (lambda t=tensor: t) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocksize": 48}, "'blocksize' 48; known: 32, 64"),
        ({"blocksize": True}, "'blocksize' True"),
        ({"shape": [64]}, "'shape' \\[64\\]"),
        ({"shape": [64, -64]}, "'shape'"),
        ({"quant_type": "fp4"}, "'quant_type' 'fp4'"),
        ({"nested_offset": 0.5}, "half of what double quantization needs"),
        ({"nested_offset": float("nan"), "nested_blocksize": 256}, "'nested_offset' nan"),
    ],
    ids=str,
)
def test_a_corrupt_state_says_what_is_wrong(change, message):
    import json

    good = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [64, 64]}
    raw = torch.tensor(list(json.dumps(good | change).encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=message):
        blockwise.parse_state("q.weight", "nf4", raw)


@pytest.mark.parametrize(
    "raw", [torch.zeros(3), torch.tensor([123, 255], dtype=torch.uint8)], ids=["float", "text"]
)
def test_a_state_that_is_no_json_is_refused(raw):
    with pytest.raises(CheckpointError, match=r"q\.weight: its quant state"):
        blockwise.parse_state("q.weight", "nf4", raw)


@pytest.mark.parametrize("name", ["weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax"])
def test_tensors_that_do_not_fit_the_state_are_refused(name):
    tensors = Blockwise.pack(weight((64, 64)), "nf4", 64, True).stored(torch.float32)
    key = next(key for key in tensors if "quant_state" in key)
    state = blockwise.parse_state("q", "nf4", tensors.pop(key))
    assert blockwise.read("q", _getters(tensors), state).codes.numel() == 2048
    with pytest.raises(CheckpointError, match="q: "):
        blockwise.read("q", _getters(tensors | {name: tensors[name][:-1]}), state)


@pytest.mark.parametrize("name", ["weight.quant_map", "weight.nested_quant_map"])
def test_tables_of_other_values_are_refused(name):
    tensors = Blockwise.pack(weight((64, 64)), "nf4", 64, True).stored(torch.float32)
    state = blockwise.parse_state("q", "nf4", tensors.pop("weight.quant_state.bitsandbytes__nf4"))
    with pytest.raises(CheckpointError, match=f"q: '{name}' is not the"):
        blockwise.read("q", _getters(tensors | {name: tensors[name] * 0.5}), state)
