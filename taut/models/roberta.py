"""RoBERTa: BERT whose positions begin behind the padding token's, with a head of its own for sequences."""

from __future__ import annotations

from taut.config import Heads, ModelConfig, Positions, Reader, Transform, padding_row
from taut.models.bert import BLOCKS, EMBEDDINGS, encoder, layer_norm
from taut.weights import Rename

ARCHITECTURE = "RobertaForMaskedLM"

IGNORED = ("*.position_ids", "lm_head.decoder.*")
RULES = (*EMBEDDINGS, *BLOCKS, Rename("roberta", "model"))


def read(r: Reader) -> ModelConfig:
    padding = padding_row(r, 1)
    positions = behind_padding(r, r.int("pad_token_id", 1, minimum=-1))
    return encoder(r, positions=positions, context=positions.count, heads=heads(r), padding=padding)


def heads(r: Reader) -> Heads:
    """A pooler of the model without a head alone, and a transform of its own where sequences are scored."""
    tanh = Transform("tanh")
    return Heads(pooler=tanh, pooled=("Model",), masked=Transform("gelu", layer_norm(r)), sequence=tanh)


def behind_padding(r: Reader, padding: int) -> Positions:
    """Positions that begin with the row behind that of the padding token, of a table of
    `max_position_embeddings` rows."""
    offset = padding + 1
    return Positions(r.int("max_position_embeddings", 512, minimum=offset + 1) - offset, offset)
