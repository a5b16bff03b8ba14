"""Activations by name, and the gated product of an MLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
        "relu": F.relu,
        "relu2": lambda x: F.relu(x).square(),
        "tanh": torch.tanh,
    }
)


def glu(gate_up: Tensor, act: str, limit: float | None = None) -> Tensor:
    """`act(gate) * up` for `gate_up` `[tokens, 2 * hidden]`, gate first; gives `[tokens, hidden]`. With a
    `limit`: `act(min(gate, limit)) * (clamp(up, -limit, limit) + 1)`."""
    gate, up = gate_up.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1
    return ACTIVATIONS[act](gate) * up
