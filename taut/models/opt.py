"""OPT: learned positions, LayerNorm and a plain MLP; 350M normalises behind each half and has a narrower
embedding."""

from __future__ import annotations

from dataclasses import replace

from taut.config import ModelConfig, Norm, Positions, Reader, activation, finish
from taut.models.llama import pre_norm_layers, tied
from taut.weights import Rename, Rule, renames

ARCHITECTURE = "OPTForCausalLM"


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """A norm has one name wherever it stands."""
    behind = config.layers[0].after_attn is not None
    names = {
        "self_attn_layer_norm": "after_attention_layernorm" if behind else "input_layernorm",
        "final_layer_norm": "after_feedforward_layernorm" if behind else "pre_feedforward_layernorm",
        "self_attn.out_proj": "self_attn.o_proj",
        "fc1": "mlp.up_proj",
        "fc2": "mlp.down_proj",
    }
    return (
        *renames("model.layers.{}", names),
        Rename("model.final_layer_norm", "model.norm"),
        Rename("model.decoder", "model"),
    )


def read(r: Reader) -> ModelConfig:
    r.rename(intermediate_size="ffn_dim")
    r.only("layer_norm_elementwise_affine", True)
    r.ignore("layerdrop", "init_std", "prefix")
    bias, before = r.bool("enable_bias", True), r.bool("do_layer_norm_before", True)
    norm = Norm(1e-5, kind="layer", bias=True)
    layers = pre_norm_layers(
        r,
        attn={"rope": None, "qkv_bias": bias, "out_bias": bias},
        mlp={"bias": bias, "gated": False},
        act=activation(r, "activation_function", default="relu"),
        pre=norm,
    )
    if not before:
        behind = {"pre_attn": None, "pre_mlp": None, "after_attn": norm, "after_mlp": norm}
        layers = [replace(layer, **behind) for layer in layers]
    removed = r.bool("_remove_final_layer_norm", False)
    return finish(
        r,
        layers=layers,
        norm=norm if before and not removed else None,
        tied=tied(r, default=True),
        embed_dim=r.int("word_embed_proj_dim", None),
        positions=Positions(r.int("max_position_embeddings"), offset=2),
    )
