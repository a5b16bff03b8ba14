"""CLIP: an encoder of images and a causal one of texts, whose vectors are compared."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from taut.config import Contrast, Heads, Layer, ModelConfig, Pooler, Positions, Reader, finish
from taut.models.vit import image_encoder, layer_norm, patches, pre_norm_layers
from taut.weights import Rename, Rule, renames

ARCHITECTURE = "CLIPModel"

IGNORED = ("*.position_ids",)


def body(module: str) -> tuple[Rule, ...]:
    """The names of blocks inside `module`."""
    return (
        *renames(
            f"{module}.layers.{{}}",
            {
                "layer_norm1": "input_layernorm",
                "layer_norm2": "pre_feedforward_layernorm",
                "self_attn.out_proj": "self_attn.o_proj",
                "mlp.fc1": "mlp.up_proj",
                "mlp.fc2": "mlp.down_proj",
            },
        ),
        Rename(f"{module}.encoder.layers.{{}}", f"{module}.layers.{{}}"),
    )


TEXT = (
    *renames(
        "text_model",
        {
            "embeddings.token_embedding": "embed_tokens",
            "embeddings.position_embedding": "embed_positions",
            "final_layer_norm": "norm",
        },
    ),
    *body("text_model"),
)
VISION = (
    *renames(
        "vision_model",
        {
            "embeddings.class_embedding": "prefix.0",
            "embeddings.patch_embedding": "patch_embeddings",
            "embeddings.position_embedding.weight": "positions",
            "pre_layrnorm": "embed_layernorm",
            "post_layernorm": "pooler.after",
        },
    ),
    *body("vision_model"),
)
RULES = (*TEXT, *VISION)


# What files leave out of a half's config.
_SHARED = {"num_hidden_layers": 12, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu", "projection_dim": 512}
TEXT_DEFAULTS = MappingProxyType(
    {
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "eos_token_id": 49407,
        **_SHARED,
    }
)
VISION_DEFAULTS = MappingProxyType(
    {
        "model_type": "clip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        **_SHARED,
    }
)


def read(r: Reader) -> ModelConfig:
    r.ignore("logit_scale_init_value", "text_config_dict", "vision_config_dict")
    text = read_text(r.section("text_config", TEXT_DEFAULTS))
    vision = read_vision(r.section("vision_config", VISION_DEFAULTS))
    return both(r, Contrast(text, vision, r.int("projection_dim", 512), sigmoid=False))


def both(r: Reader, contrast: Contrast) -> ModelConfig:
    """The config of a model with these two halves."""
    r.ignore("initializer_factor")
    text = contrast.text
    return finish(
        r,
        layers=text.layers,
        norm=text.norm,
        vocab_size=text.vocab_size,
        dim=text.dim,
        context=text.context,
        padding=None,
        tied=False,
        contrast=contrast,
    )


def read_text(r: Reader) -> ModelConfig:
    # Before transformers 4.31 configs said 2, and texts ended at their highest id.
    pooler = Pooler("highest" if r.ids("eos_token_id") == (2,) else "eos")
    layers = pre_norm_layers(r, layer_norm(r), causal=True)
    return text_encoder(r, layers, Heads(pooler=pooler, projection=r.int("projection_dim", 512)))


def text_encoder(r: Reader, layers: Sequence[Layer], heads: Heads) -> ModelConfig:
    """The texts' half of such a model."""
    r.ignore("initializer_factor")
    return finish(
        r,
        layers=layers,
        norm=layer_norm(r),
        tied=False,
        positions=Positions(r.int("max_position_embeddings")),
        heads=heads,
        kind="text tower",
        padding=None,
    )


def read_vision(r: Reader) -> ModelConfig:
    r.ignore("initializer_factor")
    norm = layer_norm(r)
    return image_encoder(
        r,
        layers=pre_norm_layers(r, norm),
        patches=patches(r, bias=False, flat=True),
        norm=None,
        embed_norm=norm,
        heads=Heads(
            pooler=Pooler("first", norm),
            pooled=("Model", "ModelWithProjection", "ForImageClassification"),
            pooling="patches",
            projection=r.int("projection_dim", 512),
        ),
        kind="image tower",
    )
