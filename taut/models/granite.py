"""Granite: Llama with multipliers on embedding, attention scores, residuals and logits."""

from __future__ import annotations

from dataclasses import replace

from taut.config import ModelConfig, Reader, finish
from taut.models.llama import RULES, norm, pre_norm_layers, tied

ARCHITECTURE = "GraniteForCausalLM"

__all__ = ["RULES", "read"]


def read(r: Reader) -> ModelConfig:
    bias = r.bool("attention_bias", False)
    scale = r.float("attention_multiplier", 1.0)
    layers = pre_norm_layers(
        r,
        attn={"qkv_bias": bias, "out_bias": bias, "scale": scale},
        mlp={"bias": r.bool("mlp_bias", False)},
    )
    residual = r.float("residual_multiplier", 1.0)
    return finish(
        r,
        layers=[replace(layer, scale=residual) for layer in layers],
        norm=norm(r),
        tied=tied(r),
        input_scale=r.float("embedding_multiplier", 1.0),
        logit_scale=1.0 / r.float("logits_scaling", 1.0),
    )
