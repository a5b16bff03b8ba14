"""Phi 1 to 2: attention and a plain MLP in parallel under one LayerNorm, half of each head turned, biases
everywhere, the head included."""

from __future__ import annotations

from dataclasses import replace

from taut.config import ModelConfig, Norm, Reader, activation, finish
from taut.models.llama import pre_norm_layers, rotary
from taut.weights import Rename, renames

ARCHITECTURE = "PhiForCausalLM"

RULES = (
    *renames(
        "model.layers.{}",
        {
            "self_attn.dense": "self_attn.o_proj",
            "self_attn.q_layernorm": "self_attn.q_norm",
            "self_attn.k_layernorm": "self_attn.k_norm",
            "mlp.fc1": "mlp.up_proj",
            "mlp.fc2": "mlp.down_proj",
        },
    ),
    Rename("model.final_layernorm", "model.norm"),
)


def read(r: Reader) -> ModelConfig:
    norm = Norm(r.float("layer_norm_eps", 1e-5), kind="layer", bias=True)
    layers = pre_norm_layers(
        r,
        attn={
            "qkv_bias": True,
            "out_bias": True,
            "rope": rotary(r, partial=0.5),
            "qk_norm": norm if r.bool("qk_layernorm", False) else None,
        },
        mlp={"bias": True, "gated": False},
        act=activation(r, "hidden_act", default="gelu_tanh"),
        pre=norm,
    )
    r.only("tie_word_embeddings", False)
    return finish(
        r,
        layers=[replace(layer, pre_mlp=None, parallel=True) for layer in layers],
        norm=norm,
        tied=False,
        head_bias=True,
    )
