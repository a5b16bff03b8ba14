"""Whisper: an encoder that hears log-mel spectrograms, and a decoder that writes what was said.

Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision".
"""

from __future__ import annotations

from dataclasses import replace

from taut.config import Attn, Heads, Layer, ModelConfig, Positions, Reader, finish, pair
from taut.models import bart
from taut.models.llama import tied
from taut.weights import Rename, Rule

ARCHITECTURE = "WhisperForConditionalGeneration"
KIND = "speech encoder-decoder"


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    return (*bart.rules(config), Rename("proj_out", "lm_head"))


def read(r: Reader) -> ModelConfig:
    bart.names(r)
    r.ignore("encoder_layerdrop", "decoder_layerdrop", "init_std", "num_hidden_layers")
    r.ignore("scale_embedding")  # which the model reads and never uses
    # What is hidden of the sound while training, and options of generation.
    r.ignore("apply_spec_augment", "mask_time_prob", "mask_time_length", "mask_time_min_masks")
    r.ignore("mask_feature_prob", "mask_feature_length", "mask_feature_min_masks")
    r.ignore("median_filter_width", "forced_decoder_ids")
    heard, bins, said = r.int("max_source_positions", 1500), r.int("num_mel_bins", 80), layers(r, "decoder")
    encoder, context = layers(r, "encoder"), r.int("max_target_positions", 448)
    config = finish(
        r,
        layers=said,
        norm=bart.NORM,
        tied=tied(r, default=True),
        positions=Positions(context),
        context=context,
        heads=Heads(
            projection=r.int("classifier_proj_size", 256),
            all_layers=r.bool("use_weighted_layer_sum", False),
        ),
    )
    if config.decoder_start_token_id is None:
        config = replace(config, decoder_start_token_id=50257)
    config = pair(config, encoder, shared=False)
    positions = Positions(heard, sinusoidal=True)
    hears = replace(config.encoder, positions=positions, context=heard, mel_bins=bins)
    return replace(config, pairing=replace(config.pairing, encoder=hears))


def layers(r: Reader, stack: str) -> list[Layer]:
    """BART's with norms ahead of each part; its keys have no biases."""

    def bare(attn: Attn | None) -> Attn | None:
        return None if attn is None else replace(attn, k_bias=False)

    found = bart.layers(r, stack, before=True)
    return [replace(layer, attn=bare(layer.attn), cross=bare(layer.cross)) for layer in found]
