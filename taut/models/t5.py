"""T5, with its first MLP or the gated one of 1.1 and Flan: RMSNorm, no scale, a bias of distances."""

from __future__ import annotations

from dataclasses import replace

from taut.config import (
    UNBOUNDED,
    Attn,
    Layer,
    Mlp,
    ModelConfig,
    Norm,
    Reader,
    Relative,
    activation,
    finish,
    pair,
)
from taut.errors import ConfigError
from taut.models.llama import tied
from taut.weights import Rename, Rule, renames

ARCHITECTURE = "T5ForConditionalGeneration"

ENCODER_ALONE = True  # transformers has a class for it

# Matrices that small formats never pack, in transformers' files as in ours: their sums are large.
DENSE = ("wo",)
# The table of tokens under each name that it goes by, and a bias that older files hold and nothing reads.
IGNORED = (
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
)


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """A block is a list of parts, each with its norm."""
    return (
        *_stack("encoder", config.layers[0].mlp.gated, 1),
        *_stack("decoder", config.layers[0].mlp.gated, 2),
        Rename("shared", "model.encoder.embed_tokens"),
    )


def _stack(stack: str, gated: bool, last: int) -> tuple[Rule, ...]:
    ours, block = f"model.{stack}.layers.{{}}", f"{stack}.block.{{}}"
    bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias"
    up = {"wi_0": "gate_proj", "wi_1": "up_proj"} if gated else {"wi": "up_proj"}
    attention = {letter: f"{letter}_proj" for letter in "qkvo"}
    parts = {
        "layer.0.layer_norm": "input_layernorm",
        "layer.0.SelfAttention": "self_attn",
        "layer.1.layer_norm": "pre_encoder_attention_layernorm",
        "layer.1.EncDecAttention": "encoder_attn",
        f"layer.{last}.layer_norm": "pre_feedforward_layernorm",
        f"layer.{last}.DenseReluDense": "mlp",
    }
    return (
        Rename(bias, f"model.{stack}.relative_bias"),
        Rename(f"{stack}.final_layer_norm", f"model.{stack}.norm"),
        *renames(f"{ours}.self_attn", attention),
        *renames(f"{ours}.encoder_attn", attention),
        *renames(f"{ours}.mlp", {**up, "wo": "down_proj"}),
        *(Rename(f"{block}.{disk}", f"{ours}.{own}") for disk, own in parts.items()),
    )


def read(r: Reader) -> ModelConfig:
    scaled = r.bool("scale_decoder_outputs", r.bool("tie_word_embeddings", True))
    return encoder_decoder(r, gated=False, scaled=scaled)


def encoder_decoder(r: Reader, *, gated: bool, scaled: bool) -> ModelConfig:
    """Both stacks; `gated`: whether the MLP is, where the config doesn't say; `scaled`: whether logits are
    those of hidden states divided by the square root of their dimension."""
    r.rename(hidden_size="d_model", num_hidden_layers="num_layers", num_attention_heads="num_heads")
    r.rename(intermediate_size="d_ff", head_dim="d_kv")
    r.ignore("n_positions", "max_position_embeddings")  # distances have no limit
    r.ignore("dropout_rate", "initializer_factor", "classifier_dropout", "output_past")
    r.ignore("dense_act_fn", "is_gated_act")  # what `feed_forward_proj` says
    heads, head_dim = r.int("num_attention_heads"), r.int("head_dim", 64)
    attn = Attn(
        heads=heads, kv_heads=heads, head_dim=head_dim, scale=1.0, rope=None, relative=relative(r, both=False)
    )
    mlp = _mlp(r, gated)
    norm = Norm(r.float("layer_norm_epsilon", 1e-6))
    layer = Layer(attn, mlp, pre_attn=norm, pre_mlp=norm)
    crossed = replace(layer, cross=replace(attn, relative=None, causal=False), pre_cross=norm)
    seeing = replace(layer, attn=replace(attn, relative=relative(r, both=True), causal=False))
    count = r.int("num_hidden_layers")
    config = finish(
        r,
        layers=[crossed] * r.int("num_decoder_layers", count),
        norm=norm,
        context=UNBOUNDED,
        tied=tied(r, default=True),
        logit_scale=r.int("hidden_size") ** -0.5 if scaled else None,
        wide=True,
        padding=None,
    )
    if config.decoder_start_token_id is None:
        config = replace(config, decoder_start_token_id=config.pad_token_id)
    return pair(config, [seeing] * count)


def relative(r: Reader, both: bool) -> Relative:
    buckets = r.int("relative_attention_num_buckets", 32, minimum=4)
    return Relative(buckets, r.int("relative_attention_max_distance", 128), both)


def _mlp(r: Reader, gated: bool) -> Mlp:
    """`feed_forward_proj` is an activation, or `gated-` and one; 1.1's "gated-gelu" means the tanh form."""
    said = r.str("feed_forward_proj", "gated-gelu" if gated else "relu")
    words = said.split("-")
    if len(words) > 2 or (len(words) == 2 and words[0] != "gated"):
        raise ConfigError(
            f"{r.source}: 'feed_forward_proj' is {said!r}; expected an activation, or 'gated-' and one"
        )
    name = "gelu_new" if said == "gated-gelu" else words[-1]
    act = activation(Reader({"feed_forward_proj": name}, r.source), "feed_forward_proj", default="relu")
    return Mlp(r.int("intermediate_size"), act, gated=len(words) == 2)
