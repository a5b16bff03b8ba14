"""Qwen3: Llama with a norm on each query and key head."""

from __future__ import annotations

from taut.config import ModelConfig, Reader, finish
from taut.models.llama import RULES, norm, pre_norm_layers, tied
from taut.models.qwen2 import upper_windows

ARCHITECTURE = "Qwen3ForCausalLM"

__all__ = ["RULES", "read"]


def read(r: Reader) -> ModelConfig:
    bias = r.bool("attention_bias", False)
    changes = {"qkv_bias": bias, "out_bias": bias, "qk_norm": norm(r)}
    layers = pre_norm_layers(r, attn=changes, windows=upper_windows(r))
    return finish(r, layers=layers, norm=norm(r), tied=tied(r))
