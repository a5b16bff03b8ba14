"""OLMoE: Llama with experts for its MLP, and a norm over all queries and one over all keys."""

from __future__ import annotations

from dataclasses import replace

from taut.config import ModelConfig, Reader, finish
from taut.models.llama import RULES, norm, pre_norm_layers, tied
from taut.models.mixtral import MODULES, experts

ARCHITECTURE = "OlmoeForCausalLM"

__all__ = ["MODULES", "RULES", "read"]


def read(r: Reader) -> ModelConfig:
    r.only("clip_qkv")
    bias, own = r.bool("attention_bias", False), norm(r, default=1e-5)
    attn = {"qkv_bias": bias, "out_bias": bias, "qk_norm": own, "qk_norm_of": "all"}
    moe = experts(r, "intermediate_size", normalised=r.bool("norm_topk_prob", False))
    layers = [replace(layer, mlp=moe) for layer in pre_norm_layers(r, attn=attn, pre=own)]
    return finish(r, layers=layers, norm=own, tied=tied(r))
