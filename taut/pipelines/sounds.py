"""What pipelines of sounds share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from taut.errors import MediaError
from taut.pipelines.base import Pipeline
from taut.processor.read import sounds


class SoundPipeline(Pipeline):
    """A pipeline that hears sounds through a feature extractor. An item is a path, an address, bytes, samples
    at the model's rate (an array or tensor `[samples]` or `[channels, samples]`, channels at most 2), or a
    dict of `raw` (or `array`) and its own `sampling_rate`."""

    window = 32  # sounds are long

    def is_item(self, inputs: Any) -> bool:
        return isinstance(inputs, np.ndarray) or super().is_item(inputs)

    def hear(self, item: Any, timeout: float | None = 30.0) -> np.ndarray:
        """The samples of an item at the model's rate, float32 `[samples]`."""
        if isinstance(item, Mapping):
            name = "raw" if item.get("raw") is not None else "array"
            item = {**item, name: _mono(item[name])} if name in item else item
        return sounds(_mono(item), self.processor.sampling_rate, None, timeout)[0]


def _mono(samples: Any) -> Any:
    """An array of one channel; of two, their mean."""
    if not isinstance(samples, (np.ndarray, Tensor)) or samples.ndim != 2:
        return samples
    if samples.shape[0] > 2:
        raise MediaError(
            f"a sound is [samples] or [channels, samples], with two channels at most, and this array is "
            f"{list(samples.shape)}; transpose it if its channels come last, otherwise mix them yourself"
        )
    return samples.mean(0)
