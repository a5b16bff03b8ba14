"""An encoder and the decoder that attends to what it gives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from taut.config import ModelConfig
from taut.errors import ConfigError
from taut.layers.block import Decoder
from taut.layers.encoder import Encoder
from taut.layers.mel import MelEncoder


class EncoderDecoder(nn.Module):
    """`encoder(batch)` gives hidden states, and `decoder(batch)` attends to those in `batch.source`; both
    look tokens up in one table where they share it."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__()
        for index, layer in enumerate(config.layers):
            own, cross = ((a.kv_heads, a.head_dim) for a in (layer.attn, layer.cross))
            if own != cross:
                raise ConfigError(
                    f"decoder layer {index} has key heads (count, size) {own} for itself and {cross} for its "
                    "source; both lie in one cache, so they must be equal"
                )
        self.encoder = encoder_of(config, dtype)
        self.decoder = Decoder(config, dtype=dtype)
        if config.pairing.shared:
            self.decoder.embed_tokens = self.encoder.embed_tokens

    def store(
        self, hidden: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], slots: Tensor
    ) -> None:
        """Write the keys and values that the decoder's layers make of an encoder's states `[tokens, dim]`
        into a cache, one `[pages, page_size, kv_heads, head_dim]` a layer, at `slots` `[tokens]`."""
        for attn in (layer.encoder_attn for layer in self.decoder.layers):
            for made, cache in zip(attn.keys(hidden), (keys, values), strict=True):
                cache[attn.index].flatten(0, 1).index_copy_(0, slots, made)


def encoder_of(config: ModelConfig, dtype: torch.dtype | None) -> Encoder | MelEncoder:
    """The encoder beside a decoder `config`: of tokens, or of spectrograms."""
    kind = Encoder if config.encoder.mel_bins is None else MelEncoder
    return kind(config.encoder, dtype=dtype)
