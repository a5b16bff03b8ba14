"""BLOOM: ALiBi, LayerNorm, a plain MLP, and a norm behind the embedding."""

from __future__ import annotations

from taut.config import ModelConfig, Norm, Reader, alibi_slopes, finish
from taut.models.llama import heads, pre_norm_layers, tied
from taut.weights import Fused, Rename, Rule, renames

ARCHITECTURE = "BloomForCausalLM"


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """q, k and v lie head by head."""
    layer = "transformer.h.{}"
    return (
        Rename("transformer.word_embeddings", "model.embed_tokens"),
        Rename("transformer.word_embeddings_layernorm", "model.embed_layernorm"),
        Rename("transformer.ln_f", "model.norm"),
        Rename(layer, "model.layers.{}"),
        *renames(
            layer,
            {
                "post_attention_layernorm": "pre_feedforward_layernorm",
                "self_attention": "self_attn",
                "self_attention.dense": "self_attention.o_proj",
                "mlp.dense_h_to_4h": "mlp.up_proj",
                "mlp.dense_4h_to_h": "mlp.down_proj",
            },
        ),
        Fused(
            f"{layer}.self_attention.query_key_value",
            ("q_proj", "k_proj", "v_proj"),
            config.layers[0].attn.heads,
        ),
    )


def read(r: Reader) -> ModelConfig:
    r.rename(
        num_hidden_layers="n_layer",
        num_attention_heads="n_head",
        hidden_size="n_embed",
        max_position_embeddings="seq_length",
    )
    r.only("apply_residual_connection_post_layernorm", False)
    # How training was cut up and fused.
    r.ignore("slow_but_exact", "masked_softmax_fusion", "bias_dropout_fusion", "offset_alibi", "n_inner")
    r.ignore("skip_bias_add", "skip_bias_add_qkv", "unk_token_id", "attention_softmax_in_fp32")
    norm = Norm(r.float("layer_norm_epsilon", 1e-5), kind="layer", bias=True)
    layers = pre_norm_layers(
        r,
        attn={
            "rope": None,
            "slopes": alibi_slopes(heads(r)["heads"]),
            "qkv_bias": True,
            "out_bias": True,
        },
        mlp={"hidden": 4 * r.int("hidden_size"), "bias": True, "gated": False},
        act="gelu_tanh",
        pre=norm,
    )
    return finish(
        r,
        layers=layers,
        norm=norm,
        context=r.int("max_position_embeddings", 2048),
        tied=tied(r, default=True),
        embed_norm=norm,
        padding=None,
    )
