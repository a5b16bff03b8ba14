"""When each token was said: the path through the attention that a decoder pays to the sound.

After Radford et al. 2022 and Sakoe & Chiba 1978 (dynamic time warping).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from taut.batch import Batch, Source
from taut.kernels.attention import attention_weights


@torch.no_grad()
def token_times(
    model: Any,
    states: Tensor,
    prompt: Sequence[int],
    said: Sequence[int],
    heads: Sequence[Sequence[int]],
    *,
    smooth: int,
    heard: int | None = None,
    seconds: float,
) -> list[float]:
    """Seconds since the window began at which each token of `said` was, behind `prompt`, by the attention of
    these `heads` (layer, head) to the encoder's `states` `[tokens, dim]`; the last token, which ends the row,
    is given the time of the one before. `heard`: how many of the states are of sound. `smooth`: the width of
    a median over time. `seconds`: of one state."""
    if len(said) < 2:
        return [0.0] * len(said)
    seen = _attention(model, states, [*prompt, *said[:-1]], heads)  # [heads, tokens, states]
    seen = seen[:, len(prompt) :, :heard].float()
    deviation, mean = torch.std_mean(seen, dim=-2, keepdim=True, correction=0)
    seen = median(torch.nan_to_num((seen - mean) / deviation), smooth).mean(0)
    times = [at * seconds for at in warp(-seen.double().cpu().numpy())]
    return [*times, times[-1]]


def _attention(model: Any, states: Tensor, tokens: Sequence[int], heads: Sequence[Sequence[int]]) -> Tensor:
    """What these heads pay to each state, `[heads, tokens, states]`; of each layer only they are kept."""
    found: dict[tuple[int, int], Tensor] = {}
    starts = torch.tensor([0, len(states)], dtype=torch.int32, device=states.device)
    batch = Batch.of([list(tokens)], states.device)
    batch = Batch(
        batch.ids, batch.positions, batch.starts, batch.longest, source=Source(states, starts, len(states))
    )
    with attention_weights() as weights:

        def keep(layer: int) -> Any:
            def hook(*_: Any) -> None:
                (crossed,) = weights[-1]  # behind the layer's attention to itself
                found.update({(at, head): crossed[head] for at, head in heads if at == layer})
                weights.clear()

            return hook

        hooks = [layer.register_forward_hook(keep(at)) for at, layer in enumerate(model.decoder.layers)]
        try:
            model.decoder(batch)
        finally:
            for hook in hooks:
                hook.remove()
    return torch.stack([found[layer, head] for layer, head in heads])


def median(x: Tensor, width: int) -> Tensor:
    """The median of `width` neighbours along the last dimension, whose ends are reflected."""
    reach = width // 2
    if reach == 0 or x.shape[-1] <= reach:
        return x
    return F.pad(x, (reach, reach), mode="reflect").unfold(-1, width, 1).sort().values[..., reach]


def warp(costs: np.ndarray) -> list[int]:
    """The column at which the cheapest path through `costs` `[rows, columns]` float64 comes to each row: from
    the first corner to the last, by steps down, across or both."""
    rows, columns = costs.shape
    total = np.full((rows + 1, columns + 1), np.inf, np.float32)
    total[0, 0] = 0
    step = np.full((rows + 1, columns + 1), 2, np.int8)  # 0: both, 1: down, 2: across
    step[:, 0], step[0] = 1, 2
    for diagonal in range(2, rows + columns + 1):  # whose entries don't depend on each other
        i = np.arange(max(1, diagonal - columns), min(rows, diagonal - 1) + 1)
        j = diagonal - i
        both, down, across = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
        taken = np.where((both < down) & (both < across), 0, 2)
        taken[(down < both) & (down < across)] = 1
        least = np.choose(taken, (both, down, across))
        total[i, j], step[i, j] = costs[i - 1, j - 1] + least, taken
    first: list[int] = [0] * rows
    i, j = rows, columns
    while i > 0 and j > 0:
        first[i - 1] = int(j) - 1
        taken = step[i, j]
        i, j = i - (taken != 2), j - (taken != 1)
    return first
