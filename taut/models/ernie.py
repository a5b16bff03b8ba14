"""ERNIE: BERT with an embedding of the task, where its config asks for it."""

from __future__ import annotations

from taut.config import Features, ModelConfig, Reader
from taut.models.bert import BLOCKS, EMBEDDINGS, IGNORED, MASKED, encoder
from taut.weights import Rename

ARCHITECTURE = "ErnieForMaskedLM"

RULES = (*EMBEDDINGS, *BLOCKS, Rename("ernie", "model"), *MASKED)

__all__ = ["IGNORED", "RULES", "read"]


def read(r: Reader) -> ModelConfig:
    count = r.int("task_type_vocab_size", 3)
    tasks = Features("task_type_ids", (("task_type_embeddings", count),))
    return encoder(r, features=(tasks,) if r.bool("use_task_id", False) else ())
