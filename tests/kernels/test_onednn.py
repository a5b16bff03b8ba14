"""Products on a CPU with what follows them: those of PyTorch, one after the other."""

from __future__ import annotations

import pytest
import torch

from taut.kernels import onednn
from taut.kernels.act import ACTIVATIONS

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if onednn.computes(dtype)]


def operands(dtype: torch.dtype, rows: int = 7) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    shapes = (rows, 40), (24, 40), (24,), (rows, 24)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pointwise", onednn.POINTWISE, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_products_equal_their_steps(dtype, pointwise, biased):
    x, weight, bias, residual = operands(dtype)
    bias = bias if biased else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert onednn.takes(x, weight, pointwise)
    bound = 1e-5 if dtype is torch.float32 else 1e-2
    act = ACTIVATIONS.get(pointwise, lambda y: y)
    assert torch.allclose(onednn.linear(x, weight, bias, pointwise).double(), act(exact), bound, bound * 8)
    if pointwise is None:
        for strided in (residual, residual.T.contiguous().T):
            kept = strided.clone()
            got = onednn.linear(x, weight, bias, residual=strided)
            assert torch.allclose(got.double(), exact + residual.double(), bound, bound * 8)
            assert torch.equal(strided, kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_in_its_own_order_give_the_same_and_are_kept_for_the_block_alone(dtype, monkeypatch):
    made, reorder = [], torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(
        torch.ops.mkldnn, "_reorder_linear_weight", lambda *given: made.append(given) or reorder(*given)
    )
    x, weight, bias, residual = operands(dtype, 40)
    other = weight.flip(0)
    bound = 1e-6 if dtype is torch.float32 else 1e-2
    for turn in (1, 2):
        with onednn.reordering():
            for w in (weight, other, weight):
                for rows in (40, 3):  # the order is made for the first
                    given = (x[:rows], w, bias, None, residual[:rows])
                    want = bias.double() + x[:rows].double() @ w.double().T + residual[:rows].double()
                    assert torch.allclose(onednn.linear(*given).double(), want, bound * 10, bound * 10)
        assert len(made) == 2 * turn
    onednn.linear(x, weight.clone(), bias)
    assert len(made) == 4


def test_it_leaves_to_others_what_it_does_not_do():
    x, weight, *_ = operands(torch.float32)
    assert not onednn.takes(x[:1], weight)  # a single row is read faster by others
    assert not onednn.takes(x.T.contiguous().T, weight) and not onednn.takes(x, weight.T.contiguous().T)
    assert not onednn.takes(x.double(), weight.double()) and not onednn.takes(x, weight, "gelu_quick")
    trained = weight.clone().requires_grad_()
    assert not onednn.takes(x, trained)
    with torch.no_grad():
        assert onednn.takes(x, trained)
