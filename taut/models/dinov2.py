"""DINOv2: ViT with a learned factor behind each half, perhaps a gated MLP, and positions for every size."""

from __future__ import annotations

from dataclasses import replace

from taut.config import Heads, LayerScale, Mlp, ModelConfig, Pooler, Reader
from taut.models.vit import body, image_encoder, layer_norm, module_body, patches, pre_norm_layers
from taut.weights import Fused, Rename, Rule, renames

ARCHITECTURE = "Dinov2ForImageClassification"


_LAYER = "model.layers.{}"
# Names of its own inside a block.
_OWN = renames(
    _LAYER,
    {
        "norm1": "input_layernorm",
        "norm2": "pre_feedforward_layernorm",
        "layer_scale1.lambda1": "post_attention_layernorm.weight",
        "layer_scale2.lambda1": "post_feedforward_layernorm.weight",
    },
)


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """A gated MLP's two first matrices are one."""
    if config.layers[0].mlp.gated:
        mlp = (
            Fused(f"{_LAYER}.mlp.weights_in", ("gate_proj", "up_proj")),
            Rename(f"{_LAYER}.mlp.weights_out", f"{_LAYER}.mlp.down_proj"),
        )
    else:
        mlp = renames(f"{_LAYER}.mlp", {"fc1": "up_proj", "fc2": "down_proj"})
    return (*_OWN, *mlp, *body("dinov2"))


def modules(config: ModelConfig) -> tuple[Rule, ...]:
    """Where they are two."""
    found = module_body("dinov2", gated=config.layers[0].mlp.gated)
    return (*_OWN, *found, Rename("dinov2.encoder.layer.{}", "dinov2.layers.{}"))


def read(r: Reader) -> ModelConfig:
    hidden = int(r.int("hidden_size") * r.float("mlp_ratio", 4.0))
    mlp = None
    if r.bool("use_swiglu_ffn", False):
        mlp = Mlp((int(hidden * 2 / 3) + 7) // 8 * 8, "silu", bias=True)
        r.ignore("hidden_act")
    r.ignore("intermediate_size")
    norm = layer_norm(r, 1e-6)
    scale = LayerScale(r.float("layerscale_value", 1.0))
    layers = pre_norm_layers(r, norm, qkv_bias=r.bool("qkv_bias", True), mlp=mlp, hidden=hidden)
    return image_encoder(
        r,
        layers=[replace(layer, post_attn=scale, post_mlp=scale) for layer in layers],
        patches=patches(r, size=14, elastic=True, hidden=1 if r.bool("use_mask_token", True) else None),
        norm=norm,
        heads=Heads(
            pooler=Pooler("first"),
            pooled=("Model", "ForImageClassification"),
            pooling="first, patches",
        ),
    )
