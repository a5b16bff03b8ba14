"""Products of a few rows with what stands around them in a decode step: norm before, gated activation,
residual after."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from taut.errors import RequestError
from taut.kernels.act import ACTIVATIONS, glu
from taut.kernels.dispatch import compiled_refuses, triton_refuses
from taut.kernels.norm import rms_norm

# Beyond so many rows the library's product (cuBLAS, oneDNN) is as fast.
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
    pointwise: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`residual + glu(rms_norm(x) W^T + bias)`, or with `pointwise`, an activation, in place of `glu`; each
    part only where asked for.

    `x` `[rows, inputs]`, `weight` `[outputs, inputs]`, `bias` `[outputs]`; `norm_weight` `[inputs]` with
    `eps` and `offset` as `rms_norm` takes them; with `act`, weight and bias hold the gate half, then the up
    half, and the result has `outputs / 2` columns; `residual` has the result's shape.
    """
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps, offset)
    y = F.linear(x, weight, bias)
    if act is not None:
        y = glu(y, act)
    if pointwise is not None:
        y = ACTIVATIONS[pointwise](y)
    if residual is not None:
        y = residual + y
    return y if out_dtype is None else y.to(out_dtype)


def refuses(x: Tensor, weight: Tensor) -> str | None:
    """Why no kernel can take this product, or None."""
    if x.device.type == "cpu":
        return _cpu_refuses(x, weight)
    if x.dtype not in (torch.float16, torch.bfloat16) or weight.dtype != x.dtype:
        return f"wants float16 or bfloat16 for both; x is {x.dtype}, the weight {weight.dtype}"
    if x.ndim != 2 or not 0 < x.shape[0] <= WINNING_ROWS:
        return f"wants 1 to {WINNING_ROWS} rows; there are {x.shape[0]}"
    if not weight.is_contiguous() or weight.shape[1] % 16:
        return f"wants a contiguous weight with inputs divisible by 16; it is {list(weight.shape)}"
    return None


def _cpu_refuses(x: Tensor, weight: Tensor) -> str | None:
    if (why := compiled_refuses(x)) is not None:
        return why
    from taut.kernels import gemv_llvm

    if weight.dtype is not x.dtype or weight.device != x.device or not weight.is_contiguous():
        return f"wants a contiguous weight of x's dtype and device; it is {weight.dtype}, {weight.device}"
    return gemv_llvm.refuses(x, gemv_llvm.dense(x.dtype))


def fuses(x: Tensor, weight: Tensor) -> bool:
    """Whether a product of these is `gemv`'s: inference with as few rows as it wins for."""
    if torch.is_grad_enabled() or x.ndim != 2 or x.shape[0] > WINNING_ROWS:
        return False
    return refuses(x, weight) is None and (not x.is_cuda or triton_refuses(x) is None)


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
    pointwise: str | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """As `gemv_reference`, by one kernel, for the products that `refuses` accepts. Sums are float32 and
    rounded once, at the end. No gradients."""
    if (why := refuses(x, weight)) is not None:
        raise RequestError(f"gemv kernel {why}")
    for name in (act, pointwise):
        if name is not None and name not in ACTIVATIONS:
            raise RequestError(f"activation {name!r} is unknown; known: {', '.join(ACTIVATIONS)}")
    outputs = weight.shape[0] // 2 if act else weight.shape[0]
    for name, tensor, shape in (
        ("bias", bias, (weight.shape[0],)),
        ("norm_weight", norm_weight, (weight.shape[1],)),
        ("residual", residual, (x.shape[0], outputs)),
        ("x", x, (x.shape[0], weight.shape[1])),
    ):
        if tensor is not None and tensor.shape != shape:
            raise RequestError(f"{name} has shape {list(tensor.shape)}; expected {list(shape)}")
    around = (bias, norm_weight, eps, offset, act, None if residual is None else residual.contiguous())
    if x.device.type == "cpu":
        from taut.kernels import gemv_llvm

        tensors = (weight,)
        return gemv_llvm.run(
            x.contiguous(), gemv_llvm.dense(x.dtype), tensors, weight.shape[0], *around, pointwise, out_dtype
        )
    from taut.kernels import gemv_triton

    if pointwise is None:
        return gemv_triton.run(x.contiguous(), weight, *around, out_dtype or x.dtype)
    y = ACTIVATIONS[pointwise](gemv_triton.run(x.contiguous(), weight, *around[:-1], None, x.dtype))
    y = y if residual is None else residual + y
    return y if out_dtype is None else y.to(out_dtype)
