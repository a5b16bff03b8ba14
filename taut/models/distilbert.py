"""DistilBERT: a distilled BERT without token types and pooler, with names of its own."""

from __future__ import annotations

from taut.config import (
    Heads,
    ModelConfig,
    Norm,
    Positions,
    Reader,
    Transform,
    activation,
    finish,
    padding_row,
)
from taut.models.bert import post_norm_layers
from taut.weights import Rename, renames

ARCHITECTURE = "DistilBertForMaskedLM"

IGNORED = ("*.position_ids", "vocab_projector.weight")
RULES = (
    *renames(
        "model",
        {
            "embeddings.word_embeddings": "embed_tokens",
            "embeddings.position_embeddings": "embed_positions",
            "embeddings.LayerNorm": "embed_layernorm",
            "transformer.layer.{}": "layers.{}",
        },
    ),
    *renames(
        "model.transformer.layer.{}",
        {
            "attention.q_lin": "self_attn.q_proj",
            "attention.k_lin": "self_attn.k_proj",
            "attention.v_lin": "self_attn.v_proj",
            "attention.out_lin": "self_attn.o_proj",
            "sa_layer_norm": "after_attention_layernorm",
            "ffn.lin1": "mlp.up_proj",
            "ffn.lin2": "mlp.down_proj",
            "output_layer_norm": "after_feedforward_layernorm",
        },
    ),
    Rename("distilbert", "model"),
    Rename("vocab_transform", "lm_head.dense"),
    Rename("vocab_layer_norm", "lm_head.layer_norm"),
    Rename("vocab_projector.bias", "lm_head.bias"),
    Rename("pre_classifier", "classifier.dense"),
    Rename("classifier", "classifier.out_proj"),
)


def read(r: Reader) -> ModelConfig:
    r.rename(
        hidden_size="dim",
        num_hidden_layers="n_layers",
        num_attention_heads="n_heads",
        intermediate_size="hidden_dim",
    )
    # The sinusoids are in the file, as learned positions are.
    r.ignore("sinusoidal_pos_embds", "qa_dropout", "seq_classif_dropout")
    act, norm = activation(r, "activation", default="gelu"), Norm(1e-12, kind="layer", bias=True)
    return finish(
        r,
        layers=post_norm_layers(r, act, norm),
        norm=None,
        positions=Positions(r.int("max_position_embeddings", 512)),
        embed_norm=norm,
        heads=Heads(masked=Transform(act, norm), sequence=Transform("relu")),
        head_bias=True,
        tied=r.bool("tie_word_embeddings", True),
        padding=padding_row(r, 0),
    )
