"""Phi-3 and Phi-4-mini: Llama whose files hold q, k, v and gate, up fused."""

from __future__ import annotations

from taut.config import ModelConfig, Reader, finish
from taut.models.llama import RULES as LLAMA
from taut.models.llama import norm, pre_norm_layers, tied
from taut.weights import Fused

ARCHITECTURE = "Phi3ForCausalLM"

RULES = (
    *LLAMA,
    Fused("model.layers.{}.self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")),
    Fused("model.layers.{}.mlp.gate_up_proj", ("gate_proj", "up_proj")),
)


def read(r: Reader) -> ModelConfig:
    layers = pre_norm_layers(r, attn={"window": r.int("sliding_window", None)})
    return finish(r, layers=layers, norm=norm(r), tied=tied(r))
