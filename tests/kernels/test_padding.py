"""Where tokens stand in padded grids, and packed rows put back: Triton's kernels beside the reference."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from taut.kernels import padding, padding_triton
from tests.kernels.compile import Spec, cross_compile


def masks(device: str, rows: int, width: int) -> list[torch.Tensor]:
    """Of several dtypes and strides; rows without tokens among them, and one that is full."""
    generator = torch.Generator().manual_seed(rows)
    share = torch.rand(rows, 1, generator=generator)
    real = (torch.rand(rows, width, generator=generator) < share).to(device)
    real[rows // 2] = False
    strided = real.long().t().contiguous().t()
    return [real, real.long(), real.float() * 0.5, strided, real[:1].expand(rows, width), real.new_ones(3, 4)]


def agree(mask: torch.Tensor) -> None:
    got, want = padding_triton.places(mask), padding.reference_places(mask)
    for name in ("index", "positions", "starts"):
        one, other = getattr(got, name), getattr(want, name)
        assert one.dtype is other.dtype and torch.equal(one, other), name
    assert got.longest == want.longest
    inverse = torch.full((mask.numel(),), -1, dtype=torch.int32, device=mask.device)
    inverse[want.index] = torch.arange(len(want.index), dtype=torch.int32, device=mask.device)
    assert torch.equal(got.token, inverse)
    packed = torch.randn(len(want.index), 21, device=mask.device)
    for rows in (packed, packed.t().contiguous().t(), packed.repeat(1, 2)[:, :21]):
        back = padding_triton.spread(rows, got.token)
        assert torch.equal(back, padding.spread(rows, want.index, None, mask.numel()))


def test_agrees_with_the_reference(monkeypatch):
    monkeypatch.setattr(padding_triton, "_BLOCK", 8)  # several steps over rows and columns
    for mask in masks("cpu", 11, 19):
        agree(mask)


def test_putting_back_has_a_gradient():
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]])
    packed = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    index = padding.places(mask).index
    assert torch.autograd.gradcheck(lambda p: padding.spread(p, index, None, 6), packed)


def test_compiles() -> None:
    small = dict.fromkeys(("counts", "token", "positions", "starts", "totals"), "*i32:16")
    numbers = dict.fromkeys(("rows", "width", "outer"), "i32") | {"inner": 1, "dim": "i32:16"}
    common = small | numbers | {"index": "*i64:16", "packed": "*bf16:16", "out": "*bf16:16", "BLOCK": 1024}
    specs = [
        Spec("taut.kernels.padding_triton", kernel, arch, common | {"mask": f"*{kind}:16"}, {"num_warps": 4})
        for kernel in ("_count", "_place", "_spread")
        for kind, arch in (("i64", 80), ("u8", 90))
    ]
    assert all(built.local == 0 and built.stack == 0 for built in cross_compile(specs))


@pytest.mark.gpu
def test_agrees_on_a_device():
    for rows, width in ((1, 1), (32, 512), (1500, 40), (5, 3000)):
        for mask in masks("cuda", rows, width):
            agree(mask)
            found = padding.places(mask)
            assert found.token is not None and found.longest == int((mask != 0).sum(1).max())
