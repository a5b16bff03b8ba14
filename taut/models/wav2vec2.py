"""Wav2Vec2, and what speech encoders like it share: convolutions over the waveform, then blocks over
frames."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from taut.config import (
    UNBOUNDED,
    Ctc,
    Heads,
    Layer,
    ModelConfig,
    Norm,
    Reader,
    Waves,
    activation,
    finish,
)
from taut.errors import ConfigError
from taut.models.vit import pre_norm_layers
from taut.weights import Rename, Rule, renames

ARCHITECTURE = "Wav2Vec2ForCTC"

# Of pre-training.
IGNORED = ("quantizer.*", "project_hid.*", "project_q.*", "dropout_features.*")

BODY = (
    *renames(
        "model",
        {
            "masked_spec_embed": "hidden_token",
            "feature_extractor.conv_layers.{}.conv.weight": "feature_extractor.conv_layers.{}.weight",
            "feature_extractor.conv_layers.{}.conv.bias": "feature_extractor.conv_layers.{}.bias",
            "feature_projection.layer_norm": "feature_norm",
            "encoder.pos_conv_embed.conv": "pos_conv_embed",
        },
    ),
    Rename("model.feature_projection.projection.weight", "model.feature_projection.weight"),
    Rename("model.feature_projection.projection.bias", "model.feature_projection.bias"),
    *renames(
        "model.encoder.pos_conv_embed.conv",
        {"parametrizations.weight.original0": "length", "parametrizations.weight.original1": "direction"},
    ),
)


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    return speech_rules(config, "wav2vec2")


def speech_rules(config: ModelConfig, prefix: str) -> tuple[Rule, ...]:
    """A norm has one name wherever it stands."""
    before = config.layers[0].pre_attn is not None
    names = {
        "attention": "self_attn",
        "attention.out_proj": "attention.o_proj",
        "layer_norm": "input_layernorm" if before else "after_attention_layernorm",
        "final_layer_norm": "pre_feedforward_layernorm" if before else "after_feedforward_layernorm",
        "feed_forward.intermediate_dense": "mlp.up_proj",
        "feed_forward.output_dense": "mlp.down_proj",
    }
    return (
        *BODY,
        *renames("model.layers.{}", names),
        Rename("model.encoder.layers.{}", "model.layers.{}"),
        Rename("model.encoder.layer_norm", "model.norm" if before else "model.embed_layernorm"),
        Rename(prefix, "model"),
    )


def read(r: Reader) -> ModelConfig:
    return speech_encoder(r, waves(r))


def speech_encoder(r: Reader, made: Waves, *, reduction: str = "sum", **attn: Any) -> ModelConfig:
    """The config of a speech encoder; `reduction` is the family's default for its loss, `attn` changes
    `Attn`."""
    r.only("add_adapter", False)
    r.only("adapter_attn_dim")
    r.ignore("adapter_kernel_size", "adapter_stride", "num_adapter_layers", "output_hidden_size")
    # Of training: what is dropped and hidden, and what a model learns before it is tuned.
    r.ignore("feat_proj_dropout", "feat_quantizer_dropout", "feat_extract_dropout", "final_dropout")
    r.ignore("layerdrop", "apply_spec_augment", "mask_time_length", "mask_time_min_masks")
    r.ignore("mask_feature_length", "mask_feature_min_masks", "num_codevectors_per_group")
    r.ignore("num_codevector_groups", "codevector_dim", "contrastive_logits_temperature", "num_negatives")
    r.ignore("proj_codevector_dim", "diversity_loss_weight", "tdnn_dim", "tdnn_kernel", "tdnn_dilation")
    r.ignore("xvector_output_dim", "num_ctc_classes")
    r.ignore("num_feat_extract_layers", "gradient_checkpointing")
    # What the first files say of it besides.
    r.ignore("freeze_feat_extract_train", "replace_prob", "no_mask_channel_overlap", "no_mask_time_overlap")
    r.ignore(*(f"mask_channel_{name}" for name in ("length", "min_space", "other", "prob", "selection")))
    r.ignore("mask_time_min_space", "mask_time_other", "mask_time_selection")
    norm = Norm(r.float("layer_norm_eps", 1e-5), kind="layer", bias=True)
    before = r.bool("do_stable_layer_norm", False)
    layers = pre_norm_layers(r, norm, **attn)
    if not before:
        layers = [_behind(layer) for layer in layers]
    return finish(
        r,
        layers=layers,
        norm=norm if before else None,
        embed_norm=None if before else norm,
        waves=made,
        context=UNBOUNDED,
        padding=None,
        tied=False,
        heads=Heads(
            projection=r.int("classifier_proj_size", 256),
            all_layers=r.bool("use_weighted_layer_sum", False),
            ctc=Ctc(
                r.choice("ctc_loss_reduction", ("sum", "mean"), reduction),
                r.bool("ctc_zero_infinity", False),
            ),
        ),
    )


def _behind(layer: Layer) -> Layer:
    return replace(layer, pre_attn=None, pre_mlp=None, after_attn=layer.pre_attn, after_mlp=layer.pre_mlp)


def waves(r: Reader, *, normed: bool = True, features_given: bool = True) -> Waves:
    """How waveforms become frames; `normed`: these are, before they are projected."""
    channels = _numbers(r, "conv_dim", (512,) * 7)
    kernels = _numbers(r, "conv_kernel", (10, 3, 3, 3, 3, 2, 2))
    strides = _numbers(r, "conv_stride", (5, 2, 2, 2, 2, 2, 2))
    if not len(channels) == len(kernels) == len(strides):
        raise ConfigError(
            f"{r.source}: 'conv_dim', 'conv_kernel' and 'conv_stride' have {len(channels)}, {len(kernels)} "
            f"and {len(strides)} entries; expected one a convolution"
        )
    dim = r.int("hidden_size")
    groups = r.int("num_conv_pos_embedding_groups", 16)
    if dim % groups:
        raise ConfigError(
            f"{r.source}: 'num_conv_pos_embedding_groups' is {groups}, which does not divide {dim}"
        )
    hides = [r.float(f"mask_{what}_prob", default, positive=False) for what, default in _HIDDEN.items()]
    return Waves(
        channels,
        kernels,
        strides,
        bias=r.bool("conv_bias", False),
        act=activation(r, "feat_extract_activation", default="gelu"),
        normed=r.choice("feat_extract_norm", ("group", "layer"), "group"),
        norm=Norm(r.float("layer_norm_eps", 1e-5), kind="layer", bias=True) if normed else None,
        positions=(r.int("num_conv_pos_embeddings", 128), groups),
        hidden=any(share > 0 for share in hides),
        features_given=features_given,
    )


_HIDDEN = {"time": 0.05, "feature": 0.0}


def _numbers(r: Reader, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    values = r.list(key, default)
    if not values or not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values):
        raise ConfigError(f"{r.source}: {key!r} is {values!r}; expected integers >= 1")
    return tuple(values)
