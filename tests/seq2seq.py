"""The encoder-decoders' table: tiny random checkpoints, written by transformers, in every odd shape.

Adding a family adds entries here; every property in `test_seq2seq.py` is then tested for it.
"""

from __future__ import annotations

from tests.families import CONTEXT, VOCAB, Case

IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
# Buckets end at distance 12, which the prompts pass.
T5 = IDS | {
    "d_model": 48,
    "d_kv": 8,
    "d_ff": 80,
    "num_layers": 2,
    "num_heads": 6,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
BART = IDS | {
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "forced_eos_token_id": None,
}
SCALED = {"scale_embedding": True}
UNEVEN = {"encoder_layers": 1, "decoder_layers": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 32}

CASES = [
    Case("t5", "T5", base=T5),
    Case("t5-gated-unscaled", "T5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, T5),
    Case("t5-uneven-wide-heads", "T5", {"num_decoder_layers": 3, "d_kv": 12, "num_heads": 3}, T5),
    Case("t5-gated-silu", "T5", {"feed_forward_proj": "gated-silu"}, T5),
    Case("mt5", "MT5", base=T5),
    Case("mt5-relu", "MT5", {"feed_forward_proj": "relu", "relative_attention_max_distance": 20}, T5),
    Case("bart", "Bart", base=BART),
    Case("bart-uneven-scaled", "Bart", UNEVEN | SCALED | {"activation_function": "relu"}, BART),
    Case("bart-untied", "Bart", {"tie_word_embeddings": False}, BART),
    Case("mbart", "MBart", base=BART),
    Case("mbart-scaled", "MBart", UNEVEN | SCALED, BART),
    Case("pegasus", "Pegasus", base=BART),
    Case("pegasus-scaled", "Pegasus", UNEVEN | SCALED | {"activation_function": "relu"}, BART),
    Case("marian", "Marian", base=BART),
    Case("marian-scaled", "Marian", UNEVEN | SCALED | {"activation_function": "swish"}, BART),
    Case(
        "marian-two-tables",
        "Marian",
        {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": VOCAB - 20},
        BART,
    ),
]
