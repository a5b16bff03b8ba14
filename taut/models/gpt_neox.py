"""GPT-NeoX and Pythia: attention and a plain MLP in parallel under a LayerNorm each, a quarter of each head
turned."""

from __future__ import annotations

from dataclasses import replace

from taut.config import ModelConfig, Norm, Reader, activation, finish
from taut.models.llama import pre_norm_layers, rotary, tied
from taut.weights import Fused, Rename, Rule, renames

ARCHITECTURE = "GPTNeoXForCausalLM"

IGNORED = ("*.attention.bias", "embed_out.weight")  # a mask, and a head that is tied anyway


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    return (*modules(config), Rename("embed_out", "lm_head"))


def modules(config: ModelConfig) -> tuple[Rule, ...]:
    """q, k and v lie head by head."""
    layer = "gpt_neox.layers.{}"
    return (
        Rename("gpt_neox.embed_in", "model.embed_tokens"),
        Rename("gpt_neox.final_layer_norm", "model.norm"),
        Rename(layer, "model.layers.{}"),
        *renames(
            layer,
            {
                "post_attention_layernorm": "pre_feedforward_layernorm",
                "attention": "self_attn",
                "attention.dense": "attention.o_proj",
                "mlp.dense_h_to_4h": "mlp.up_proj",
                "mlp.dense_4h_to_h": "mlp.down_proj",
            },
        ),
        Fused(
            f"{layer}.attention.query_key_value", ("q_proj", "k_proj", "v_proj"), config.layers[0].attn.heads
        ),
    )


def read(r: Reader) -> ModelConfig:
    r.rename(partial_rotary_factor="rotary_pct", rope_theta="rotary_emb_base")
    norm = Norm(r.float("layer_norm_eps", 1e-5), kind="layer", bias=True)
    bias = r.bool("attention_bias", True)
    layers = pre_norm_layers(
        r,
        attn={"qkv_bias": bias, "out_bias": bias, "rope": rotary(r, partial=0.25)},
        mlp={"bias": True, "gated": False},
        act=activation(r, "hidden_act", default="gelu"),
        pre=norm,
    )
    parallel = r.bool("use_parallel_residual", True)
    return finish(
        r,
        layers=[replace(layer, parallel=parallel) for layer in layers],
        norm=norm,
        tied=tied(r),
        padding=None,
    )
