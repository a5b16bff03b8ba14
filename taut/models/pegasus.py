"""PEGASUS: BART with sinusoidal positions, and norms before each part of a block and behind each stack."""

from __future__ import annotations

from taut.config import ModelConfig, Positions, Reader
from taut.models.bart import IGNORED, NORM, embed_scale, encoder_decoder, names, rules

ARCHITECTURE = "PegasusForConditionalGeneration"

__all__ = ["IGNORED", "read", "rules"]


def read(r: Reader) -> ModelConfig:
    names(r)
    positions = Positions(r.int("max_position_embeddings", 1024), sinusoidal=True)
    pairing = {"embeds_scale": embed_scale(r)}
    return encoder_decoder(r, before=True, pairing=pairing, start=0, positions=positions, norm=NORM)
