"""SigLIP: encoders of images and texts, compared pair by pair; a learned query sums up an image."""

from __future__ import annotations

from types import MappingProxyType

from taut.config import Contrast, Heads, ModelConfig, Pooler, Probe, Reader
from taut.models import clip
from taut.models.vit import image_encoder, layer_norm, patches, pre_norm_layers
from taut.weights import Fused, renames

ARCHITECTURE = "SiglipModel"

IGNORED = clip.IGNORED
# In files of small formats too: three matrices in one that isn't a linear layer's.
DENSE = ("in_proj_weight",)

TEXT = clip.TEXT
_HEAD = "vision_model.head"
VISION = (
    *renames(
        "vision_model",
        {
            "embeddings.patch_embedding": "patch_embeddings",
            "embeddings.position_embedding.weight": "positions",
            "post_layernorm": "norm",
            "head": "pooler.probe",
        },
    ),
    Fused(f"{_HEAD}.attention.in_proj", ("q_proj", "k_proj", "v_proj")),
    *renames(
        _HEAD,
        {
            "probe": "query",
            "attention.in_proj_weight": "attention.in_proj.weight",
            "attention.in_proj_bias": "attention.in_proj.bias",
            "attention.out_proj": "attention.o_proj",
            "mlp.fc1": "mlp.up_proj",
            "mlp.fc2": "mlp.down_proj",
        },
    ),
    *clip.body("vision_model"),
)
RULES = (*TEXT, *VISION)

# What files leave out of a half's config.
_SHARED = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}
TEXT_DEFAULTS = MappingProxyType(
    {"model_type": "siglip_text_model", "vocab_size": 32000, "max_position_embeddings": 64, **_SHARED}
)
VISION_DEFAULTS = MappingProxyType(
    {"model_type": "siglip_vision_model", "image_size": 224, "patch_size": 16, **_SHARED}
)


def read(r: Reader) -> ModelConfig:
    text = read_text(r.section("text_config", TEXT_DEFAULTS))
    vision = read_vision(r.section("vision_config", VISION_DEFAULTS))
    return clip.both(r, Contrast(text, vision, None, sigmoid=True))


def read_text(r: Reader) -> ModelConfig:
    pooler = Pooler("last", size=r.int("projection_size", r.int("hidden_size")))
    return clip.text_encoder(r, pre_norm_layers(r, layer_norm(r)), Heads(pooler=pooler))


def read_vision(r: Reader) -> ModelConfig:
    r.ignore("initializer_factor")
    norm = layer_norm(r)
    layers = pre_norm_layers(r, norm)
    pooler = None
    if r.bool("vision_use_head", True):
        pooler = Pooler(Probe(layers[0].attn, layers[0].mlp, norm))
    return image_encoder(
        r,
        layers=layers,
        patches=patches(r, prefix=0, flat=True),
        norm=norm,
        heads=Heads(pooler=pooler, pooled=("Model", "ForImageClassification"), pooling="patches"),
        kind="image tower",
    )
