"""`taut inspect`: every number against the default model's known shape, and nothing read but headers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import Result

from taut.auto import AutoModelForCausalLM
from taut.checkpoint import open_checkpoint
from taut.cli.inspect import part_of
from taut.hub import default_model
from taut.models import read_config

CONFIG = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "favourite_colour": "green",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Qwen3 of two layers, without a tokenizer."""
    tensors = {"model.embed_tokens.weight": (96, 16), "model.norm.weight": (16,), "lm_head.weight": (96, 16)}
    for index in range(2):
        layer = f"model.layers.{index}"
        tensors |= {
            f"{layer}.self_attn.q_proj.weight": (32, 16),
            f"{layer}.self_attn.k_proj.weight": (16, 16),
            f"{layer}.self_attn.v_proj.weight": (16, 16),
            f"{layer}.self_attn.o_proj.weight": (16, 32),
            f"{layer}.self_attn.q_norm.weight": (8,),
            f"{layer}.self_attn.k_norm.weight": (8,),
            f"{layer}.mlp.gate_proj.weight": (24, 16),
            f"{layer}.mlp.up_proj.weight": (24, 16),
            f"{layer}.mlp.down_proj.weight": (16, 24),
            f"{layer}.input_layernorm.weight": (16,),
            f"{layer}.post_attention_layernorm.weight": (16,),
        }
    save_file(
        {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in tensors.items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_numbers(taut: Callable[..., Result], folder: Path) -> None:
    result = taut("inspect", str(folder), "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    expected = {
        "embedding": (1, 96 * 16),
        "attention": (8, 2 * (32 + 16 + 16 + 32) * 16),
        "mlp": (6, 2 * 3 * 24 * 16),
        "norms": (9, 16 + 2 * (8 + 8 + 16 + 16)),
        "head": (1, 96 * 16),
    }
    assert {n: (p["tensors"], p["parameters"]) for n, p in found["parts"].items()} == expected
    assert found["parameters"] == sum(count for _, count in expected.values())
    assert found["tasks"] == ["text-generation", "feature-extraction", "sentence-similarity"]
    memory = found["memory_bytes"]
    assert memory["weights"] == 2 * found["parameters"]
    assert memory["parts"]["mlp"] == 2 * 2 * 3 * 24 * 16
    assert memory["kv_cache_per_token"] == 2 * 2 * 2 * 8 * 2  # layers, keys and values, heads, dim, bytes
    assert memory["kv_cache_full_context"] == 128 * memory["kv_cache_per_token"]
    assert found["file_bytes"] == (folder / "model.safetensors").stat().st_size
    assert found["unused_config_keys"] == ["favourite_colour"]
    assert (found["model_type"], found["dtype"]) == ("qwen3", "bfloat16")
    assert found["config"]["layer_kinds"][0]["count"] == 2
    assert "error" in found["tokenizer"]
    double = json.loads(taut("inspect", str(folder), "--json", "--dtype", "float32").stdout)
    assert double["memory_bytes"]["weights"] == 2 * memory["weights"]


def test_tables(taut: Callable[..., Result], folder: Path) -> None:
    result = taut("inspect", str(folder))
    assert result.exit_code == 0, result.stderr
    for text in ("qwen3 (Qwen3ForCausalLM)", "favourite_colour", "4 heads of 8, 2 for keys", "128 tokens"):
        assert text in " ".join(result.stdout.split()), text
    assert re.fullmatch(r"load [\d.]+ s \| peak memory [\d.]+ [MG]B\n", result.stderr)


T5 = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 96, "d_model": 16,
    "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_decoder_layers": 2, "num_heads": 4, "dtype": "bfloat16",
}  # fmt: skip


def test_an_encoder_decoder(taut: Callable[..., Result], tmp_path: Path) -> None:
    save_file({"shared.weight": torch.zeros(96, 16, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(T5))
    found = json.loads(taut("inspect", str(tmp_path), "--json").stdout)
    config, memory = found["config"], found["memory_bytes"]
    (decoder,), (encoder,) = config["layer_kinds"], config["encoder_layer_kinds"]
    assert (decoder["count"], decoder["cross_attention"]) == (2, True)
    assert (encoder["count"], encoder["cross_attention"], encoder["relative_bias"]) == (1, False, True)
    assert memory["kv_cache_per_token"] == memory["kv_cache_per_source_token"] == 2 * 2 * 4 * 8 * 2
    assert (config["context"], memory["kv_cache_full_context"]) == (None, None)
    shown = " ".join(taut("inspect", str(tmp_path)).stdout.split())
    for text in ("1 encoder and 2 decoder layers", "without a limit", "one token of the source", "bias of"):
        assert text in shown, text
    assert shown.count("attention to the encoder") == 1


def test_the_default_model(smollm: None, taut: Callable[..., Result]) -> None:
    found = json.loads(taut("inspect", "--json").stdout)
    assert found["model_type"] == "llama"
    assert found["parameters"] == 134_515_008
    assert found["config"]["layers"] == 30
    assert found["config"]["tied_embeddings"] and "head" not in found["parts"]
    assert found["tokenizer"]["vocabulary"] == found["config"]["vocab_size"] == 49152
    assert found["tokenizer"]["chat_template"] is True
    assert found["unused_config_keys"] == []


@pytest.mark.parametrize("kind", ["load_in_4bit", "load_in_8bit", "gguf"])
def test_memory_of_packed_weights_is_what_the_loaded_model_takes(
    kind: str, tmp_path: Path, taut: Callable[..., Result], request: pytest.FixtureRequest
) -> None:
    if kind == "gguf":
        request.getfixturevalue("smollm")
        name = default_model()
    else:
        name, shape = str(tmp_path / "packed"), {"hidden_size": 128, "intermediate_size": 256}
        model = AutoModelForCausalLM.from_config(read_config(CONFIG | shape, "config")).init_weights()
        model.save_pretrained(tmp_path)
        AutoModelForCausalLM.from_pretrained(tmp_path, **{kind: True}).save_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    found = json.loads(taut("inspect", name, "--json").stdout)
    # Files have the same table of 4-bit values beside each matrix, models once.
    assert found["memory_bytes"]["weights"] == pytest.approx(model.get_memory_footprint(), rel=0.03)
    assert found["packed_tensors"] == (211 if kind == "gguf" else 14) and model.is_quantized
    if kind == "gguf":  # in a dtype that is asked for they are dense
        found = json.loads(taut("inspect", name, "--json", "--dtype", "float32").stdout)
        assert (found["memory_bytes"]["weights"], found["packed_tensors"]) == (4 * found["parameters"], 0)


def test_no_weight_is_read(
    taut: Callable[..., Result], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("weights were read")

    (kind,) = {type(tensor) for tensor in open_checkpoint(folder).tensors.values()}
    monkeypatch.setattr(kind, "read", read)
    assert taut("inspect", str(folder), "--json").exit_code == 0


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("model.layers.3.self_attn.qkv_proj.weight", "attention"),
        ("model.layers.3.self_attn.q_norm.weight", "norms"),
        ("model.layers.3.post_attention_layernorm.weight", "norms"),
        ("model.layers.3.mlp.down_proj.bias", "mlp"),
        ("model.layers.3.rotary_emb.inv_freq", "other"),
        ("transformer.wpe.weight", "embedding"),
        ("transformer.h.3.ln_1.bias", "norms"),
        ("transformer.word_embeddings_layernorm.weight", "norms"),
        ("gpt_neox.layers.3.attention.dense.weight", "attention"),
        ("transformer.blocks.3.ffn.up_proj.weight", "mlp"),
        ("model.decoder.layers.3.fc1.weight", "mlp"),
        ("embed_out.weight", "head"),
        ("model.layers.3.block_sparse_moe.experts.0.w1.weight", "mlp"),
        ("shared.weight", "embedding"),
        ("decoder.block.3.layer.1.EncDecAttention.q.weight", "attention"),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "attention"),
        ("decoder.block.3.layer.2.DenseReluDense.wo.weight", "mlp"),
        ("decoder.block.3.layer.2.layer_norm.weight", "norms"),
        ("model.encoder.layernorm_embedding.bias", "norms"),
        ("final_logits_bias", "head"),
        ("bert.encoder.layer.3.attention.output.dense.weight", "attention"),
        ("bert.encoder.layer.3.attention.output.LayerNorm.weight", "norms"),
        ("bert.encoder.layer.3.intermediate.dense.weight", "mlp"),
        ("bert.encoder.layer.3.output.dense.weight", "mlp"),
        ("wav2vec2.feature_extractor.conv_layers.0.conv.weight", "embedding"),
        ("wav2vec2.feature_extractor.conv_layers.0.layer_norm.weight", "norms"),
        ("wav2vec2.encoder.layers.0.feed_forward.intermediate_dense.weight", "mlp"),
        ("projector.weight", "head"),
    ],
)
def test_part_of(name: str, part: str) -> None:
    assert part_of(name) == part


def test_a_model_of_images_and_texts_shows_both(taut: Callable[..., Result], tmp_path: Path) -> None:
    half = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
    vision = half | {"num_hidden_layers": 2, "image_size": 12, "patch_size": 4}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "clip", "text_config": half | {"vocab_size": 50}, "vision_config": vision})
    )
    save_file({"logit_scale": torch.zeros(1)}, tmp_path / "model.safetensors")
    shown = taut("inspect", str(tmp_path)).stdout
    assert re.search(r"images +12 x 12 pixels in patches of 4 x 4: 10 tokens", shown)
    assert re.search(r"^layers +3 x \[2 heads of 4", shown, re.M)
    assert re.search(r"^image layers +2 x \[2 heads of 4", shown, re.M)
    assert "KV cache" not in shown


