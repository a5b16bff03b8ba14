"""MPNet: RoBERTa without token types, with T5's bias of distances in every layer."""

from __future__ import annotations

from dataclasses import replace

from taut.config import ModelConfig, Reader, Relative, activation
from taut.models.bert import EMBEDDINGS, encoder, post_norm_layers
from taut.models.roberta import IGNORED, behind_padding, heads
from taut.weights import Rename, renames

ARCHITECTURE = "MPNetForMaskedLM"

RULES = (
    *EMBEDDINGS,
    Rename("model.encoder.relative_attention_bias", "model.relative_bias"),
    Rename("model.encoder.layer.{}", "model.layers.{}"),
    *renames(
        "model.encoder.layer.{}",
        {
            "attention.attn.q": "self_attn.q_proj",
            "attention.attn.k": "self_attn.k_proj",
            "attention.attn.v": "self_attn.v_proj",
            "attention.attn.o": "self_attn.o_proj",
            "attention.LayerNorm": "after_attention_layernorm",
            "intermediate.dense": "mlp.up_proj",
            "output.dense": "mlp.down_proj",
            "output.LayerNorm": "after_feedforward_layernorm",
        },
    ),
    Rename("mpnet", "model"),
)

__all__ = ["IGNORED", "RULES", "read"]


def read(r: Reader) -> ModelConfig:
    r.only("relative_attention_num_buckets", 32)  # transformers counts 32 whatever is said here
    relative = Relative(buckets=32, reach=128, both=True)
    layers = [
        replace(layer, attn=replace(layer.attn, relative=relative))
        for layer in post_norm_layers(r, activation(r, "hidden_act", default="gelu"))
    ]
    padding = 1  # whatever the config says
    positions = behind_padding(r, padding)
    return encoder(
        r,
        layers=layers,
        positions=positions,
        context=positions.count,
        features=(),
        heads=heads(r),
        padding=padding,
    )
