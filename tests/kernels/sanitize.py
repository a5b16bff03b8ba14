"""Runs every GPU kernel once on small, odd shapes, for NVIDIA's checker of memory accesses to watch:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 python tests/kernels/sanitize.py

Without PyTorch's cache each tensor is an allocation of its own, so that a step past its end is found. Whether
the numbers are right is for the other tests.
"""

from __future__ import annotations

import sys

import torch

from taut.kernels.attention import Pages, Scoring
from taut.kernels.dispatch import ops
from taut.kernels.flash import flash_attention
from taut.kernels.gemv import gemv
from taut.kernels.linear_ce import linear_cross_entropy
from taut.kernels.lookup import Lookup, fuses
from taut.kernels.lookup_triton import summed_norm
from taut.kernels.padding import places, spread
from taut.kernels.paged_triton import paged_attention
from taut.kernels.sample import Sampling, sample
from taut.quant.blockwise import Blockwise
from taut.quant.int8 import Int8

KIND = torch.bfloat16


def normal(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=KIND, requires_grad=grad)


def bounds(*counts: int) -> torch.Tensor:
    return torch.tensor([0, *counts], device="cuda").cumsum(0).int()


def attention() -> None:
    lengths = (37, 0, 1, 130)
    starts, tokens = bounds(*lengths), sum(lengths)
    slopes, relative = torch.rand(6, device="cuda"), torch.randn(6, 9, device="cuda")
    scorings = [Scoring(0.1), Scoring(0.1, causal=False, window=7), Scoring(0.1, softcap=5.0)]
    scorings += [Scoring(0.1, slopes=slopes), Scoring(0.1, relative=relative)]
    for dim in (24, 64, 128, 256):
        for scoring in scorings:
            q, k, v = (normal(tokens, heads, dim, grad=True) for heads in (6, 2, 2))
            flash_attention(q, k, v, starts, max(lengths), scoring).sum().backward()
    held = torch.tensor([40, 3, 200], dtype=torch.int32, device="cuda")
    table = torch.randperm(3 * 13, device="cuda").view(3, 13).int()
    for dim in (24, 128):
        pages = Pages(normal(39, 16, 2, dim), normal(39, 16, 2, dim), table, held, 200)
        for scoring in scorings:
            paged_attention(normal(3, 6, dim), bounds(1, 1, 1), 1, scoring, pages)
            flash_attention(normal(25, 6, dim), None, None, bounds(9, 1, 15), 15, scoring, pages)


def products() -> None:
    for rows in (1, 3, 17):
        for outputs, inputs in ((70, 48), (258, 592)):
            x, weight = normal(rows, inputs), normal(outputs, inputs)
            with torch.no_grad():
                gemv(x, weight, norm_weight=normal(inputs), eps=1e-5, residual=normal(rows, outputs))
                gemv(x, weight, normal(outputs), act="silu")
    for rows in (1, 9, 33, 70):
        for outputs, inputs in ((70, 192), (386, 1088)):
            x, weight = normal(rows, inputs), normal(outputs, inputs)
            packed = [Blockwise.pack(weight, "nf4", 64, double) for double in (False, True)]
            for matrix in (*packed, Blockwise.pack(weight, "fp4", 32, False), Int8.pack(weight, 2.5)):
                with torch.no_grad():
                    matrix(x, normal(outputs), "gelu", normal(rows, outputs // 2))
                matrix(x.requires_grad_()).sum().backward()


def elementwise() -> None:
    x, weight = normal(13, 100, grad=True), normal(100, grad=True)
    norm = ops("norm", x)
    norm.rms_norm(x, weight, 1e-5).sum().backward()
    norm.layer_norm(x, weight, normal(100), 1e-5).sum().backward()
    ops("act", x).glu(x, "silu").sum().backward()
    frequencies, positions = torch.rand(10, device="cuda"), torch.arange(13, device="cuda").int()
    rope = ops("rope", x)
    cos, sin = rope.angles(positions, frequencies, 1.0, KIND)
    rope.rotate(normal(13, 3, 24, grad=True), cos, sin).sum().backward()
    cache = normal(2, 16, 1, 24), normal(2, 16, 1, 24)
    slots = torch.randperm(32, device="cuda")[:13]
    for keep in (False, True):
        rope.rotate_and_store(normal(13, 5 * 24), 3, 1, cos, sin, *cache, slots, keep_keys=keep)
    labels = torch.randint(0, 77, (13,), device="cuda")
    linear_cross_entropy(x, normal(77, 100, grad=True), labels).backward()
    zeros, ones = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    seeds = torch.arange(3, device="cuda")
    for top_k in (0, 5):
        few = torch.full((3,), top_k, dtype=torch.int32, device="cuda")
        sample(torch.randn(3, 1003, device="cuda"), Sampling(ones, few, 0.9 * ones, zeros, seeds, seeds))


def encoders() -> None:
    mask = torch.rand(5, 37, device="cuda") < 0.6
    found = places(mask)
    spread(normal(len(found.index), 100), found.index, found.token, mask.numel())
    tables = Lookup(normal(11, 100), found.positions % 11), Lookup(normal(40, 100), found.positions, 2)
    weight = normal(100)
    with torch.no_grad():
        assert fuses(tables, weight)
        summed_norm(tables, weight, weight, 1e-5)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("this needs a CUDA device")
    for part in (attention, products, elementwise, encoders):
        part()
        torch.cuda.synchronize()
        print(part.__name__, "ran", flush=True)