WAVLM = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
WAVLM |= {"num_conv_pos_embedding_groups": 2, "vocab_size": 32}


@pytest.mark.parametrize(
    ("config", "told", "untold"),
    [
        (
            WAVLM | {"model_type": "wavlm", "architectures": ["WavLMForCTC"]},
            ["a token for 320 samples, by 7 convolutions", "bias of distances, gated", "vocabulary 32"],
            [],
        ),
        (
            WAVLM | {"model_type": "wavlm", "architectures": ["WavLMForSequenceClassification"]},
            ["a token for 320 samples"],
            ["vocabulary", "tokenizer"],
        ),
        (
            WAVLM | {"model_type": "audio-spectrogram-transformer"},
            ["spectrograms 128 x 1024 bands and frames in patches of 16 x 16, 10 x 10 apart: 1214 tokens"],
            ["vocabulary", "tokenizer"],
        ),
    ],
    ids=["ctc", "classifier", "spectrograms"],
)
def test_audio_encoders(config, told, untold, taut: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"projector.bias": torch.zeros(1)}, tmp_path / "model.safetensors")
    shown = " ".join(taut("inspect", str(tmp_path)).stdout.split())
    assert [text for text in told if text not in shown] == [], shown
    assert [text for text in untold if text in shown] == [], shown
    assert "KV cache" not in shown
