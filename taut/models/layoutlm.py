"""LayoutLM: BERT with embeddings of where on its page each token's box lies."""

from __future__ import annotations

from dataclasses import replace

from taut.config import Features, ModelConfig, Reader
from taut.models.bert import BLOCKS, EMBEDDINGS, IGNORED, MASKED, encoder, token_types
from taut.weights import Rename

ARCHITECTURE = "LayoutLMForMaskedLM"

RULES = (*EMBEDDINGS, *BLOCKS, Rename("layoutlm", "model"), *MASKED)

__all__ = ["IGNORED", "RULES", "read"]

HEADS = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")


def read(r: Reader) -> ModelConfig:
    count = r.int("max_2d_position_embeddings", 1024)
    # Left, upper, right and lower edge, height and width.
    box = Features("bbox", tuple((f"{edge}_position_embeddings", count) for edge in "xyxyhw"))
    config = encoder(r, features=(token_types(r), box))
    # Files have the pooler under every head.
    pooled = ("Model", *(f"For{head}" for head in HEADS))
    return replace(config, heads=replace(config.heads, pooled=pooled))
