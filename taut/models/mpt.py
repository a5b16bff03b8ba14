"""MPT: ALiBi, LayerNorm without bias, a plain MLP, and queries, keys and values that may be clipped."""

from __future__ import annotations

import math

from taut.config import HOUSEKEEPING, ModelConfig, Norm, Reader, finish
from taut.models.llama import heads, pre_norm_layers, tied
from taut.weights import Fused, Rename, renames

ARCHITECTURE = "MptForCausalLM"

RULES = (
    Rename("transformer.wte", "model.embed_tokens"),
    Rename("transformer.norm_f", "model.norm"),
    Rename("transformer.blocks.{}", "model.layers.{}"),
    *renames(
        "transformer.blocks.{}",
        {
            "norm_1": "input_layernorm",
            "norm_2": "pre_feedforward_layernorm",
            "attn": "self_attn",
            "attn.out_proj": "attn.o_proj",
            "ffn": "mlp",
        },
    ),
    Fused("transformer.blocks.{}.attn.Wqkv", ("q_proj", "k_proj", "v_proj")),
)


def slopes(heads: int, most: float) -> tuple[float, ...]:
    """ALiBi's slopes as MPT takes them: every other one first, of the power of two above the heads, down to
    `2 ** -most`."""
    whole = 2 ** math.ceil(math.log2(heads))
    powers = [2.0 ** (-most * (i + 1) / whole) for i in range(whole)]
    return tuple(powers if whole == heads else (powers[1::2] + powers[::2])[:heads])


def read(r: Reader) -> ModelConfig:
    r.rename(
        hidden_size="d_model",
        num_hidden_layers="n_layers",
        num_attention_heads="n_heads",
        max_position_embeddings="max_seq_len",
    )
    r.only("no_bias", True)
    r.only("logit_scale")
    r.ignore(
        "init_device", "init_config", "norm_type", "verbose", "learned_pos_emb", "tokenizer_name", "name"
    )
    r.ignore("embedding_fraction")
    own = r.section("attn_config") or Reader({}, r.source)
    for key, value in (
        ("alibi", True),
        ("qk_ln", False),
        ("prefix_lm", False),
        ("attn_uses_sequence_id", False),
    ):
        own.only(key, value)
    own.only("attn_type", "multihead_attention")
    own.ignore("attn_impl", "dtype", *HOUSEKEEPING)
    usual = heads(r)
    norm = Norm(r.float("layer_norm_epsilon", 1e-5), kind="layer")
    layers = pre_norm_layers(
        r,
        attn={
            "rope": None,
            "scale": own.float("softmax_scale", usual["scale"]),
            "slopes": slopes(usual["heads"], own.float("alibi_bias_max", 8.0)),
            "clip": own.float("clip_qkv", None),
        },
        mlp={"hidden": r.int("expansion_ratio", 4) * r.int("hidden_size"), "gated": False},
        act="gelu",
        pre=norm,
    )
    return finish(
        r,
        layers=layers,
        norm=norm,
        tied=tied(r, default=True),
        padding=None,
    )
