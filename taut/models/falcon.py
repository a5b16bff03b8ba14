"""Falcon: 7B (one key head, parallel under one LayerNorm), 40B and 11B (grouped heads, parallel under one or
two) and RW (ALiBi, one half after the other)."""

from __future__ import annotations

from dataclasses import replace

import torch

from taut.config import ModelConfig, Norm, Reader, activation, alibi_slopes, finish, rope
from taut.errors import ConfigError
from taut.models.llama import heads, pre_norm_layers, tied
from taut.weights import Fused, Rename, Rule, renames

ARCHITECTURE = "FalconForCausalLM"


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """q, k and v lie key head by key head; norms are named by how many there are."""
    layer, first = "transformer.h.{}", config.layers[0]
    norms = {"post_attention_layernorm": "pre_feedforward_layernorm"}
    if first.parallel and first.pre_mlp is not None:
        norms = {"ln_attn": "input_layernorm", "ln_mlp": "pre_feedforward_layernorm"}
    return (
        Rename("transformer.word_embeddings", "model.embed_tokens"),
        Rename("transformer.ln_f", "model.norm"),
        Rename(layer, "model.layers.{}"),
        *renames(
            layer,
            {
                **norms,
                "self_attention": "self_attn",
                "self_attention.dense": "self_attention.o_proj",
                "mlp.dense_h_to_4h": "mlp.up_proj",
                "mlp.dense_4h_to_h": "mlp.down_proj",
            },
        ),
        Fused(f"{layer}.self_attention.query_key_value", ("q_proj", "k_proj", "v_proj"), first.attn.kv_heads),
    )


def read(r: Reader) -> ModelConfig:
    r.rename(
        hidden_size="n_embed",
        intermediate_size="ffn_hidden_size",
        num_hidden_layers="n_layer",
        num_attention_heads="n_head",
    )
    r.only("apply_residual_connection_post_layernorm", False)
    count, new, parallel = heads(r)["heads"], r.bool("new_decoder_architecture", False), True
    kv_heads = 1 if r.bool("multi_query", True) else count
    norms = r.int("num_ln_in_parallel_attn", 2 if new else 1)
    if new:
        kv_heads = r.divisor("num_kv_heads", count)
        r.only("parallel_attn", True)
    else:
        r.ignore("num_kv_heads")
        parallel = r.bool("parallel_attn", True)
        norms = norms if parallel else 2
        if parallel and norms != 1:
            raise ConfigError(
                f"{r.source}: 'num_ln_in_parallel_attn' is {norms}; expected 1 without "
                "'new_decoder_architecture'"
            )
    bias, alibi = r.bool("bias", False), r.bool("alibi", False)
    attn = {"kv_heads": kv_heads, "qkv_bias": bias, "out_bias": bias, "rope": None}
    context = r.int("max_position_embeddings", 2048)
    if alibi:
        # Trained with slopes in bfloat16, added before the scale.
        slopes = torch.tensor(alibi_slopes(count), device="cpu").bfloat16().tolist()
        attn["slopes"] = tuple(slope * heads(r)["scale"] for slope in slopes)
        r.ignore("rope_parameters", "rope_scaling", "rope_theta")
    else:
        attn["rope"] = rope(r, heads(r)["head_dim"], context)
    norm = Norm(r.float("layer_norm_epsilon", 1e-5), kind="layer", bias=True)
    layers = pre_norm_layers(
        r,
        attn=attn,
        mlp={"hidden": r.int("intermediate_size", 4 * r.int("hidden_size")), "bias": bias, "gated": False},
        act=activation(r, "activation", default="gelu"),
        pre=norm,
    )
    pre_mlp = norm if norms == 2 else None
    return finish(
        r,
        layers=[replace(layer, pre_mlp=pre_mlp, parallel=parallel) for layer in layers],
        norm=norm,
        context=context,
        tied=tied(r, default=True),
        padding=None,
    )
