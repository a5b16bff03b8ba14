"""The audio encoders' table: tiny random checkpoints, written by transformers, in every odd shape a family
has.

Adding a family adds entries here; every property in `test_audio.py` is then tested for it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import transformers

from tests.families import Case, checkpoint

VOCAB = 30
FRAMES, BANDS = 44, 26
SPEECH = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 80,
    "conv_dim": (12, 20, 16),
    "conv_kernel": (5, 3, 2),
    "conv_stride": (3, 2, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 20,
    "vocab_size": VOCAB,
}
# What the larger models of a family have.
LARGE = {
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
    "conv_bias": True,
    "num_conv_pos_embeddings": 5,
    "use_weighted_layer_sum": True,
}
SPECTROGRAM = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 80,
    "patch_size": 6,
    "frequency_stride": 5,
    "time_stride": 4,
    "max_length": FRAMES,
    "num_mel_bins": BANDS,
}

CASES = [
    Case("wav2vec2", "Wav2Vec2", base=SPEECH),
    Case("wav2vec2-large", "Wav2Vec2", LARGE | {"pad_token_id": 3, "mask_time_prob": 0.0}, SPEECH),
    Case("wav2vec2-other", "Wav2Vec2", {"hidden_act": "relu", "feat_extract_activation": "relu"}, SPEECH),
    Case("hubert", "Hubert", base=SPEECH),
    Case(
        "hubert-large", "Hubert", LARGE | {"feat_proj_layer_norm": False, "ctc_zero_infinity": True}, SPEECH
    ),
    Case("wavlm", "WavLM", {"num_buckets": 16, "max_bucket_distance": 20}, SPEECH),
    Case("wavlm-large", "WavLM", LARGE, SPEECH),
    Case("ast", "AST", base=SPECTROGRAM),
    Case(
        "ast-side-by-side", "AST", {"frequency_stride": 6, "time_stride": 6, "qkv_bias": False}, SPECTROGRAM
    ),
]

# The vocabulary of tiny CTC models.
LETTERS = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
LETTERS |= {letter: 4 + index for index, letter in enumerate("|ABCDEFGHIJKLMNOPQRSTUVWXY")}


def with_processor(case: Case, head: str, folder: Path) -> None:
    """A checkpoint in a folder with its processor, as transformers writes it."""
    shutil.copytree(checkpoint(case, head), folder)
    if case.base is SPECTROGRAM:
        transformers.ASTFeatureExtractor(max_length=FRAMES, num_mel_bins=BANDS).save_pretrained(folder)
        return
    (folder / "vocab.json").write_text(json.dumps(LETTERS))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    extractor = transformers.Wav2Vec2FeatureExtractor()
    transformers.Wav2Vec2Processor(extractor, tokenizer).save_pretrained(folder)
