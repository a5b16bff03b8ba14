"""CodeGen: GPT-J with q, v and k fused, in the four shares of the machines it was trained on."""

from __future__ import annotations

from taut.config import ModelConfig, Reader
from taut.errors import ConfigError
from taut.models.gptj import IGNORED
from taut.models.gptj import RULES as GPTJ
from taut.models.gptj import read as read_gptj
from taut.weights import Fused

ARCHITECTURE = "CodeGenForCausalLM"

__all__ = ["IGNORED", "RULES", "read"]

RULES = (*GPTJ, Fused("transformer.h.{}.attn.qkv_proj", ("q_proj", "v_proj", "k_proj"), groups=4))


def read(r: Reader) -> ModelConfig:
    config = read_gptj(r)
    heads = config.layers[0].attn.heads
    if heads % 4:
        raise ConfigError(
            f"{r.source}: 'n_head' is {heads}; expected a multiple of 4, the shares of its files"
        )
    return config
