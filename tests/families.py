"""The families' table: tiny random checkpoints, written by transformers, in every odd shape a family has.

Adding a family adds entries here; every property in `test_families.py` is then tested for it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tests.scratch import scratch

VOCAB = 131
CONTEXT = 64
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

IDS = {key: TINY[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
# What older families call the same; by default their head is tied where they say nothing.
FALCON = IDS | {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": CONTEXT,
}
NEOX = FALCON | {"intermediate_size": 80}
BLOOM = IDS | {"hidden_size": 48, "n_layer": 3, "n_head": 6}
MPT = IDS | {"d_model": 48, "n_layers": 3, "n_heads": 6, "max_seq_len": CONTEXT}
GPT = IDS | {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": CONTEXT}
NEO = IDS | {"hidden_size": 48, "num_layers": 3, "num_heads": 6, "max_position_embeddings": CONTEXT}
NEO |= {"attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": 5}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
OPT = FALCON | {"ffn_dim": 80}
GRANITE = {
    "embedding_multiplier": 3.5,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.3,
    "logits_scaling": 2.5,
}
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 5}


@dataclass(frozen=True)
class Case:
    """One tiny checkpoint: `name` is shown by pytest, `family` the transformers class prefix, `options` are
    changes to `base`, the config's values."""

    name: str
    family: str
    options: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=lambda: TINY)
    attention: str = "eager"  # transformers' implementation that is right

    def __str__(self) -> str:
        return self.name

    def __hash__(self) -> int:  # options is a dict; names are unique
        return hash(self.name)


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **parameters}}


_LONG = {"short_factor": [1.0, 1.1, 1.3, 1.2], "long_factor": [1.5, 2.0, 4.0, 7.0]}

