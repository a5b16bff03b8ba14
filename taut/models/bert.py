"""BERT, and what encoders like it share: post-norm blocks over learned positions and token types."""

from __future__ import annotations

from typing import Any

from taut.config import (
    Attn,
    Features,
    Heads,
    Layer,
    Mlp,
    ModelConfig,
    Norm,
    Positions,
    Reader,
    Transform,
    activation,
    finish,
    padding_row,
)
from taut.weights import Rename, renames

ARCHITECTURE = "BertForMaskedLM"

# Buffers, the tied matrix under a name of its own, and the head that says which sentences are neighbours.
IGNORED = ("*.position_ids", "cls.predictions.decoder.*", "cls.seq_relationship.*")


_TABLES = ("token_type", "task_type", "x_position", "y_position", "h_position", "w_position")
EMBEDDINGS = renames(
    "model",
    {
        "embeddings.word_embeddings": "embed_tokens",
        "embeddings.position_embeddings": "embed_positions",
        "embeddings.LayerNorm": "embed_layernorm",
    }
    | {f"embeddings.{table}_embeddings": f"embed_features.{table}_embeddings" for table in _TABLES},
)
BLOCKS = (
    Rename("model.encoder.layer.{}", "model.layers.{}"),
    *renames(
        "model.encoder.layer.{}",
        {
            "attention.self.query": "self_attn.q_proj",
            "attention.self.key": "self_attn.k_proj",
            "attention.self.value": "self_attn.v_proj",
            "attention.output.dense": "self_attn.o_proj",
            "attention.output.LayerNorm": "after_attention_layernorm",
            "intermediate.dense": "mlp.up_proj",
            "output.dense": "mlp.down_proj",
            "output.LayerNorm": "after_feedforward_layernorm",
        },
    ),
)
# The head of masked tokens.
MASKED = (
    Rename("cls.predictions.transform.dense", "lm_head.dense"),
    Rename("cls.predictions.transform.LayerNorm", "lm_head.layer_norm"),
    Rename("cls.predictions.bias", "lm_head.bias"),
)
RULES = (*EMBEDDINGS, *BLOCKS, Rename("bert", "model"), *MASKED)


def read(r: Reader) -> ModelConfig:
    return encoder(r)


def encoder(r: Reader, **changes: Any) -> ModelConfig:
    """A BERT's config, with `changes` to `ModelConfig`."""
    r.only("is_decoder", False)
    r.only("position_embedding_type", "absolute")
    r.ignore("hidden_dropout_prob", "attention_probs_dropout_prob", "gradient_checkpointing")
    act = activation(r, "hidden_act", default="gelu")
    norm = layer_norm(r)
    fields = {
        "layers": post_norm_layers(r, act),
        "positions": Positions(r.int("max_position_embeddings", 512)),
        "features": (token_types(r),),
        "embed_norm": norm,
        "heads": Heads(pooler=Transform("tanh"), masked=Transform(act, norm)),
        "head_bias": True,
        "tied": r.bool("tie_word_embeddings", True),
        "padding": padding_row(r, 0),
    }
    return finish(r, norm=None, **(fields | changes))


def token_types(r: Reader) -> Features:
    return Features("token_type_ids", (("token_type_embeddings", r.int("type_vocab_size", 2)),))


def layer_norm(r: Reader) -> Norm:
    return Norm(r.float("layer_norm_eps", 1e-12), kind="layer", bias=True)


def post_norm_layers(r: Reader, act: str, norm: Norm | None = None, count: int | None = None) -> list[Layer]:
    """Blocks that see the whole row, with biases everywhere and a norm behind each half."""
    dim, heads = r.int("hidden_size"), r.divisor("num_attention_heads", r.int("hidden_size"))
    attn = Attn(
        heads=heads,
        kv_heads=heads,
        head_dim=dim // heads,
        scale=(dim // heads) ** -0.5,
        rope=None,
        qkv_bias=True,
        out_bias=True,
        causal=False,
    )
    mlp = Mlp(r.int("intermediate_size"), act, bias=True, gated=False)
    norm = norm or layer_norm(r)
    layer = Layer(attn, mlp, pre_attn=None, pre_mlp=None, after_attn=norm, after_mlp=norm)
    return [layer] * (count or r.int("num_hidden_layers"))
