"""ViT, and what image encoders like it share: pre-norm blocks over patches behind a token of the class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from taut.config import (
    Attn,
    Heads,
    Layer,
    Mlp,
    ModelConfig,
    Norm,
    Patches,
    Pooler,
    Reader,
    Transform,
    activation,
    finish,
)
from taut.errors import ConfigError
from taut.weights import Rename, Rule, renames

ARCHITECTURE = "ViTForImageClassification"

IGNORED = ("*embeddings.mask_token",)  # of pre-training


def body(prefix: str, tokens: Sequence[str] = ("cls_token",)) -> tuple[Rule, ...]:
    """The names of embeddings and blocks in files, inside `prefix`; `tokens` are those ahead of the
    patches."""
    return (
        *_around(tokens),
        Rename("model.encoder.layer.{}", "model.layers.{}"),
        *renames(
            "model.encoder.layer.{}",
            {
                "attention.attention.query": "self_attn.q_proj",
                "attention.attention.key": "self_attn.k_proj",
                "attention.attention.value": "self_attn.v_proj",
                "attention.output.dense": "self_attn.o_proj",
                "layernorm_before": "input_layernorm",
                "layernorm_after": "pre_feedforward_layernorm",
                "intermediate.dense": "mlp.up_proj",
                "output.dense": "mlp.down_proj",
            },
        ),
        Rename(prefix, "model"),
    )


def module_body(
    prefix: str, tokens: Sequence[str] = ("cls_token",), *, gated: bool = False
) -> tuple[Rule, ...]:
    """Those of transformers' modules; a `gated` MLP's are Taut's too."""
    names = {
        "attention": "self_attn",
        "layernorm_before": "input_layernorm",
        "layernorm_after": "pre_feedforward_layernorm",
    }
    mlp = {} if gated else {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
    return (*_around(tokens), *renames("model.layers.{}", names | mlp), Rename(prefix, "model"))


def _around(tokens: Sequence[str]) -> tuple[Rule, ...]:
    """What is around the blocks."""
    return (
        *renames("model", {f"embeddings.{name}": f"prefix.{index}" for index, name in enumerate(tokens)}),
        *renames(
            "model",
            {
                "embeddings.mask_token": "hidden_token",
                "embeddings.position_embeddings": "positions",
                "embeddings.patch_embeddings.projection": "patch_embeddings",
                "layernorm": "norm",
            },
        ),
    )


POOLER = Rename("model.pooler.dense", "model.pooler.after.dense")
RULES = (POOLER, *body("vit"))
MODULES = (POOLER, *module_body("vit"))


def read(r: Reader) -> ModelConfig:
    return vit(r)


def vit(r: Reader, prefix: int = 1) -> ModelConfig:
    """ViT's config, with so many tokens ahead of the patches."""
    r.ignore("encoder_stride")
    act = activation(r, "pooler_act", default="tanh")
    pooler = Pooler("first", Transform(act), r.int("pooler_output_size", None))
    return image_encoder(
        r,
        layers=pre_norm_layers(r, layer_norm(r), qkv_bias=r.bool("qkv_bias", True)),
        patches=patches(r, prefix=prefix),
        norm=layer_norm(r),
        heads=Heads(pooler=pooler, pooled=("Model",)),
    )


def image_encoder(r: Reader, *, layers: Sequence[Layer], patches: Patches, **fields: Any) -> ModelConfig:
    """The config of an image encoder; `fields` are those of `ModelConfig`."""
    r.ignore(
        "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "semantic_loss_ignore_index"
    )
    # What a backbone gives to models built on it.
    r.ignore("stage_names", "out_features", "out_indices", "apply_layernorm", "reshape_hidden_states")
    return finish(
        r,
        layers=layers,
        patches=patches,
        vocab_size=0,
        context=patches.tokens,
        padding=None,
        tied=False,
        **fields,
    )


def patches(r: Reader, image: int = 224, size: int = 16, **changes: Any) -> Patches:
    """How pictures become tokens; `image` and `size` are the family's defaults, `changes` to `Patches`."""
    found = Patches(_edges(r, "image_size", image), _edges(r, "patch_size", size), r.int("num_channels", 3))
    if min(found.grid) < 1:
        raise ConfigError(
            f"{r.source}: 'patch_size' is {found.size}, larger than 'image_size', which is {found.image}"
        )
    return replace(found, **changes)


def _edges(r: Reader, key: str, default: int) -> tuple[int, int]:
    """Height and width in pixels, from one number or two."""
    if isinstance(r.value(key), (list, tuple)):
        edges = r.list(key, length=2)
        if not all(isinstance(edge, int) and edge > 0 for edge in edges):
            raise ConfigError(f"{r.source}: {key!r} is {edges!r}; expected two integers >= 1")
        return edges[0], edges[1]
    edge = r.int(key, default)
    return edge, edge


def layer_norm(r: Reader, default: float = 1e-12) -> Norm:
    return Norm(r.float("layer_norm_eps", default), kind="layer", bias=True)


def pre_norm_layers(
    r: Reader,
    norm: Norm,
    *,
    qkv_bias: bool = True,
    mlp: Mlp | None = None,
    act: str = "gelu",
    hidden: int | None = None,
    **attn: Any,
) -> list[Layer]:
    """Blocks that see the whole row, with a norm before each half; `mlp` in place of a plain one of `hidden`
    features and by default the activation `act`, `attn` changes to `Attn`."""
    dim, heads = r.int("hidden_size"), r.divisor("num_attention_heads", r.int("hidden_size"))
    given = {
        "heads": heads,
        "kv_heads": heads,
        "head_dim": dim // heads,
        "scale": (dim // heads) ** -0.5,
        "rope": None,
        "qkv_bias": qkv_bias,
        "out_bias": True,
        "causal": False,
    }
    if mlp is None:
        hidden = hidden or r.int("intermediate_size")
        mlp = Mlp(hidden, activation(r, "hidden_act", default=act), bias=True, gated=False)
    layer = Layer(Attn(**(given | attn)), mlp, pre_attn=norm, pre_mlp=norm)
    return [layer] * r.int("num_hidden_layers")
