"""mT5: T5 1.1 for many languages, whose logits are never scaled."""

from __future__ import annotations

from taut.config import ModelConfig, Reader
from taut.models.t5 import DENSE, ENCODER_ALONE, IGNORED, encoder_decoder, rules

ARCHITECTURE = "MT5ForConditionalGeneration"

__all__ = ["DENSE", "ENCODER_ALONE", "IGNORED", "read", "rules"]


def read(r: Reader) -> ModelConfig:
    r.ignore("tokenizer_class", "scale_decoder_outputs")
    return encoder_decoder(r, gated=True, scaled=False)
