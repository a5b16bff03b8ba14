"""ELECTRA: BERT with a narrower embedding, projected, and no pooler; as a generator or a discriminator."""

from __future__ import annotations

from taut.config import Heads, ModelConfig, Reader, Transform
from taut.models.bert import BLOCKS, EMBEDDINGS, encoder, layer_norm
from taut.weights import Rename

ARCHITECTURE = "ElectraForMaskedLM"

IGNORED = ("*.position_ids", "generator_lm_head.weight")
RULES = (
    Rename("model.embeddings_project", "model.project_in"),
    *EMBEDDINGS,
    *BLOCKS,
    Rename("electra", "model"),
    Rename("generator_predictions.dense", "lm_head.dense"),
    Rename("generator_predictions.LayerNorm", "lm_head.layer_norm"),
    Rename("generator_lm_head.bias", "lm_head.bias"),
)


def read(r: Reader) -> ModelConfig:
    r.ignore("summary_last_dropout")
    dim, inner = r.int("hidden_size"), r.int("embedding_size", 128)
    heads = Heads(masked=Transform("gelu", layer_norm(r)), sequence=Transform("gelu"))
    return encoder(r, embed_dim=None if inner == dim else inner, heads=heads)
