"""Gemma 2: Gemma with norms on both sides, soft-caps, its own scale and a window in every other layer."""

from __future__ import annotations

from dataclasses import replace

from taut.config import ModelConfig, Reader, activation, finish, windows
from taut.models.llama import norm, pre_norm_layers, tied

ARCHITECTURE = "Gemma2ForCausalLM"

RULES = ()


def read(r: Reader) -> ModelConfig:
    r.only("use_bidirectional_attention", False)
    count = r.int("num_hidden_layers")
    bias = r.bool("attention_bias", False)
    own = norm(r, offset=1.0)
    layers = pre_norm_layers(
        r,
        attn={
            "qkv_bias": bias,
            "out_bias": bias,
            "scale": r.float("query_pre_attn_scalar", 256.0) ** -0.5,
            "softcap": r.float("attn_logit_softcapping", None),
        },
        act=activation(r, "hidden_activation", "hidden_act", default="gelu_tanh"),
        pre=own,
        windows=windows(r, count, [("sliding_attention", "full_attention")[i % 2] for i in range(count)]),
    )
    r.ignore("cache_implementation")
    return finish(
        r,
        layers=[replace(layer, post_attn=own, post_mlp=own) for layer in layers],
        norm=own,
        tied=tied(r, default=True),
        embed_scale=r.int("hidden_size") ** 0.5,
        logit_softcap=r.float("final_logit_softcapping", None),
    )
