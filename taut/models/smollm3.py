"""SmolLM3: Llama with some layers that don't rotate, and a window in those where asked."""

from __future__ import annotations

from taut.config import ModelConfig, Reader, finish, windows
from taut.models.llama import RULES, norm, pre_norm_layers, rotary, tied

ARCHITECTURE = "SmolLM3ForCausalLM"

__all__ = ["RULES", "read"]


def read(r: Reader) -> ModelConfig:
    count = r.int("num_hidden_layers")
    interval = r.int("no_rope_layer_interval", 4)
    rotates = r.list("no_rope_layers", [int((i + 1) % interval != 0) for i in range(count)], length=count)
    sliding = r.bool("use_sliding_window", False) and r.has("sliding_window")
    types = ["sliding_attention" if sliding and not rotates[i] else "full_attention" for i in range(count)]
    bias = r.bool("attention_bias", False)
    rope = rotary(r)
    layers = pre_norm_layers(
        r,
        attn={"qkv_bias": bias, "out_bias": bias},
        mlp={"bias": r.bool("mlp_bias", False)},
        windows=windows(r, count, types),
        ropes=[rope if rotates[i] else None for i in range(count)],
    )
    return finish(r, layers=layers, norm=norm(r), tied=tied(r, default=True))
