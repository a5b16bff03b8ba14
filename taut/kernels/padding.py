"""Where the tokens of a padded grid stand, and packed rows put back into one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taut.kernels.dispatch import device_refuses, triton_refuses


@dataclass(frozen=True)
class Places:
    """What a mask `[rows, width]` says of its tokens.

    | field | shape | meaning |
    |---|---|---|
    | `index` | `[tokens]` int64 | place of each token in the flat grid, row after row |
    | `token` | `[rows * width]` int32 or None | the reverse: the token at each place, -1 for none; None: \
not computed |
    | `positions` | `[tokens]` int32 | tokens of its row that stand before it |
    | `starts` | `[rows + 1]` int32 | cumulative row boundaries |
    | `longest` | int | tokens of the longest row, on the host |
    """

    index: Tensor
    token: Tensor | None
    positions: Tensor
    starts: Tensor
    longest: int


def places(mask: Tensor) -> Places:
    """Where the tokens of `mask` `[rows, width]` are, which are those that are not 0. Waits for the device
    once: the number of tokens is a shape."""
    if mask.is_cuda and mask.numel() and device_refuses(mask.device) is None:
        from taut.kernels import padding_triton

        return padding_triton.places(mask)
    return reference_places(mask)


def reference_places(mask: Tensor) -> Places:
    real = mask != 0
    counts = real.sum(1)
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32, device=mask.device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1:])
    index = real.flatten().nonzero().squeeze(1)
    positions = (real.cumsum(1, dtype=torch.int32) - 1).flatten().index_select(0, index)
    return Places(index, None, positions, starts, int(counts.max()) if len(counts) else 0)


def spread(packed: Tensor, index: Tensor, token: Tensor | None, count: int) -> Tensor:
    """`packed` `[tokens, ...]` at the places `index` of `[count, ...]`, zeros elsewhere. `token`, as `Places`
    has it, lets a GPU do it in one pass."""
    if (
        token is not None
        and packed.ndim == 2
        and triton_refuses(packed) is None
        and not (torch.is_grad_enabled() and packed.requires_grad)
    ):
        from taut.kernels import padding_triton

        return padding_triton.spread(packed, token)
    return packed.new_zeros(count, *packed.shape[1:]).index_copy_(0, index, packed)
