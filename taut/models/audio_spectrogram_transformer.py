"""The audio spectrogram transformer: ViT over patches of a spectrogram that overlap."""

from __future__ import annotations

from taut.config import Heads, ModelConfig, Patches, Pooler, Reader
from taut.errors import ConfigError
from taut.models.vit import body, image_encoder, layer_norm, module_body, pre_norm_layers

ARCHITECTURE = "ASTForAudioClassification"

_TOKENS = ("cls_token", "distillation_token")
RULES = body("audio_spectrogram_transformer", _TOKENS)
MODULES = module_body("audio_spectrogram_transformer", _TOKENS)


def read(r: Reader) -> ModelConfig:
    size = r.int("patch_size", 16)
    patches = Patches(
        image=(r.int("num_mel_bins", 128), r.int("max_length", 1024)),
        size=(size, size),
        channels=1,
        stride=(r.int("frequency_stride", 10), r.int("time_stride", 10)),
        prefix=2,
    )
    if min(patches.grid) < 1:
        raise ConfigError(
            f"{r.source}: 'patch_size' is {size}, larger than 'num_mel_bins' x 'max_length', which is "
            f"{patches.image[0]} x {patches.image[1]}"
        )
    norm = layer_norm(r)
    return image_encoder(
        r,
        layers=pre_norm_layers(r, norm, qkv_bias=r.bool("qkv_bias", True)),
        patches=patches,
        norm=norm,
        heads=Heads(pooler=Pooler("prefix"), pooled=("Model", "ForAudioClassification"), pooling="pooler"),
    )
