"""Llama 1 to 3, and every family that differs from it by what its config says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from taut.config import Attn, Layer, Mlp, ModelConfig, Norm, Reader, Rope, activation, finish, rope
from taut.weights import Rename

ARCHITECTURE = "LlamaForCausalLM"

# Llama calls the norm before the MLP after what it follows; the block calls it after what it precedes.
RULES = (Rename("model.layers.{}.post_attention_layernorm", "model.layers.{}.pre_feedforward_layernorm"),)


def read(r: Reader) -> ModelConfig:
    bias = r.bool("attention_bias", False)
    layers = pre_norm_layers(
        r, attn={"qkv_bias": bias, "out_bias": bias}, mlp={"bias": r.bool("mlp_bias", False)}
    )
    return finish(r, layers=layers, norm=norm(r), tied=tied(r))


def tied(r: Reader, default: bool = False) -> bool:
    return r.bool("tie_word_embeddings", default)


def norm(r: Reader, default: float = 1e-6, **changes: Any) -> Norm:
    return Norm(r.float("rms_norm_eps", default), **changes)


def heads(r: Reader) -> dict[str, Any]:
    """Head counts and size, and the usual scale."""
    count = r.int("num_attention_heads")
    head_dim = r.int("head_dim", None) or r.int("hidden_size") // count
    return {
        "heads": count,
        "kv_heads": r.divisor("num_key_value_heads", count),
        "head_dim": head_dim,
        "scale": head_dim**-0.5,
    }


def rotary(r: Reader, **defaults: float) -> Rope:
    """The rotary embedding, with its family's `defaults`."""
    return rope(r, heads(r)["head_dim"], r.int("max_position_embeddings"), **defaults)


def pre_norm_layers(
    r: Reader,
    *,
    attn: dict[str, Any] | None = None,
    mlp: dict[str, Any] | None = None,
    windows: Sequence[int | None] | None = None,
    ropes: Sequence[Rope | None] | None = None,
    act: str | None = None,
    pre: Norm | None = None,
) -> list[Layer]:
    """The layers of a Llama: RMSNorm before attention and before a gated MLP. `attn` and `mlp` change
    fields of every layer; `windows` and `ropes` give one value a layer; `act` stands for `hidden_act` and
    `pre` for the norms."""
    count = r.int("num_hidden_layers")
    shared = heads(r) | (attn or {})
    if ropes is None and "rope" not in shared:
        shared["rope"] = rotary(r)
    pre = pre or norm(r)
    feed = dict(mlp or {})
    feed["hidden"] = feed.get("hidden") or r.int("intermediate_size")
    feed["act"] = act or activation(r, "hidden_act", default="silu")
    layers = []
    for index in range(count):
        own = dict(shared)
        if windows is not None:
            own["window"] = windows[index]
        if ropes is not None:
            own["rope"] = ropes[index]
        layers.append(Layer(Attn(**own), Mlp(**feed), pre_attn=pre, pre_mlp=pre))
    return layers
