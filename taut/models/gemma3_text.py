"""Gemma 3 (text): Gemma 2 with head norms for soft-caps, five layers with a window to one without, and a
rotary embedding for each kind."""

from __future__ import annotations

from dataclasses import replace

from taut.config import ModelConfig, Reader, Rope, activation, finish, rope, windows
from taut.models.llama import norm, pre_norm_layers, tied

ARCHITECTURE = "Gemma3ForCausalLM"
STEM = "Gemma3Text"  # of all its other classes

RULES = ()


def read(r: Reader) -> ModelConfig:
    r.only("use_bidirectional_attention", False)
    count = r.int("num_hidden_layers")
    bias = r.bool("attention_bias", False)
    period = r.int("sliding_window_pattern", 6)
    r.ignore("_sliding_window_pattern", "cache_implementation")
    types = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(count)]
    seen = windows(r, count, types)
    local, full = ropes(r, r.int("head_dim", 256))
    own = norm(r, offset=1.0)
    layers = pre_norm_layers(
        r,
        attn={
            "head_dim": r.int("head_dim", 256),
            "qkv_bias": bias,
            "out_bias": bias,
            "scale": r.float("query_pre_attn_scalar", 256.0) ** -0.5,
            "softcap": r.float("attn_logit_softcapping", None),
            "qk_norm": own,
        },
        act=activation(r, "hidden_activation", "hidden_act", default="gelu_tanh"),
        windows=seen,
        pre=own,
        ropes=[full if window is None else local for window in seen],
    )
    return finish(
        r,
        layers=[replace(layer, post_attn=own, post_mlp=own) for layer in layers],
        norm=own,
        tied=tied(r, default=True),
        embed_scale=r.int("hidden_size") ** 0.5,
        logit_softcap=r.float("final_logit_softcapping", None),
    )


def ropes(r: Reader, head_dim: int) -> tuple[Rope, Rope]:
    """The embedding of layers with a window, and of those without: a section each, or, in older files,
    `rope_local_base_freq` beside a `rope_theta` and `rope_scaling` that are the others' alone."""
    context, both = r.int("max_position_embeddings"), None
    if r.has("rope_parameters"):
        both = r.section("rope_parameters")
    empty = Reader({}, r.source)
    local = (both.section("sliding_attention") if both else None) or empty
    full = (both.section("full_attention") if both else r.section("rope_scaling")) or empty
    theta = r.float("rope_theta", 1_000_000.0)
    near = rope(empty, head_dim, context, r.float("rope_local_base_freq", 10_000.0), section=local)
    r.ignore("rope_parameters", "rope_scaling")
    return near, rope(empty, head_dim, context, theta, section=full)
