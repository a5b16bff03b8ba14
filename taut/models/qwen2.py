"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a window in the upper layers where asked."""

from __future__ import annotations

from taut.config import ModelConfig, Reader, finish, windows
from taut.models.llama import RULES, norm, pre_norm_layers, tied

ARCHITECTURE = "Qwen2ForCausalLM"

__all__ = ["RULES", "read", "upper_windows"]


def upper_windows(r: Reader) -> list[int | None]:
    """A sliding window from layer `max_window_layers` on, if `use_sliding_window`."""
    count = r.int("num_hidden_layers")
    first = r.int("max_window_layers", 28, minimum=0)
    sliding = r.bool("use_sliding_window", False)
    if not sliding:
        r.ignore("sliding_window")
    if not sliding and not r.has("layer_types"):
        return [None] * count
    types = ["sliding_attention" if sliding and i >= first else "full_attention" for i in range(count)]
    return windows(r, count, types)


def read(r: Reader) -> ModelConfig:
    layers = pre_norm_layers(r, attn={"qkv_bias": True}, windows=upper_windows(r))
    return finish(r, layers=layers, norm=norm(r), tied=tied(r))
