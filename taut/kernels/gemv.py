"""Products of a few rows with what stands around them in a decode step: norm before, gated activation,
residual after."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from taut.errors import RequestError
from taut.kernels.act import ACTIVATIONS, glu
from taut.kernels.dispatch import triton_refuses
from taut.kernels.norm import rms_norm

MAX_ROWS = 32
# Beyond so many rows cuBLAS is as fast.
WINNING_ROWS = 32


def gemv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    act: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`residual + glu(rms_norm(x) W^T + bias)`, each part only where asked for.

    `x` `[rows, inputs]`, `weight` `[outputs, inputs]`, `bias` `[outputs]`; `norm_weight` `[inputs]` with
    `eps` and `offset` as `rms_norm` takes them; with `act`, weight and bias hold the gate half, then the up
    half, and the result has `outputs / 2` columns; `residual` has the result's shape.
    """
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps, offset)
    y = F.linear(x, weight, bias)
    if act is not None:
        y = glu(y, act)
    if residual is not None:
        y = residual + y
    return y if out_dtype is None else y.to(out_dtype)


def refuses(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernel can't take this product, or None."""
    if x.dtype not in (torch.float16, torch.bfloat16) or weight.dtype != x.dtype:
        return f"wants float16 or bfloat16 for both; x is {x.dtype}, the weight {weight.dtype}"
    if x.ndim != 2 or not 0 < x.shape[0] <= MAX_ROWS:
        return f"wants 1 to {MAX_ROWS} rows; x is {list(x.shape)}"
    if not weight.is_contiguous() or weight.shape[1] % 16:
        return f"wants a contiguous weight with inputs divisible by 16; it is {list(weight.shape)}"
    return None


def fuses(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of these is `gemv`'s: inference on a GPU, with as few rows as it wins for."""
    if not x.is_cuda or x.shape[0] > WINNING_ROWS or torch.is_grad_enabled():
        return False
    return triton_refuses(x) is None and refuses(x, weight) is None


def gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    act: str | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """As `gemv_reference`, in one launch, for the products that `refuses` accepts. Sums are float32 and
    rounded once, at the end. No gradients."""
    if (why := refuses(x, weight)) is not None:
        raise RequestError(f"gemv kernel {why}")
    if act is not None and act not in ACTIVATIONS:
        raise RequestError(f"activation {act!r} is unknown; known: {', '.join(ACTIVATIONS)}")
    outputs = weight.shape[0] // 2 if act else weight.shape[0]
    for name, tensor, shape in (
        ("bias", bias, (weight.shape[0],)),
        ("norm_weight", norm_weight, (weight.shape[1],)),
        ("residual", residual, (x.shape[0], outputs)),
        ("x", x, (x.shape[0], weight.shape[1])),
    ):
        if tensor is not None and tensor.shape != shape:
            raise RequestError(f"{name} has shape {list(tensor.shape)}; expected {list(shape)}")
    from taut.kernels import gemv_triton

    return gemv_triton.run(
        x.contiguous(),
        weight,
        bias,
        norm_weight,
        eps,
        offset,
        act,
        None if residual is None else residual.contiguous(),
        out_dtype or x.dtype,
    )
