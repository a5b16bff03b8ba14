"""BEiT: ViT with a bias of the distance between patches and a learned factor behind each half."""

from __future__ import annotations

from dataclasses import replace

from taut.config import Grid, Heads, LayerScale, ModelConfig, Pooler, Reader
from taut.errors import ConfigError
from taut.models.vit import body, image_encoder, layer_norm, module_body, patches, pre_norm_layers
from taut.weights import Rename, renames

ARCHITECTURE = "BeitForImageClassification"

IGNORED = ("*.relative_position_index",)  # by which the bias is looked up

_TABLE = "relative_position_bias_table"
_OWN = (
    *renames(
        "model.layers.{}",
        {
            "lambda_1": "post_attention_layernorm.weight",
            "lambda_2": "post_feedforward_layernorm.weight",
        },
    ),
    Rename("model.pooler.layernorm", "model.pooler.after"),
)
RULES = (
    *_OWN,
    Rename(
        f"model.layers.{{}}.attention.attention.relative_position_bias.{_TABLE}",
        "model.layers.{}.self_attn.grid_bias.weight",
    ),
    Rename(f"model.encoder.relative_position_bias.{_TABLE}", "model.grid_bias.weight"),
    *body("beit"),
)
MODULES = (
    *_OWN,
    Rename(
        f"model.layers.{{}}.relative_position_bias.{_TABLE}", "model.layers.{}.self_attn.grid_bias.weight"
    ),
    Rename(f"model.shared_position_bias.{_TABLE}", "model.grid_bias.weight"),
    *module_body("beit"),
)


def read(r: Reader) -> ModelConfig:
    r.ignore("vocab_size", "layer_scale_init_value")
    r.ignore("pool_scales", "use_auxiliary_head", "auxiliary_loss_weight", "auxiliary_channels")
    r.ignore("auxiliary_num_convs", "auxiliary_concat_input", "add_fpn", "segmentation_indices")
    norm, mean = layer_norm(r), r.bool("use_mean_pooling", True)
    pictures = patches(
        r,
        positions=r.bool("use_absolute_position_embeddings", False),
        elastic=True,
        hidden=2 if r.bool("use_mask_token", False) else None,
    )
    own, shared = (
        r.bool("use_relative_position_bias", False),
        r.bool("use_shared_relative_position_bias", False),
    )
    if own and shared:
        raise ConfigError(
            f"{r.source}: 'use_relative_position_bias' and 'use_shared_relative_position_bias' are both "
            "true; only one of them may be"
        )
    grid = Grid(pictures.grid, shared) if own or shared else None
    layers = pre_norm_layers(r, norm, k_bias=False, grid=grid)
    factor = r.float("layer_scale_init_value", 0.1, positive=False)
    if factor > 0:
        scale = LayerScale(factor)
        layers = [replace(layer, post_attn=scale, post_mlp=scale) for layer in layers]
    return image_encoder(
        r,
        layers=layers,
        patches=pictures,
        norm=None if mean else norm,
        heads=Heads(
            pooler=Pooler("patches", norm) if mean else Pooler("first"),
            pooled=("Model", "ForImageClassification"),
            pooling="pooler",
        ),
    )
