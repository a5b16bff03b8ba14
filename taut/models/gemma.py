"""Gemma: Llama with a scaled embedding, norms stored less one, and a GELU-gated MLP."""

from __future__ import annotations

from taut.config import ModelConfig, Reader, activation, finish
from taut.models.llama import RULES, norm, pre_norm_layers, tied

ARCHITECTURE = "GemmaForCausalLM"

__all__ = ["RULES", "read"]


def read(r: Reader) -> ModelConfig:
    r.only("use_bidirectional_attention", False)
    bias = r.bool("attention_bias", False)
    # The first files said "gelu" and meant its tanh form, which transformers has used for them ever since.
    act = activation(r, "hidden_activation", "hidden_act", default="gelu_tanh")
    if not r.has("hidden_activation") and act == "gelu":
        act = "gelu_tanh"
    own = norm(r, offset=1.0)
    layers = pre_norm_layers(r, attn={"qkv_bias": bias, "out_bias": bias}, act=act, pre=own)
    return finish(
        r,
        layers=layers,
        norm=own,
        tied=tied(r, default=True),
        embed_scale=r.int("hidden_size") ** 0.5,
    )
