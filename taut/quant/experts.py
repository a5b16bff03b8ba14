"""`PackedExperts`: the matrices of a layer's experts in a small format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taut.kernels.packed import Codes
from taut.quant.base import Packed, Stack, join


class PackedExperts(nn.Module):
    """Weights `[experts, out_features, in_features]`, those of each expert one or several matrices of a
    checkpoint. Where all of them join they share their buffers, so that a kernel finds an expert by its
    number."""

    def __init__(self, units: Sequence[Packed], experts: int):
        super().__init__()
        self.experts = experts
        whole, each = join(units), len(units) // experts
        if isinstance(whole, Stack):
            whole = Stack([join(units[at : at + each]) for at in range(0, len(units), each)])
            whole.compute = units[0].compute
        self.whole = whole
        self._each = each
        self._views: list[Packed] | None = None

    @property
    def joined(self) -> bool:
        """Whether all matrices share their buffers."""
        return not isinstance(self.whole, Stack)

    def expert(self, index: int) -> Packed:
        """The matrices of one expert, one below the other."""
        if not self.joined:
            return self.whole.parts[index]
        if self._views is None:
            self._views = self.whole.split(self._each)
        return self._views[index]

    def codes(self) -> Codes | None:
        """All matrices as kernels take them, or None for those that have no kernel."""
        return self.whole.kernel_codes()

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The values, `[experts, out_features, in_features]`."""
        return self.whole.dequantize(dtype).unflatten(0, (self.experts, -1))

    def units(self) -> list[Packed]:
        """The matrices as a checkpoint has them, in order."""
        return self.whole.units()

    def _apply(self, fn: Any, recurse: bool = True) -> PackedExperts:
        self._views = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_views": None}
