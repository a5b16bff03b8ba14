"""GPT-OSS's experts in MXFP4 blocks, as released: read beside transformers, and what is wrong with them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from taut import AutoModelForCausalLM, weights
from taut.cli.inspect import describe
from taut.errors import CheckpointError
from taut.quant import mxfp4
from tests.families import CASES, VOCAB
from tests.standin import Standin

CASE = next(case for case in CASES if case.name == "gpt-oss")
SHAPES = {"gate_up_proj": (4, 192, 2, 16), "down_proj": (4, 64, 3, 16)}  # dim 64, hidden 96


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A checkpoint as the released ones are: blocks, scales, and the older words of config.json."""
    folder = tmp_path_factory.mktemp("released")
    config = transformers.GptOssConfig(
        **{**CASE.base, **CASE.options, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}
    )
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).bfloat16()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.15)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(config.num_hidden_layers):
        for name, shape in SHAPES.items():
            experts = f"model.layers.{layer}.mlp.experts.{name}"
            del tensors[experts]
            tensors[f"{experts}_blocks"] = torch.randint(0, 256, shape, dtype=torch.uint8)
            tensors[f"{experts}_scales"] = torch.randint(120, 126, shape[:3], dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    del written["rope_parameters"]
    written |= {"rope_theta": 150000, "experts_per_token": 2, "initial_context_length": 16}
    written["rope_scaling"] = {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_type": "yarn",
        "truncate": False,
    }
    written["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(written))
    return folder


def logits(model):
    ids = torch.randint(3, VOCAB, (1, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits[0].float()


def close(got, want, bound=1e-4):
    assert (got - want).abs().max() <= bound * want.abs().max()


def test_blocks_are_what_transformers_makes_of_them(released, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(released, dtype=torch.float32)
    assert model.config.unused == () and not model.is_quantized
    theirs = transformers.GptOssForCausalLM.from_pretrained(
        released,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    )
    close(logits(model), logits(theirs))
    assert describe(released, "auto")["parameters"] == model.num_parameters()
    # Saved dense, in the form in which transformers holds them.
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = transformers.GptOssForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    close(logits(again), logits(model))
    own = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(own), logits(model))


def test_blocks_may_become_another_small_format(released):
    exact = AutoModelForCausalLM.from_pretrained(released, dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(released, load_in_8bit=True, dtype=torch.float32)
    for name in ("gate_up_proj", "down_proj"):
        want, got = (getattr(model.model.layers[1].mlp.experts, name) for model in (exact, packed))
        got = got.packed.dequantize(torch.float32)
        steps = want.weight.abs().amax(-1, keepdim=True) / 127
        assert ((got - want.weight).abs() <= 0.51 * steps).all()


def test_blocks_are_read_ahead(released, monkeypatch):
    exact, standin = AutoModelForCausalLM.from_pretrained(released), Standin()
    monkeypatch.setattr(weights, "target_of", lambda device: standin)
    ahead = AutoModelForCausalLM.from_pretrained(released)
    assert standin.copied == sum(t.nbytes for t in load_file(released / "model.safetensors").values())
    for got, want in zip(ahead.parameters(), exact.parameters(), strict=True):
        assert torch.equal(got, want)


def test_every_code_and_scale_is_exact():
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scales = torch.tensor([0, 1, 100, *range(121, 134)], dtype=torch.uint8)
    got = mxfp4.dequantize(blocks, scales.view(16))
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values += [-v for v in values]
    want = [
        values[code] * 2.0 ** (int(scale) - 127)
        for row, scale in zip(blocks.tolist(), scales, strict=True)
        for byte in row
        for code in (byte & 15, byte >> 4)
    ]
    assert got.dtype is torch.bfloat16 and got.double().tolist() == want


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: t.pop(f"{n}_scales"), "gate_up_proj_scales is missing beside .*gate_up_proj_blocks"),
        (lambda t, n: t.pop(f"{n}_blocks"), "gate_up_proj_blocks is missing beside .*gate_up_proj_scales"),
        (
            lambda t, n: t.update({f"{n}_scales": t[f"{n}_scales"][:, 1:]}),
            r"blocks \[4, 192, 2, 16\] and sca",
        ),
        (
            lambda t, n: t.update({f"{n}_blocks": t[f"{n}_blocks"].float()}),
            "torch.float32, scales torch.uint8",
        ),
    ],
)
def test_what_does_not_fit_together_is_named(released, tmp_path, change, message):
    folder = tmp_path / "copy"
    shutil.copytree(released, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors, "model.layers.0.mlp.experts.gate_up_proj")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)
