"""ERNIE: BERT with an embedding of the task, where its config asks for it."""

from __future__ import annotations

from taut.config import Features, ModelConfig, Reader
from taut.models.bert import BLOCKS, EMBEDDINGS, IGNORED, MASKED, encoder, token_types
from taut.weights import Rename

ARCHITECTURE = "ErnieForMaskedLM"

RULES = (*EMBEDDINGS, *BLOCKS, Rename("ernie", "model"), *MASKED)

__all__ = ["IGNORED", "RULES", "read"]


def read(r: Reader) -> ModelConfig:
    features = [token_types(r)]
    tasks = r.int("task_type_vocab_size", 3)
    if r.bool("use_task_id", False):
        features.append(Features("task_type_ids", (("task_type_embeddings", tasks),)))
    return encoder(r, features=tuple(features))
