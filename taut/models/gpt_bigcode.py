"""GPT-BigCode (StarCoder, SantaCoder): GPT-2 with one key head, and matrices stored the usual way round."""

from __future__ import annotations

from taut.config import ModelConfig, Reader
from taut.models.gpt2 import IGNORED, NAMES, decoder
from taut.weights import Fused, Rule

ARCHITECTURE = "GPTBigCodeForCausalLM"

__all__ = ["IGNORED", "read", "rules"]


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """GPT-2's; q, k and v lie key head by key head."""
    groups = config.layers[0].attn.kv_heads
    return (*NAMES, Fused("transformer.h.{}.attn.c_attn", ("q_proj", "k_proj", "v_proj"), groups))


def read(r: Reader) -> ModelConfig:
    r.ignore("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")  # about rounding
    r.ignore("num_key_value_heads", "inference_runner", "max_batch_size", "max_sequence_length")
    r.ignore("pad_key_length", "pre_allocate_kv_cache", "validate_runner_input")
    own = {} if r.bool("scale_attn_weights", True) else {"scale": 1.0}
    r.rename(num_attention_heads="n_head")
    own["kv_heads"] = 1 if r.bool("multi_query", True) else r.int("num_attention_heads")
    return decoder(r, own)
