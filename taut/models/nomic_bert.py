"""NomicBERT: BERT with rotation for learned positions, a gated MLP, and no biases in its blocks."""

from __future__ import annotations

from dataclasses import replace

from taut.config import Heads, Mlp, ModelConfig, Reader, Transform, activation, rope
from taut.models.bert import EMBEDDINGS, MASKED, encoder, layer_norm, post_norm_layers
from taut.weights import Fused, Rename, Rule, renames

ARCHITECTURE = "NomicBertForMaskedLM"

IGNORED = ("*.position_ids", "cls.predictions.decoder.*")

TABLES = (
    Rename("model.embeddings.word_embeddings", "model.embed_tokens"),
    *(rule for rule in EMBEDDINGS if rule.ours.startswith("model.embed_features.")),
)
HEADS = (
    Rename("nomic_bert", "model"),
    Rename("cls.predictions.transform.layer_norm", "lm_head.layer_norm"),
    *MASKED,
)
RULES = (
    *TABLES,
    Rename("model.emb_ln", "model.embed_layernorm"),
    Rename("model.encoder.layers.{}", "model.layers.{}"),
    *renames(
        "model.encoder.layers.{}",
        {
            "attn": "self_attn",
            "norm1": "after_attention_layernorm",
            "mlp.fc11": "mlp.up_proj",
            "mlp.fc12": "mlp.gate_proj",
            "mlp.fc2": "mlp.down_proj",
            "norm2": "after_feedforward_layernorm",
        },
    ),
    Fused("model.encoder.layers.{}.attn.Wqkv", ("q_proj", "k_proj", "v_proj")),
    Rename("model.encoder.layers.{}.attn.out_proj", "model.encoder.layers.{}.attn.o_proj"),
    *HEADS,
)
MODULES: tuple[Rule, ...] = (
    *TABLES,
    Rename("model.embeddings.LayerNorm", "model.embed_layernorm"),
    *renames(
        "model.layers.{}",
        {
            "post_attention_layernorm": "after_attention_layernorm",
            "post_mlp_layernorm": "after_feedforward_layernorm",
        },
    ),
    *HEADS,
)


def read(r: Reader) -> ModelConfig:
    act = _read_older(r) or activation(r, "hidden_act", default="silu")
    layer, *others = post_norm_layers(r, act)
    head_dim = r.int("head_dim", layer.attn.head_dim)
    theta, partial = r.float("rotary_emb_base", 1000.0), r.float("rotary_emb_fraction", 1.0)
    attn = replace(
        layer.attn,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        qkv_bias=False,
        out_bias=False,
        rope=rope(r, head_dim, r.int("max_position_embeddings", 2048), theta, partial),
    )
    layer = replace(layer, attn=attn, mlp=Mlp(layer.mlp.hidden, act))
    heads = Heads(
        pooler=Transform("tanh"),
        pooled=("ForSequenceClassification",),
        masked=Transform(act, layer_norm(r)),
    )
    return encoder(r, layers=[layer] * (1 + len(others)), positions=None, heads=heads)


def _read_older(r: Reader) -> str | None:
    """The words of GPT-2 and flash-attention, in which the first checkpoints describe the same model; gives
    the activation, if they do."""
    r.rename(
        hidden_size="n_embd",
        num_hidden_layers="n_layer",
        num_attention_heads="n_head",
        intermediate_size="n_inner",
        max_position_embeddings="n_positions",
        layer_norm_eps="layer_norm_epsilon",
    )
    off = ("prenorm", "parallel_block", "use_rms_norm", "causal", "rotary_emb_interleaved")
    off += ("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias", "scale_attn_by_inverse_layer_idx")
    for key in off:
        r.only(key, False)
    r.only("rotary_emb_scale_base")
    r.only("rotary_scaling_factor")
    r.only("scale_attn_weights", True)
    r.ignore(
        *("dense_seq_output", "fused_bias_fc", "fused_dropout_add_ln", "max_trained_positions"),
        *("pad_vocab_size_multiple", "parallel_block_tied_norm", "reorder_and_upcast_attn"),
        *("use_flash_attn", "use_xentropy"),
    )
    gates = {"swiglu": "silu", "geglu": "gelu"}
    return r.choice("activation_function", gates) if r.has("activation_function") else None
