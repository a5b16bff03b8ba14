"""ModernBERT: pre-norm blocks with rotation and a gated MLP, most layers with a window on both sides."""

from __future__ import annotations

from dataclasses import replace

from taut.config import (
    Attn,
    Heads,
    Layer,
    Mlp,
    ModelConfig,
    Norm,
    Reader,
    Rope,
    Transform,
    activation,
    finish,
    rope,
    windows,
)
from taut.weights import Fused, Rename, renames

ARCHITECTURE = "ModernBertForMaskedLM"

IGNORED = ("decoder.weight",)  # tied
RULES = (
    Rename("model.embeddings.tok_embeddings", "model.embed_tokens"),
    Rename("model.embeddings.norm", "model.embed_layernorm"),
    Rename("model.final_norm", "model.norm"),
    *renames(
        "model.layers.{}",
        {
            "attn_norm": "input_layernorm",
            "attn": "self_attn",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp.Wo": "mlp.down_proj",
        },
    ),
    Fused("model.layers.{}.attn.Wqkv", ("q_proj", "k_proj", "v_proj")),
    Rename("model.layers.{}.attn.Wo", "model.layers.{}.attn.o_proj"),
    Fused("model.layers.{}.mlp.Wi", ("gate_proj", "up_proj")),
    # What stands before the last product is called alike under every head, and so is that product of most.
    *(
        Rename(theirs, f"{head}.{ours}")
        for head in ("lm_head", "classifier", "qa_outputs")
        for theirs, ours in (("head.dense", "dense"), ("head.norm", "layer_norm"))
    ),
    Rename("decoder.bias", "lm_head.bias"),
    Rename("classifier", "classifier.out_proj"),
    Rename("classifier", "qa_outputs.out_proj"),
)


def read(r: Reader) -> ModelConfig:
    r.ignore(
        *("mlp_dropout", "embedding_dropout", "initializer_cutoff_factor", "deterministic_flash_attn"),
        *("sparse_prediction", "sparse_pred_ignore_index", "reference_compile", "repad_logits_with_grad"),
        *("cls_token_id", "sep_token_id", "position_embedding_type", "layer_norm_eps"),
    )
    norm = Norm(r.float("norm_eps", 1e-5), kind="layer", bias=r.bool("norm_bias", False))
    head = Transform(
        activation(r, "classifier_activation", default="gelu"), norm, r.bool("classifier_bias", False)
    )
    pooling = r.choice("classifier_pooling", {"cls": "first", "mean": "mean"}, "cls")
    return finish(
        r,
        layers=layers(r, norm),
        norm=norm,
        embed_norm=norm,
        heads=Heads(masked=head, sequence=head, token=head, span=head, pooling=pooling),
        head_bias=r.bool("decoder_bias", True),
        tied=r.bool("tie_word_embeddings", True),
    )


def layers(r: Reader, norm: Norm) -> list[Layer]:
    """Pre-norm blocks, of which the first finds the embedding normed already."""
    dim, count = r.int("hidden_size"), r.int("num_hidden_layers")
    heads = r.divisor("num_attention_heads", dim)
    head_dim, bias = dim // heads, r.bool("attention_bias", False)
    near, full = ropes(r, head_dim)
    attn = Attn(
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=full,
        qkv_bias=bias,
        out_bias=bias,
        causal=False,
    )
    act = activation(r, "hidden_activation", default="gelu")
    mlp = Mlp(r.int("intermediate_size"), act, bias=r.bool("mlp_bias", False))
    r.rename(sliding_window="local_attention")
    every = r.int("global_attn_every_n_layers", 3)
    types = ["sliding_attention" if i % every else "full_attention" for i in range(count)]
    found = []
    for index, window in enumerate(windows(r, count, types)):
        # Half of a window lies on either side of a query.
        own = attn if window is None else replace(attn, rope=near, window=window // 2 + 1)
        found.append(Layer(own, mlp, pre_attn=norm if index else None, pre_mlp=norm))
    return found


def ropes(r: Reader, head_dim: int) -> tuple[Rope, Rope]:
    """The embedding of layers with a window, and of those without: a section each, or, in older files, a
    `local_rope_theta` and a `global_rope_theta`."""
    context, empty = r.int("max_position_embeddings"), Reader({}, r.source)
    both = r.section("rope_parameters") or empty
    near, full = r.float("local_rope_theta", 10_000.0), r.float("global_rope_theta", 160_000.0)
    return (
        rope(empty, head_dim, context, near, section=both.section("sliding_attention") or empty),
        rope(empty, head_dim, context, full, section=both.section("full_attention") or empty),
    )
