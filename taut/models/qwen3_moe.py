"""Qwen3-MoE: Qwen3 with experts for the MLP of most layers."""

from __future__ import annotations

from taut.config import ModelConfig, Reader, finish
from taut.models.llama import RULES, norm, pre_norm_layers, tied
from taut.models.mixtral import MODULES
from taut.models.qwen2_moe import sparse

ARCHITECTURE = "Qwen3MoeForCausalLM"

__all__ = ["MODULES", "RULES", "read"]


def read(r: Reader) -> ModelConfig:
    bias = r.bool("attention_bias", False)
    window = r.int("sliding_window", None) if r.bool("use_sliding_window", False) else None
    r.ignore("sliding_window", "max_window_layers")
    changes = {"qkv_bias": bias, "out_bias": bias, "qk_norm": norm(r), "window": window}
    layers = sparse(r, pre_norm_layers(r, attn=changes))
    return finish(r, layers=layers, norm=norm(r), tied=tied(r))
