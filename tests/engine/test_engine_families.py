"""The engine over real decoders: greedy tokens equal those of the whole sequence computed again each time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from taut.engine import Engine, Request, SamplingParams
from taut.modeling import CausalLM
from taut.models import read_config

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "llama": {"model_type": "llama"},
    "window": {"model_type": "mistral", "sliding_window": 7},
    "softcap": {
        "model_type": "gemma2",
        "sliding_window": 5,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "alibi, norm behind the embedding": {"model_type": "bloom", "tie_word_embeddings": False},
    "learned positions, one key head": {"model_type": "gpt_bigcode"},
    "parallel, interleaved": {"model_type": "gptj", "rotary_dim": 4},
    "parallel, head norms": {"model_type": "cohere", "use_qk_norm": True},
    "norm over all heads": {"model_type": "olmo2"},
    "experts": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "longrope": {
        "model_type": "phi3",
        "original_max_position_embeddings": 16,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0] * 4,
            "long_factor": [1.0, 2.0, 4.0, 8.0],
        },
    },
}
PROMPTS = [[5], [8, 9], list(range(3, 26)), [7, 7, 7, 7, 7], list(range(40, 55)), [3, 1, 4, 1, 5, 9, 2, 6]]
NEW = 10


def build(name: str, dtype: torch.dtype, device: str = "cpu") -> CausalLM:
    torch.manual_seed(0)
    config = BASE | CONFIGS[name]
    return CausalLM.from_config(config, dtype=torch.float64).init_weights(std=0.3).to(device, dtype)


@torch.no_grad()
def loop(model: CausalLM, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt], device=model.device)
    for _ in range(NEW):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
    return ids[0, len(prompt) :].tolist()


def serve(model: CausalLM, **options) -> list[list[int]]:
    engine = Engine(model, **options)
    requests = engine.run([Request(list(prompt), SamplingParams(NEW)) for prompt in PROMPTS])
    assert engine.pages.free == engine.pages.count
    return [request.output for request in requests]


OPTIONS = [
    {"cache_tokens": 512},
    {"cache_tokens": 36, "page_size": 3, "chunk": 5},  # little room: rows give way and come back
    {"cache_tokens": 64, "page_size": 1, "chunk": 1, "max_rows": 3},
]


@pytest.mark.parametrize("name", CONFIGS)
def test_each_row_equals_the_loop_without_a_cache(name):
    model = build(name, torch.float64)
    expected = [loop(model, prompt) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    for options in OPTIONS:
        assert serve(model, **options) == expected


def test_dynamic_angles_are_those_of_the_length_a_token_was_new_at():
    config = BASE | {
        "model_type": "llama",
        "max_position_embeddings": 8,
        "rope_theta": 100.0,
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
    }
    torch.manual_seed(0)
    model = CausalLM.from_config(replace(read_config(config), context=128), dtype=torch.float64)
    model.init_weights(std=0.3)
    roomy, *others = [serve(model, **options) for options in OPTIONS]
    assert others == [roomy] * len(others)
    assert roomy != [loop(model, prompt) for prompt in PROMPTS]  # else the angles don't matter here


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_on_a_gpu_too(name, dtype):
    model = build(name, dtype, "cuda")
    for options in OPTIONS:
        tokens = serve(model, **options)
        if dtype in (torch.float64, torch.float32):  # in 16 bits, near ties may go either way
            assert tokens == serve(build(name, dtype), cache_tokens=512)
        assert [len(row) for row in tokens] == [NEW] * len(PROMPTS)
