"""mBART: BART with norms before each part of a block and behind each stack, and a language that begins."""

from __future__ import annotations

from taut.config import ModelConfig, Reader
from taut.models.bart import IGNORED, NORM, encoder_decoder, rules

ARCHITECTURE = "MBartForConditionalGeneration"

__all__ = ["IGNORED", "read", "rules"]


def read(r: Reader) -> ModelConfig:
    pairing = {"repeats": True, "start_is_last": True}
    return encoder_decoder(r, before=True, pairing=pairing, start=None, embed_norm=NORM, norm=NORM)
