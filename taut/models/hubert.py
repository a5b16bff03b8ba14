"""HuBERT: Wav2Vec2, perhaps without the norm of frames."""

from __future__ import annotations

from taut.config import ModelConfig, Reader
from taut.models.wav2vec2 import IGNORED, speech_encoder, speech_rules, waves
from taut.weights import Rule

ARCHITECTURE = "HubertForCTC"

__all__ = ["IGNORED", "read", "rules"]


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    return speech_rules(config, "hubert")


def read(r: Reader) -> ModelConfig:
    r.only("conv_pos_batch_norm", False)
    return speech_encoder(r, waves(r, normed=r.bool("feat_proj_layer_norm", True), features_given=False))
