"""GPT-J: parallel attention and plain MLP under one LayerNorm, interleaved rotation, a head with a bias."""

from __future__ import annotations

from dataclasses import replace

from taut.config import ModelConfig, Norm, Reader, Rope, activation, finish
from taut.errors import ConfigError
from taut.models.llama import heads, pre_norm_layers
from taut.weights import Rename, renames

ARCHITECTURE = "GPTJForCausalLM"

IGNORED = ("*.attn.bias", "*.attn.causal_mask")  # masks

RULES = (
    Rename("transformer.wte", "model.embed_tokens"),
    Rename("transformer.ln_f", "model.norm"),
    Rename("transformer.h.{}", "model.layers.{}"),
    *renames(
        "transformer.h.{}",
        {
            "ln_1": "input_layernorm",
            "attn": "self_attn",
            "attn.out_proj": "attn.o_proj",
            "mlp.fc_in": "mlp.up_proj",
            "mlp.fc_out": "mlp.down_proj",
        },
    ),
)


def read(r: Reader) -> ModelConfig:
    r.rename(
        hidden_size="n_embd",
        intermediate_size="n_inner",
        num_hidden_layers="n_layer",
        num_attention_heads="n_head",
        max_position_embeddings="n_positions",
    )
    r.only("rotary", True)
    r.only("scale_attn_weights", True)
    r.only("tie_word_embeddings", False)
    r.ignore("n_ctx")
    turned, head_dim = r.int("rotary_dim", 64), heads(r)["head_dim"]
    if turned > head_dim or turned % 2:
        raise ConfigError(
            f"{r.source}: 'rotary_dim' is {turned}; expected an even number of at most {head_dim}, the size "
            "of a head"
        )
    norm = Norm(r.float("layer_norm_epsilon", 1e-5), kind="layer", bias=True)
    layers = pre_norm_layers(
        r,
        attn={"rope": Rope(turned, 10000.0, interleaved=True)},
        mlp={"hidden": r.int("intermediate_size", 4 * r.int("hidden_size")), "bias": True, "gated": False},
        act=activation(r, "activation_function", default="gelu_tanh"),
        pre=norm,
    )
    return finish(
        r,
        layers=[replace(layer, pre_mlp=None, parallel=True) for layer in layers],
        norm=norm,
        tied=False,
        head_bias=True,
        padding=None,
    )
