"""`taut quantize`, `taut eval` and `--load-in`, on a tiny model with a tokenizer of letters."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import taut
from taut import AutoModelForCausalLM
from taut.cli.app import app
from taut.quant.config import named
from tests.families import CASES, checkpoint
from tests.pipelines import test_sounds as sounds
from tests.pipelines.test_images import pictures, vit
from tests.pipelines.test_text import FOLDERS
from tests.test_sentences import minilm

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with a tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    for file in checkpoint(CASES[0]).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    letters = {chr(32 + i): i for i in range(95)} | {"\n": 95, "<unk>": 96}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"})
    )
    return folder


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize(
    ("options", "kind"),
    [((), "nf4"), (("--format", "fp4", "--double-quant"), "fp4"), (("--format", "int8"), "int8")],
    ids=["nf4", "fp4", "int8"],
)
def test_quantize_writes_a_folder_that_loads(model, options, kind, tmp_path):
    result = run("quantize", model, tmp_path / "out", *options, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert kind in result.output and "saved to" in result.output
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.quantization_config.format == kind
    assert loaded.quantization_config.bnb_4bit_use_double_quant == (kind == "fp4")
    again = run("quantize", model, tmp_path / "out", "--device", "cpu")
    assert again.exit_code == 1 and "exists already" in again.output
    again = run("quantize", tmp_path / "out", tmp_path / "twice", "--device", "cpu")
    assert again.exit_code == 1 and "is quantized already" in again.output
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize(
    ("source", "item"),
    [
        (FOLDERS["token-classification"], "bob works in paris"),
        (sounds.ctc, sounds.clips()[1]),
        (sounds.classifier, sounds.clips()[1]),
        (sounds.whisper, sounds.clips()[1]),
        (vit, pictures()[0]),
    ],
    ids=["token-classification", "ctc", "sounds", "whisper", "images"],
)
def test_quantize_keeps_the_head_and_what_makes_inputs(source, item, tmp_path):
    result = run("quantize", source(), tmp_path / "out", "--format", "int8", "--device", "cpu")
    assert result.exit_code == 0, result.output
    before, after = (taut.pipeline(model=folder, device="cpu") for folder in (source(), tmp_path / "out"))
    assert after.task == before.task and after.model.is_loaded_in_8bit
    assert type(after(item)) is type(before(item))


def test_quantize_keeps_what_makes_vectors_of_sentences(tmp_path):
    result = run("quantize", minilm(), tmp_path / "out", "--format", "int8", "--device", "cpu")
    assert result.exit_code == 0, result.output
    texts = ["A man plays the guitar.", "Someone is playing music.", "I like pasta."]
    got, want = (
        taut.SentenceTransformer(folder, device="cpu").encode(texts)
        for folder in (tmp_path / "out", minilm())
    )
    assert (got * want).sum(-1).min() > 0.99 and ((got * got).sum(-1) - 1).max() < 1e-5
    for file in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (minilm() / file).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "int4"), "the format is 'int4'; known: 4bit, nf4, fp4, 8bit, int8"),
        (("--format", "int8", "--double-quant"), "double quantization is for nf4 and fp4"),
    ],
    ids=["format", "double int8"],
)
def test_quantize_names_what_is_wrong(model, options, message, tmp_path):
    result = run("quantize", model, tmp_path / "out", *options)
    assert result.exit_code == 1 and message in result.output
    assert not (tmp_path / "out").exists()


def test_eval_measures_no_distance_from_itself_and_some_from_4_bit(model):
    words = ("eval", model, "--against", model, "--device", "cpu", "--json")
    same, four, eight = (
        json.loads(run(*words, *more).stdout) for more in ((), ("--load-in", "4bit"), ("--load-in", "8bit"))
    )
    assert same["kl_mean"] == 0 and same["top1_agreement"] == 1
    assert same["perplexity"] == same["against_perplexity"]
    assert four["kl_mean"] > eight["kl_mean"] > 0 and four["kl_p99"] > four["kl_mean"]
    assert four["tokens"] == same["tokens"] > 1000


def test_eval_gives_the_figures_that_their_names_promise(model, tmp_path):
    text = "some words to predict, enough of them"
    (tmp_path / "text").write_text(text)
    words = ("eval", model, "--against", model, "--load-in", "4bit", "--text", tmp_path / "text")
    found = json.loads(run(*words, "--device", "cpu", "--json").stdout)
    ids = torch.tensor([[ord(letter) - 32 for letter in text]])
    plain, packed = (
        AutoModelForCausalLM.from_pretrained(model, quantization_config=config)(ids).logits[0, :-1].float()
        for config in (None, named("nf4"))
    )
    distance = F.kl_div(packed.log_softmax(-1), plain.softmax(-1), reduction="none").sum(-1)
    want = {
        "tokens": len(text) - 1,
        "perplexity": F.cross_entropy(packed, ids[0, 1:]).exp().item(),
        "against_perplexity": F.cross_entropy(plain, ids[0, 1:]).exp().item(),
        "kl_mean": distance.mean().item(),
        "kl_p99": np.percentile(distance.detach().numpy(), 99),
        "top1_agreement": (plain.argmax(-1) == packed.argmax(-1)).float().mean().item(),
    }
    assert {name: found[name] for name in want} == pytest.approx(want, rel=1e-4)


def test_eval_of_a_text_prints_its_figures(model, tmp_path):
    (tmp_path / "text").write_text("some words to predict")
    result = run("eval", model, "--against", model, "--text", tmp_path / "text", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "tokens          20" in result.output and "top-1 agreement 100.00 %" in result.output
    (tmp_path / "text").write_text("s")
    result = run("eval", model, "--text", tmp_path / "text", "--device", "cpu")
    assert result.exit_code == 1 and "fewer than two tokens" in result.output


def test_generate_loads_in_4_bit(model):
    result = run(
        "generate", model, "hello", "--raw", "--load-in", "4bit", "--max-new-tokens", "4", "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    result = run("generate", model, "hello", "--raw", "--load-in", "5bit", "--device", "cpu")
    assert result.exit_code == 1 and "the format is '5bit'" in result.output
