"""The table of encoder-decoders that hear: tiny random checkpoints, written by transformers, in odd shapes.

Adding a family adds entries here; every property in `test_speech_seq2seq.py` is then tested for it.
"""

from __future__ import annotations

import torch

from tests.families import VOCAB, Case

BINS, FRAMES = 20, 60
TIMES = VOCAB - 31  # the first timestamp; the last one ends what the encoder hears
WHISPER = {
    "vocab_size": VOCAB,
    "num_mel_bins": BINS,
    "max_source_positions": FRAMES // 2,
    "max_target_positions": 64,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 90,
    "pad_token_id": 89,
    "bos_token_id": 89,
    "eos_token_id": 89,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}

CASES = [
    Case("whisper", "Whisper", base=WHISPER),
    Case(
        "whisper-uneven",
        "Whisper",
        {
            "decoder_layers": 3,
            "decoder_attention_heads": 3,
            "num_mel_bins": 33,
            "activation_function": "relu",
        },
        WHISPER,
    ),
    Case("whisper-assistant", "Whisper", {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1}, WHISPER),
    Case("whisper-untied", "Whisper", {"tie_word_embeddings": False, "scale_embedding": True}, WHISPER),
]
# With a head that classifies clips.
CLASSIFIERS = [
    Case("whisper-labels", "Whisper", {"classifier_proj_size": 20, "num_labels": 3}, WHISPER),
    Case(
        "whisper-all-layers",
        "Whisper",
        {"use_weighted_layer_sum": True, "encoder_layers": 3, "num_labels": 4},
        WHISPER,
    ),
]


def features(clips: int, frames: int = FRAMES, bins: int = BINS, seed: int = 0) -> torch.Tensor:
    """Spectrograms `[clips, bins, frames]`."""
    return torch.randn(clips, bins, frames, generator=torch.Generator().manual_seed(seed))
