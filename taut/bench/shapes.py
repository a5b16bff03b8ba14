"""Model shapes to measure with random weights: `config.json` as data, so that a new family just works."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from taut import auto
from taut.errors import RequestError, nearest
from taut.models import families


@dataclass(frozen=True)
class Shape:
    """`config`: what `config.json` says. `auto`: the class, of Taut and of transformers, that makes the
    model; a class without a head (`AutoModel`) generates nothing. `hidden`: not offered to people."""

    config: Mapping[str, Any]
    auto: str = "AutoModelForCausalLM"
    hidden: bool = False

    @property
    def generates(self) -> bool:
        return self.auto == "AutoModelForCausalLM"

    @property
    def known(self) -> bool:
        """Whether Taut has the family."""
        return self.config["model_type"] in families() and hasattr(auto, self.auto)


_LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "llama-7b": Shape(
            {
                **_LLAMA,
                "vocab_size": 32000,
                "intermediate_size": 11008,
                "num_key_value_heads": 32,
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
            }
        ),
        "falcon-7b": Shape(
            {
                "model_type": "falcon",
                "vocab_size": 65024,
                "hidden_size": 4544,
                "num_hidden_layers": 32,
                "num_attention_heads": 71,
                "multi_query": True,
                "parallel_attn": True,
                "new_decoder_architecture": False,
                "bias": False,
                "alibi": False,
                "layer_norm_epsilon": 1e-5,
                "max_position_embeddings": 2048,
                "bos_token_id": 11,
                "eos_token_id": 11,
            }
        ),
        "mistral-7b": Shape(
            {
                **_LLAMA,
                "model_type": "mistral",
                "vocab_size": 32000,
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "sliding_window": 4096,
                "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0,
            }
        ),
        "llama-8b": Shape(
            {
                **_LLAMA,
                "vocab_size": 128256,
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "max_position_embeddings": 8192,
                "rms_norm_eps": 1e-5,
                "rope_theta": 500000.0,
                "bos_token_id": 128000,
                "eos_token_id": 128001,
            }
        ),
        "mixtral-8x7b": Shape(
            {
                **_LLAMA,
                "model_type": "mixtral",
                "vocab_size": 32000,
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1000000.0,
            }
        ),
        "qwen3-30b-a3b": Shape(
            {
                **_LLAMA,
                "model_type": "qwen3_moe",
                "vocab_size": 151936,
                "hidden_size": 2048,
                "num_hidden_layers": 48,
                "intermediate_size": 6144,
                "moe_intermediate_size": 768,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "norm_topk_prob": True,
                "max_position_embeddings": 40960,
                "rms_norm_eps": 1e-6,
                "rope_theta": 1000000.0,
            }
        ),
        "gpt-oss-20b": Shape(
            {
                **_LLAMA,
                "model_type": "gpt_oss",
                "vocab_size": 201088,
                "hidden_size": 2880,
                "num_hidden_layers": 24,
                "num_attention_heads": 64,
                "intermediate_size": 2880,
                "num_key_value_heads": 8,
                "head_dim": 64,
                "num_local_experts": 32,
                "num_experts_per_tok": 4,
                "sliding_window": 128,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "bos_token_id": 199998,
                "eos_token_id": 200002,
            }
        ),
        "bert-base": Shape(
            {
                "model_type": "bert",
                "vocab_size": 30522,
                "hidden_size": 768,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
                "intermediate_size": 3072,
                "hidden_act": "gelu",
                "max_position_embeddings": 512,
                "type_vocab_size": 2,
                "layer_norm_eps": 1e-12,
                "pad_token_id": 0,
            },
            auto="AutoModel",
        ),
        # Small enough for a test on a CPU; grouped heads, so that fused weights are cut unevenly.
        "tiny-llama": Shape(
            {
                **_LLAMA,
                "vocab_size": 131,
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 128,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
                "rms_norm_eps": 1e-5,
            },
            hidden=True,
        ),
    }
)


def find(name: str) -> Shape:
    """The shape called `name`; `RequestError` for one that is unknown, or whose family Taut does not have."""
    offered = [known for known, shape in SHAPES.items() if not shape.hidden]
    if name not in SHAPES:
        raise RequestError(f"--shape is {name!r}; known: {', '.join(offered)}{nearest(name, offered)}")
    shape = SHAPES[name]
    if not shape.known:
        ready = [known for known in offered if SHAPES[known].known]
        raise RequestError(
            f"--shape is {name!r}, of the family {shape.config['model_type']!r}, which this release of Taut "
            f"does not have; shapes it has: {', '.join(ready)}"
        )
    return shape
