"""What enters an encoder: the sum of rows of several tables, one of each a token, under a LayerNorm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from taut.kernels.dispatch import triton_refuses
from taut.kernels.norm import layer_norm

MOST_TABLES = 3


@dataclass(frozen=True)
class Lookup:
    """Row `index + offset` of `table` `[count, dim]` for each token; `index` `[tokens]` integers, None: 0."""

    table: Tensor
    index: Tensor | None
    offset: int = 0


def fuses(lookups: Sequence[Lookup], weight: Tensor, bias: Tensor | None) -> bool:
    """Whether one kernel may do it: on a GPU, for inference, from the tables of a text encoder."""
    tensors = [weight, *(lookup.table for lookup in lookups), *(() if bias is None else (bias,))]
    return (
        triton_refuses(weight) is None
        and 0 < len(lookups) <= MOST_TABLES
        and lookups[0].index is not None
        and all(one.index is None or one.index.device == weight.device for one in lookups)
        and all(t.is_contiguous() and t.dtype is weight.dtype for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def summed_norm(lookups: Sequence[Lookup], weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """The norm of the sum, `[tokens, dim]`; the first lookup has an index."""
    rows = [
        one.table[one.offset] if one.index is None else F.embedding(one.index + one.offset, one.table)
        for one in lookups
    ]
    return layer_norm(sum(rows[1:], rows[0]), weight, bias, eps)
