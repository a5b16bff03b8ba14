"""Marian (OPUS-MT): BART with sinusoidal positions and no norm behind the embedding; two tables of tokens in
some."""

from __future__ import annotations

from dataclasses import replace

from taut.config import ModelConfig, Positions, Reader
from taut.errors import ConfigError
from taut.models.bart import IGNORED, embed_scale, encoder_decoder, names, rules

ARCHITECTURE = "MarianMTModel"

__all__ = ["IGNORED", "read", "rules"]


def read(r: Reader) -> ModelConfig:
    names(r)
    shared = r.bool("share_encoder_decoder_embeddings", True)
    positions = Positions(r.int("max_position_embeddings", 1024), sinusoidal=True)
    target = r.int("decoder_vocab_size", r.int("vocab_size"))
    pairing = {"shared": shared, "embeds_scale": embed_scale(r)}
    config = encoder_decoder(r, before=False, pairing=pairing, start=58100, positions=positions)
    if shared and target != config.vocab_size:
        raise ConfigError(
            f"{r.source}: 'decoder_vocab_size' is {target} and 'vocab_size' {config.vocab_size}, but "
            "'share_encoder_decoder_embeddings' says they share one table"
        )
    return replace(config, vocab_size=target)