CASES = [
    Case("llama", "Llama"),
    Case("llama-one-kv-head", "Llama", {"num_key_value_heads": 1}),
    Case("llama-no-grouping", "Llama", {"num_key_value_heads": 6}),
    Case("llama-wide-heads", "Llama", {"head_dim": 20}),
    Case("llama-biases", "Llama", {"attention_bias": True, "mlp_bias": True}),
    Case("llama-tied", "Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    Case("llama-gelu", "Llama", {"hidden_act": "gelu_new"}),
    Case("llama-rope-linear", "Llama", _rope("linear", factor=3.0)),
    Case("llama-rope-dynamic", "Llama", _rope("dynamic", factor=2.0) | {"max_position_embeddings": 16}),
    Case(
        "llama-rope-llama3",
        "Llama",
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    Case("llama-rope-yarn", "Llama", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    Case(
        "llama-rope-yarn-mscale",
        "Llama",
        _rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            mscale=0.7,
            mscale_all_dim=0.4,
            beta_fast=16,
            beta_slow=2,
            truncate=False,
        ),
    ),
    Case("llama-rope-longrope", "Llama", _rope("longrope", original_max_position_embeddings=32, **_LONG)),
    Case("mistral-window", "Mistral", {"sliding_window": 5}),
    Case("mistral-no-window", "Mistral", {"sliding_window": None, "head_dim": 12}),
    Case("qwen2", "Qwen2"),
    Case(
        "qwen2-upper-windows",
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    Case("qwen3", "Qwen3", {"head_dim": 20}),
    Case("qwen3-biases-tied", "Qwen3", {"attention_bias": True, "tie_word_embeddings": True, "head_dim": 8}),
    Case("smollm3", "SmolLM3", {"no_rope_layer_interval": 2}),
    Case(
        "smollm3-windows",
        "SmolLM3",
        {
            "no_rope_layer_interval": 3,
            "use_sliding_window": True,
            "sliding_window": 5,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    Case("gemma", "Gemma", {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    Case("gemma-biases", "Gemma", {"head_dim": 8, "attention_bias": True}),
    Case(
        "gemma2",
        "Gemma2",
        {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 30, "tie_word_embeddings": True},
    ),
    Case(
        "gemma2-no-caps",
        "Gemma2",
        {
            "head_dim": 8,
            "sliding_window": 64,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
        },
    ),
    Case("phi3", "Phi3", {"sliding_window": None}),
    Case("phi3-window-partial", "Phi3", {"sliding_window": 5} | _rope("default", partial_rotary_factor=0.75)),
    Case(
        "phi3-longrope",
        "Phi3",
        _rope("longrope", **_LONG) | {"original_max_position_embeddings": 32},
    ),
    Case("starcoder2", "Starcoder2", {"tie_word_embeddings": True}),
    Case("starcoder2-window-no-bias", "Starcoder2", {"sliding_window": 5, "use_bias": False}),
    Case("starcoder2-relu", "Starcoder2", {"hidden_act": "relu", "num_key_value_heads": 1}),
    Case("olmo2", "Olmo2"),
    Case("olmo2-biases", "Olmo2", {"attention_bias": True, "num_key_value_heads": 6}),
    Case("granite", "Granite", GRANITE | {"tie_word_embeddings": True}),
    Case("granite-biases", "Granite", {"attention_bias": True, "mlp_bias": True, "residual_multiplier": 1.5}),
    Case("stablelm", "StableLm"),
    Case("stablelm-parallel", "StableLm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    Case(
        "stablelm-head-norms",
        "StableLm",
        {"qk_layernorm": True} | _rope("default", partial_rotary_factor=0.5),
    ),
    Case("cohere", "Cohere", {"tie_word_embeddings": True}),
    Case(
        "cohere-head-norms",
        "Cohere",
        {"use_qk_norm": True, "attention_bias": True, "logit_scale": 1.5},
    ),
    Case("glm4", "Glm4", {"head_dim": 16}),
    Case("glm4-no-bias-tied", "Glm4", {"head_dim": 8, "attention_bias": False, "tie_word_embeddings": True}),
    Case("gemma3", "Gemma3Text", {"head_dim": 16, "sliding_window": 5, "tie_word_embeddings": True}),
    Case(
        "gemma3-two-ropes",
        "Gemma3Text",
        {
            "head_dim": 8,
            "sliding_window": 5,
            "query_pre_attn_scalar": 10,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 700.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
            "final_logit_softcapping": 4.0,
        },
    ),
    Case("mixtral", "Mixtral", {"num_local_experts": 4, "sliding_window": 5}),
    Case(
        "mixtral-tied", "Mixtral", {"num_local_experts": 3, "hidden_act": "gelu", "tie_word_embeddings": True}
    ),
    Case("qwen2-moe", "Qwen2Moe", MOE | {"shared_expert_intermediate_size": 32}),
    Case(
        "qwen2-moe-some-layers",
        "Qwen2Moe",
        MOE
        | {
            "shared_expert_intermediate_size": 32,
            "mlp_only_layers": [0],
            "qkv_bias": False,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 5,
        },
    ),
    Case("qwen3-moe", "Qwen3Moe", MOE | {"head_dim": 20, "norm_topk_prob": True}),
    Case("qwen3-moe-some-layers", "Qwen3Moe", MOE | {"decoder_sparse_step": 2, "attention_bias": True}),
    Case("olmoe", "Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    Case(
        "olmoe-normalised-biases",
        "Olmoe",
        {"num_experts": 5, "num_experts_per_tok": 3, "norm_topk_prob": True, "attention_bias": True},
    ),
    Case("flex-olmo", "FlexOlmo", {"num_experts": 4, "num_experts_per_tok": 2}),
    Case("granite-moe", "GraniteMoe", GRANITE | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Case("gpt-oss", "GptOss", GPT_OSS),
    Case(
        "gpt-oss-no-windows-tied",
        "GptOss",
        GPT_OSS
        | {
            "layer_types": ["full_attention"] * 3,
            "attention_bias": False,
            "swiglu_limit": 0.5,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    Case("phi", "Phi"),
    Case("phi-head-norms", "Phi", {"qk_layernorm": True, "hidden_act": "gelu"}),
    Case("gpt-neox", "GPTNeoX", base=NEOX),
    Case(
        "gpt-neox-sequential-tied",
        "GPTNeoX",
        {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True},
        NEOX,
    ),
    Case("gptj", "GPTJ", {"rotary_dim": 4}, GPT),
    Case("gptj-whole-heads", "GPTJ", {"rotary_dim": 8, "n_inner": 80, "activation_function": "relu"}, GPT),
    Case("codegen", "CodeGen", {"rotary_dim": 4, "n_head": 8}, GPT),
    Case("falcon-7b", "Falcon", base=FALCON),
    Case("falcon-40b", "Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, FALCON),
    Case(
        "falcon-11b",
        "Falcon",
        {
            "new_decoder_architecture": True,
            "num_kv_heads": 3,
            "num_ln_in_parallel_attn": 1,
            "tie_word_embeddings": False,
            "ffn_hidden_size": 80,
        },
        FALCON,
    ),
    # Eight heads: transformers rounds slope times position to bfloat16, which is exact for powers of two.
    Case(
        "falcon-rw",
        "Falcon",
        {
            "num_attention_heads": 8,
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
        },
        FALCON,
        attention="sdpa",  # its eager attention adds ALiBi twice
    ),
    Case("falcon-rw-no-bias", "Falcon", {"multi_query": False, "activation": "relu"}, FALCON),
    Case("bloom", "Bloom", base=BLOOM),
    Case("bloom-untied", "Bloom", {"n_head": 4, "tie_word_embeddings": False}, BLOOM),
    Case("mpt", "Mpt", base=MPT),
    Case(
        "mpt-clipped",
        "Mpt",
        {
            "n_heads": 4,
            "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.2},
            "tie_word_embeddings": False,
        },
        MPT,
    ),
    Case("gpt2", "GPT2", base=GPT),
    Case(
        "gpt2-scales",
        "GPT2",
        {
            "scale_attn_weights": False,
            "scale_attn_by_inverse_layer_idx": True,
            "n_inner": 80,
            "activation_function": "relu",
            "tie_word_embeddings": False,
        },
        GPT,
    ),
    Case("gpt-neo", "GPTNeo", base=NEO),
    Case("gpt-neo-untied", "GPTNeo", {"intermediate_size": 80, "tie_word_embeddings": False}, NEO),
    Case("gpt-bigcode", "GPTBigCode", base=GPT),
    Case("gpt-bigcode-many-kv-heads", "GPTBigCode", {"multi_query": False, "n_inner": 80}, GPT),
    Case("opt", "OPT", base=OPT),
    Case("opt-350m", "OPT", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}, OPT),
    Case(
        "opt-no-bias-untied",
        "OPT",
        {"enable_bias": False, "tie_word_embeddings": False, "activation_function": "gelu"},
        OPT,
    ),
]


@functools.cache
def checkpoint(case: Case, auto: str = "AutoModelForCausalLM") -> Path:
    """Folder of the case's checkpoint in float32, as transformers' class `auto` writes it, with weights drawn
    wide enough that every one matters."""
    config = getattr(transformers, f"{case.family}Config")(**{**case.base, **case.options})
    torch.manual_seed(len(case.name))
    model = getattr(transformers, auto).from_config(config)
    for name, param in model.named_parameters():
        if name.endswith("weight") and ("norm" in name.lower() or ".ln_" in name or "emb_ln" in name):
            nn.init.uniform_(param, -0.3, 0.3) if "gemma" in case.name else nn.init.uniform_(param, 0.7, 1.3)
        else:
            nn.init.normal_(param, std=0.15)
    folder = scratch("families") / f"{case.name}-{auto}"
    model.save_pretrained(folder)
    return folder


def oracle(
    case: Case,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    auto: str = "AutoModelForCausalLM",
    **changes: Any,
) -> transformers.PreTrainedModel:
    """The case's model in transformers, with `changes` to its config."""
    options = {"dtype": dtype, "attn_implementation": case.attention, **changes}
    model = getattr(transformers, auto).from_pretrained(checkpoint(case, auto), **options).to(device)
    for module in model.modules():
        if type(module).__name__ == "GptOssExperts":  # before 5.18 the file's is ignored
            module.limit = getattr(model.config, "swiglu_limit", 7.0)
    return model
