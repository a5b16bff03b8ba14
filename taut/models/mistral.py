"""Mistral: Llama with a sliding window in every layer."""

from __future__ import annotations

from taut.config import ModelConfig, Reader, finish
from taut.models.llama import RULES, norm, pre_norm_layers, tied

ARCHITECTURE = "MistralForCausalLM"

__all__ = ["RULES", "read"]


def read(r: Reader) -> ModelConfig:
    layers = pre_norm_layers(r, attn={"window": r.int("sliding_window", None)})
    return finish(r, layers=layers, norm=norm(r), tied=tied(r))
