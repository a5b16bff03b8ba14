"""OLMo 2: Llama with norms behind attention and MLP alone, and one over all queries and all keys."""

from __future__ import annotations

from dataclasses import replace

from taut.config import ModelConfig, Reader, finish
from taut.models.llama import norm, pre_norm_layers, rotary, tied

ARCHITECTURE = "Olmo2ForCausalLM"

RULES = ()


def read(r: Reader, eps: float = 1e-5, theta: float = 10_000.0) -> ModelConfig:
    bias, own = r.bool("attention_bias", False), norm(r, default=eps)
    attn = {"qkv_bias": bias, "out_bias": bias, "qk_norm": own, "qk_norm_of": "all"}
    layers = pre_norm_layers(r, attn={**attn, "rope": rotary(r, theta=theta)}, pre=own)
    layers = [replace(layer, pre_attn=None, pre_mlp=None, post_attn=own, post_mlp=own) for layer in layers]
    return finish(r, layers=layers, norm=own, tied=tied(r))
