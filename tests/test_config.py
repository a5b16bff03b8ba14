"""The strict Reader: every key is used, ignored by name or reported, and bad values are named."""

from __future__ import annotations

import pytest
import torch

from taut.config import alibi_slopes
from taut.errors import ConfigError
from taut.models import families, family, kind, read_config

GOOD = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

BAD = [
    ({"model_type": "lama"}, r"^config.json: 'model_type' is 'lama', which Taut does not know; .*: .*llama"),
    ({"model_type": None}, r"'model_type' is missing"),
    ({"hidden_size": None}, r"'hidden_size' is missing \(an integer expected\)"),
    ({"hidden_size": "32"}, r"'hidden_size' is '32'; expected an integer"),
    ({"hidden_size": True}, r"'hidden_size' is True; expected an integer"),
    ({"hidden_size": 3.5}, r"'hidden_size' is 3.5; expected an integer >= 1"),
    ({"num_hidden_layers": 0}, r"'num_hidden_layers' is 0; expected an integer >= 1"),
    ({"num_key_value_heads": 3}, r"'num_key_value_heads' is 3, which does not divide 4"),
    ({"hidden_act": "relu6"}, r"'hidden_act' is 'relu6'; known: .*silu"),
    ({"rms_norm_eps": -1.0}, r"'rms_norm_eps' is -1.0; expected a number > 0"),
    ({"torch_dtype": "int3"}, r"'dtype' is 'int3'; known: float32"),
    ({"rope_scaling": {"type": "yarm", "factor": 2.0}}, r"'type' is 'yarm'; known: .*; nearest: yarn"),
    ({"rope_parameters": {"rope_type": "linear"}}, r"'factor' is missing"),
    (
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        r"'short_factor' has 1 entries; expected 4",
    ),
    ({"partial_rotary_factor": 0.1}, r"would turn 0 of 8 features a head"),
    ({"eos_token_id": ["a"]}, r"'eos_token_id' is \['a'\]; expected a token id"),
    ({"model_type": "gemma", "use_bidirectional_attention": True}, r"is True, which is not supported"),
    (
        {"model_type": "qwen2", "layer_types": ["full_attention", "linear"]},
        r"'layer_types'\[1\] is 'linear'; known: full_attention, sliding_attention",
    ),
    ({"model_type": "gptj"}, r"'rotary_dim' is 64; expected an even number of at most 8"),
    (
        {"model_type": "codegen", "rotary_dim": 4, "num_attention_heads": 2},
        r"'n_head' is 2; expected a multiple of 4",
    ),
    ({"model_type": "gpt2", "n_embd": 3.5}, r"'n_embd' is 3.5; expected an integer >= 1"),
    (
        {"model_type": "gpt_neo", "attention_types": [[["global"], 1]]},
        r"describes the layers \['global'\]; expected 2",
    ),
    ({"model_type": "gpt_neo", "attention_types": ["global"]}, r"expected pairs of a list of kinds"),
    ({"model_type": "falcon", "num_ln_in_parallel_attn": 2}, r"is 2; expected 1 without 'new_decoder_arch"),
    ({"model_type": "mpt", "attn_config": {"qk_ln": True}}, r"attn_config: 'qk_ln' is True, which is not"),
    (
        {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3},
        r"'num_experts_per_tok' is 3; expected at most 2",
    ),
    ({"model_type": "phi", "tie_word_embeddings": True}, r"'tie_word_embeddings' is True, which is not"),
    (
        {"model_type": "gemma2", "sliding_window": None},
        r"'layer_types'\[0\] is 'sliding_attention', but 'sliding_window' is missing",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(change) for change, _ in BAD])
def test_bad_values_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        read_config(GOOD | change)


def test_a_config_must_be_an_object():
    with pytest.raises(ConfigError, match="expected a JSON object, got list"):
        read_config([1])


TEXT = ("decoder", "encoder", "encoder-decoder", "text tower")


@pytest.mark.parametrize("model_type", [name for name in families() if kind(family(name)) in TEXT])
def test_the_least_a_config_must_say_is_enough_and_a_stray_key_is_reported(model_type):
    needed = {"sliding_window": 8} if model_type in ("gemma2", "gemma3_text", "gpt_oss") else {}
    given = GOOD | needed | {"model_type": model_type, "flux": 1}
    if model_type == "modernbert":
        given["local_attention"] = 8
    if model_type in ("bloom", "mpt"):  # four times the hidden size, always
        del given["intermediate_size"]
    if model_type in ("gptj", "codegen"):
        given["rotary_dim"] = 4
    if model_type in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "granitemoe", "gpt_oss"):
        given |= {"num_experts": 4, "num_experts_per_tok": 2}
    if model_type in ("qwen2_moe", "qwen3_moe"):
        given["moe_intermediate_size"] = 16
    config = read_config(given)
    assert config.unused == ("flux",)
    assert len(config.layers) == 2 and config.dim == 32
    assert config.hidden_size == 32  # what config.json says, under its own name
    with pytest.raises(AttributeError, match=r"no 'hiden_size'; nearest: hidden_size"):
        config.hiden_size  # noqa: B018


def test_older_and_newer_spellings_mean_the_same():
    scaling = {"factor": 4.0, "original_max_position_embeddings": 16}
    old = GOOD | {
        "rope_theta": 500.0,
        "rope_scaling": {"type": "yarn", **scaling},
        "torch_dtype": "bfloat16",
    }
    new = GOOD | {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, **scaling},
        "dtype": "bfloat16",
    }
    assert read_config(old) == read_config(new)
    assert read_config(old).dtype is torch.bfloat16 and read_config(old).unused == ()


def test_a_family_may_call_keys_otherwise():
    config = read_config(
        {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 9}
    )
    assert (config.dim, config.context, config.unused) == (32, 64, ())
    assert config.hidden_size == config.n_embd == 32
    assert config.layers[0].mlp.hidden == 128


def test_slopes_of_alibi():
    """Press et al. 2022: a geometric series from 2 ** (-8 / heads); six heads: that of 4, part of 8's."""
    assert alibi_slopes(8) == tuple(2.0**-i for i in range(1, 9))
    assert alibi_slopes(6) == (2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3)


def test_unused_keys_of_a_section_are_reported_with_its_name():
    config = read_config(GOOD | {"rope_parameters": {"rope_type": "default", "wobble": 2}})
    assert config.unused == ("rope_parameters.wobble",)
