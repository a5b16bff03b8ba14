"""GLM-4: Llama with norms on both sides, gate and up fused, and half of each head turned, interleaved."""

from __future__ import annotations

from dataclasses import replace

from taut.config import ModelConfig, Reader, finish
from taut.models.llama import norm, pre_norm_layers, rotary, tied
from taut.weights import Fused, Rename

ARCHITECTURE = "Glm4ForCausalLM"

RULES = (
    # Each new name is free by the time it is taken.
    Rename("model.layers.{}.post_self_attn_layernorm", "model.layers.{}.post_attention_layernorm"),
    Rename("model.layers.{}.post_attention_layernorm", "model.layers.{}.pre_feedforward_layernorm"),
    Rename("model.layers.{}.post_mlp_layernorm", "model.layers.{}.post_feedforward_layernorm"),
    Fused("model.layers.{}.mlp.gate_up_proj", ("gate_proj", "up_proj")),
)


def read(r: Reader) -> ModelConfig:
    own = norm(r, default=1.5625e-7)
    rope = replace(rotary(r, partial=0.5), interleaved=True)
    layers = pre_norm_layers(r, attn={"qkv_bias": r.bool("attention_bias", True), "rope": rope}, pre=own)
    return finish(
        r,
        layers=[replace(layer, post_attn=own, post_mlp=own) for layer in layers],
        norm=own,
        tied=tied(r),
    )
