"""Cohere's Command R: parallel attention and MLP under one LayerNorm, interleaved rotation, scaled logits."""

from __future__ import annotations

from dataclasses import replace

from taut.config import ModelConfig, Norm, Reader, finish
from taut.models.llama import pre_norm_layers, rotary, tied

ARCHITECTURE = "CohereForCausalLM"

RULES = ()


def read(r: Reader) -> ModelConfig:
    bias = r.bool("attention_bias", False)
    norm = Norm(r.float("layer_norm_eps", 1e-5), kind="layer")
    layers = pre_norm_layers(
        r,
        attn={
            "qkv_bias": bias,
            "out_bias": bias,
            "rope": replace(rotary(r, theta=500000.0), interleaved=True),
            "qk_norm": norm if r.bool("use_qk_norm", False) else None,
            "qk_norm_of": "own head",
        },
        pre=norm,
    )
    return finish(
        r,
        layers=[replace(layer, pre_mlp=None, parallel=True) for layer in layers],
        norm=norm,
        tied=tied(r, default=True),
        logit_scale=r.float("logit_scale", 0.0625),
    )
