"""The encoders' table: tiny random checkpoints, written by transformers, in every odd shape a family has.

Adding a family adds entries here; every property in `test_encoders.py` is then tested for it.
"""

from __future__ import annotations

from tests.families import CONTEXT, VOCAB, Case

BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 80,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
}

CASES = [
    Case("bert", "Bert", base=BERT),
    Case("bert-relu-three-types", "Bert", {"hidden_act": "relu", "type_vocab_size": 3}, BERT),
]
