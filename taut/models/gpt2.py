"""GPT-2: learned positions, LayerNorm, a plain MLP, and matrices stored the other way round."""

from __future__ import annotations

from dataclasses import replace

from taut.config import ModelConfig, Norm, Positions, Reader, activation, finish
from taut.models.llama import pre_norm_layers, tied
from taut.weights import Fused, Rename, Transposed, renames

ARCHITECTURE = "GPT2LMHeadModel"

IGNORED = ("*.attn.bias",)  # a mask

NAMES = (
    Rename("transformer.wte", "model.embed_tokens"),
    Rename("transformer.wpe", "model.embed_positions"),
    Rename("transformer.ln_f", "model.norm"),
    Rename("transformer.h.{}", "model.layers.{}"),
    *renames(
        "transformer.h.{}",
        {
            "ln_1": "input_layernorm",
            "ln_2": "pre_feedforward_layernorm",
            "attn": "self_attn",
            "attn.c_proj": "attn.o_proj",
            "mlp.c_fc": "mlp.up_proj",
            "mlp.c_proj": "mlp.down_proj",
        },
    ),
)
RULES = (
    *NAMES,
    Fused("transformer.h.{}.attn.c_attn", ("q_proj", "k_proj", "v_proj")),
    *(
        Transposed(f"transformer.h.{{}}.{name}.weight")
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ),
)


def read(r: Reader) -> ModelConfig:
    own = {} if r.bool("scale_attn_weights", True) else {"scale": 1.0}
    by_layer = r.bool("scale_attn_by_inverse_layer_idx", False)
    config = decoder(r, own)
    if not by_layer:
        return config
    layers = [
        replace(layer, attn=replace(layer.attn, scale=layer.attn.scale / (index + 1)))
        for index, layer in enumerate(config.layers)
    ]
    return replace(config, layers=tuple(layers))


def decoder(r: Reader, attn: dict[str, object]) -> ModelConfig:
    """The decoder that GPT-2 and GPT-BigCode share; `attn` changes fields of every layer's attention."""
    r.rename(
        hidden_size="n_embd",
        intermediate_size="n_inner",
        num_hidden_layers="n_layer",
        num_attention_heads="n_head",
        max_position_embeddings="n_positions",
    )
    r.ignore("n_ctx", "reorder_and_upcast_attn")  # the latter is about rounding
    norm = Norm(r.float("layer_norm_epsilon", 1e-5), kind="layer", bias=True)
    layers = pre_norm_layers(
        r,
        attn={"rope": None, "qkv_bias": True, "out_bias": True, **attn},
        mlp={"hidden": r.int("intermediate_size", 4 * r.int("hidden_size")), "bias": True, "gated": False},
        act=activation(r, "activation_function", default="gelu_tanh"),
        pre=norm,
    )
    return finish(
        r,
        layers=layers,
        norm=norm,
        tied=tied(r, default=True),
        positions=Positions(r.int("max_position_embeddings")),
        padding=None,
    )
