"""BART, and what encoder-decoders like it share: learned positions, LayerNorm behind each part of a block."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from taut.config import Attn, Layer, Mlp, ModelConfig, Norm, Positions, Reader, activation, finish, pair
from taut.models.llama import tied
from taut.weights import Rename, Rule, renames

ARCHITECTURE = "BartForConditionalGeneration"

# A version, and the table of tokens under each name that it goes by.
IGNORED = (
    *("*encoder.version", "*decoder.version"),
    *("*shared.weight", "*encoder.embed_tokens.weight", "*decoder.embed_tokens.weight"),
)

NORM = Norm(1e-5, kind="layer", bias=True)


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """A norm has one name wherever it stands."""
    behind = config.layers[0].pre_attn is None
    names = {
        "self_attn.out_proj": "self_attn.o_proj",
        "self_attn_layer_norm": "after_attention_layernorm" if behind else "input_layernorm",
        "encoder_attn.out_proj": "encoder_attn.o_proj",
        "encoder_attn_layer_norm": f"{'after' if behind else 'pre'}_encoder_attention_layernorm",
        "fc1": "mlp.up_proj",
        "fc2": "mlp.down_proj",
        "final_layer_norm": f"{'after' if behind else 'pre'}_feedforward_layernorm",
    }
    stacks = ("model.encoder", "model.decoder")
    return (
        *(rule for stack in stacks for rule in renames(f"{stack}.layers.{{}}", names)),
        *(Rename(f"{stack}.layernorm_embedding", f"{stack}.embed_layernorm") for stack in stacks),
        *(Rename(f"{stack}.layer_norm", f"{stack}.norm") for stack in stacks),
        *([Rename("model.shared", "model.encoder.embed_tokens")] if config.pairing.shared else []),
    )


def read(r: Reader) -> ModelConfig:
    return encoder_decoder(r, before=False, pairing={"repeats": True}, embed_norm=NORM)


def encoder_decoder(
    r: Reader, *, before: bool, pairing: dict[str, Any], start: int | None = 2, **fields: Any
) -> ModelConfig:
    """The two stacks of BART's relatives. Norms stand `before` each part of a block or behind it; `start` is
    the start token of a config that names none; `pairing` and `fields` are those of the configs."""
    names(r)
    # How training went, and how fairseq, where these models come from, describes what a family is.
    r.ignore("encoder_layerdrop", "decoder_layerdrop", "init_std", "num_hidden_layers", "layerdrop", "prefix")
    r.ignore("normalize_before", "normalize_embedding", "add_final_layer_norm", "add_bias_logits")
    r.ignore("static_position_embeddings", "extra_pos_embeddings", "force_bos_token_to_be_generated")
    r.ignore("classif_dropout", "output_past", "save_step", "do_blenderbot_90_layernorm", "_num_labels")
    context, encoder = r.int("max_position_embeddings", 1024), layers(r, "encoder", before)
    usual = {
        "layers": layers(r, "decoder", before),
        "norm": None,
        "tied": tied(r, default=True),
        "positions": Positions(context, offset=2),
        "context": context,
        "embed_scale": embed_scale(r),
        "head_bias": True,
    }
    config = finish(r, **(usual | fields))
    if config.decoder_start_token_id is None:
        config = replace(config, decoder_start_token_id=start)
    return pair(config, encoder, **pairing)


def names(r: Reader) -> None:
    """What these files call keys that others call by the usual name; where stacks differ, the encoder's."""
    r.rename(hidden_size="d_model", num_hidden_layers="encoder_layers", intermediate_size="encoder_ffn_dim")
    r.rename(num_attention_heads="encoder_attention_heads")


def embed_scale(r: Reader) -> float | None:
    return math.sqrt(r.int("hidden_size")) if r.bool("scale_embedding", False) else None


def layers(r: Reader, stack: str, before: bool) -> list[Layer]:
    """The blocks of one stack: the decoder's attend to the encoder too."""
    dim, heads = r.int("hidden_size"), r.divisor("num_attention_heads", r.int("hidden_size"))
    hidden, count = r.int("intermediate_size"), r.int("num_hidden_layers")
    if stack == "decoder":
        heads = r.int("decoder_attention_heads", heads)
        hidden, count = r.int("decoder_ffn_dim", hidden), r.int("decoder_layers", count)
    attn = Attn(
        heads=heads,
        kv_heads=heads,
        head_dim=dim // heads,
        scale=(dim // heads) ** -0.5,
        rope=None,
        qkv_bias=True,
        out_bias=True,
        causal=stack == "decoder",
    )
    act = activation(r, "activation_function", default="gelu")
    mlp = Mlp(hidden, act, bias=True, gated=False)
    pre, after = (NORM, None) if before else (None, NORM)
    layer = Layer(attn, mlp, pre_attn=pre, pre_mlp=pre, after_attn=after, after_mlp=after)
    if stack == "decoder":
        layer = replace(layer, cross=replace(attn, causal=False), pre_cross=pre, after_cross=after)
    return [layer] * count
