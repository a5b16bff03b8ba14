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

ROBERTA = BERT | {"pad_token_id": 1, "max_position_embeddings": CONTEXT + 2}
DISTILBERT = {
    "vocab_size": VOCAB,
    "dim": 48,
    "n_layers": 3,
    "n_heads": 6,
    "hidden_dim": 80,
    "max_position_embeddings": CONTEXT,
}
MODERNBERT = BERT | {
    "local_attention": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
NARROW = BERT | {"embedding_size": 32}

CASES = [
    Case("bert", "Bert", base=BERT),
    Case("bert-relu-three-types", "Bert", {"hidden_act": "relu", "type_vocab_size": 3}, BERT),
    Case("roberta", "Roberta", base=ROBERTA),
    Case("roberta-padding-0", "Roberta", {"pad_token_id": 0, "type_vocab_size": 1}, ROBERTA),
    Case("xlm-roberta", "XLMRoberta", base=ROBERTA),
    Case("camembert", "Camembert", base=ROBERTA),
    Case("distilbert", "DistilBert", base=DISTILBERT),
    Case("electra", "Electra", base=NARROW),
    Case("electra-as-wide", "Electra", {"embedding_size": 48}, NARROW),
    Case("ernie", "Ernie", base=BERT),
    Case("ernie-tasks", "Ernie", {"use_task_id": True}, BERT),
    Case("layoutlm", "LayoutLM", {"max_2d_position_embeddings": 40}, BERT),
    Case("mpnet", "MPNet", base=ROBERTA),
    Case("modernbert", "ModernBert", base=MODERNBERT),
    Case(
        "modernbert-biases-mean",
        "ModernBert",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "classifier_bias": True,
            "decoder_bias": False,
            "classifier_pooling": "mean",
            "hidden_activation": "silu",
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        MODERNBERT,
    ),
    Case("nomic", "NomicBert", base=BERT),
    Case("nomic-wide-heads", "NomicBert", {"head_dim": 12, "type_vocab_size": 1, "hidden_act": "gelu"}, BERT),
    Case("albert", "Albert", base=NARROW),
    Case("albert-groups", "Albert", {"num_hidden_groups": 2, "inner_group_num": 2}, NARROW),
    Case("albert-as-wide", "Albert", {"embedding_size": 48, "hidden_act": "gelu"}, NARROW),
]
