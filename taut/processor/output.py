"""`BatchFeature`: what a processor returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taut.errors import MediaError, nearest
from taut.placement import pick_device


class BatchFeature(dict):
    """A model's inputs by name (`pixel_values`, `input_values`, `input_features`, `attention_mask` ...), each
    a list with an array for each item, or one tensor or array `[items, ...]`. `features.pixel_values` is
    `features["pixel_values"]`."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(
            f"there is no {name!r}; there is {', '.join(self) or 'nothing'}{nearest(name, self)}"
        )

    def to(self, *where: Any, device: Any = None, dtype: torch.dtype | None = None) -> BatchFeature:
        """Moves the tensors to a device, and those of floating point to a dtype, in place; returns itself.
        `to("cuda")`, `to(torch.float16)`, `to("cuda", torch.float16)` and by keyword. `RequestError` for a
        device that is not there."""
        for one in where:
            if isinstance(one, torch.dtype):
                dtype = one
            else:
                device = one
        device = None if device is None else pick_device(device)
        for name, value in self.items():
            if isinstance(value, Tensor):
                self[name] = value.to(device=device, dtype=dtype if value.is_floating_point() else None)
        return self

    @staticmethod
    def of(data: Mapping[str, list[np.ndarray]], tensors: str | None) -> BatchFeature:
        """From an array for each item; `tensors` is "pt", "np" or None (lists stay). `MediaError` where
        arrays of several shapes can't make a tensor."""
        if tensors not in (None, "pt", "np"):
            raise MediaError(f"return_tensors is {tensors!r}; known: pt, np")
        if tensors is None:
            return BatchFeature(data)
        stacked = {}
        for name, rows in data.items():
            if len({row.shape for row in rows}) > 1:
                shapes = sorted({str(list(row.shape)) for row in rows})
                raise MediaError(
                    f"the items of {name} have different shapes ({', '.join(shapes[:4])}), so they make no "
                    "tensor; pass padding=True for sounds, one size for images, or leave return_tensors out"
                )
            whole = np.stack(rows) if rows else np.zeros((0,), np.float32)
            stacked[name] = torch.from_numpy(whole) if tensors == "pt" else whole
        return BatchFeature(stacked)
