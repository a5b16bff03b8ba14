"""WavLM: Wav2Vec2 with a bias of distances, of which each query takes as much as it needs."""

from __future__ import annotations

from taut.config import ModelConfig, Reader, Relative
from taut.models.wav2vec2 import IGNORED, speech_encoder, speech_rules, waves
from taut.weights import Rename, Rule

ARCHITECTURE = "WavLMForCTC"

__all__ = ["IGNORED", "read", "rules"]

_ATTENTION = "model.layers.{}.self_attn"


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """The first layer's attention holds the bias that all share."""
    return (
        Rename(f"{_ATTENTION}.gru_rel_pos_const", f"{_ATTENTION}.gate.constant"),
        Rename(f"{_ATTENTION}.gru_rel_pos_linear", f"{_ATTENTION}.gate"),
        Rename("model.layers.0.self_attn.rel_attn_embed", "model.relative_bias"),
        *speech_rules(config, "wavlm"),
    )


def read(r: Reader) -> ModelConfig:
    distances = Relative(r.int("num_buckets", 320), r.int("max_bucket_distance", 800), both=True)
    return speech_encoder(r, waves(r), reduction="mean", relative=distances, gated=True)
