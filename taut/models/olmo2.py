"""OLMo 2: Llama with norms behind attention and MLP alone, and one over all queries and all keys."""

from __future__ import annotations

from dataclasses import replace

from taut.config import ModelConfig, Reader, finish
from taut.models.llama import norm, pre_norm_layers, tied

ARCHITECTURE = "Olmo2ForCausalLM"

RULES = ()


def read(r: Reader) -> ModelConfig:
    bias, own = r.bool("attention_bias", False), norm(r, default=1e-5)
    layers = pre_norm_layers(
        r, attn={"qkv_bias": bias, "out_bias": bias, "qk_norm": own, "qk_norm_of": "all"}, pre=own
    )
    layers = [replace(layer, pre_attn=None, pre_mlp=None, post_attn=own, post_mlp=own) for layer in layers]
    return finish(r, layers=layers, norm=own, tied=tied(r))
