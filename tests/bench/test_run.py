"""`taut bench` on a tiny model beside transformers: what it reports, draws and refuses."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

from taut.bench import peers, shapes
from taut.bench.run import Options, measure_all
from taut.bench.shapes import SHAPES
from taut.cli.app import app
from taut.modeling import CausalLM
from tests import encoders
from tests.families import checkpoint

TINY = ["--shape", "tiny-llama", "--device", "cpu"]
SUBJECTS = ["taut", "transformers eager", "transformers sdpa"]


def taut(*arguments: str) -> Result:
    return CliRunner().invoke(app, ("bench", *arguments), env={"COLUMNS": "160"})


def test_everything_is_in_the_report(tmp_path: Path) -> None:
    result = taut(
        *TINY,
        *("--lengths", "8,40", "--batches", "1,3", "--contexts", "12", "--new-tokens", "6", "--repeats", "2"),
        *("--dtype", "float32", "--json", str(tmp_path / "b.json"), "--plot", str(tmp_path / "charts")),
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "b.json").read_text())
    assert report["benchmark"] == "taut bench" and report["dtype"] == "float32"
    assert {"python", "taut", "torch", "transformers"} <= report["versions"].keys()
    assert re.match(r"\d{4}-\d\d-\d\dT", report["date"])
    assert report["device"]["type"] == "cpu" and report["device"]["threads"] == torch.get_num_threads()
    assert {choice["op"] for choice in report["plan"]} >= {"attention of a decode step"}
    assert set(report["agreement"]) == set(SUBJECTS[1:]) and max(report["agreement"].values()) < 1e-4

    points = {(p["subject"], p["what"], p["batch"], p["length"]): p for p in report["points"]}
    grid = [(batch, length) for batch in (1, 3) for length in (8, 40)]
    cases = [(what, *at) for what in ("forward", "generate", "memory") for at in grid]
    cases += [("padded", 3, 8), ("padded", 3, 40), ("decode", 1, 12), ("decode", 3, 12)]
    assert points.keys() == {(subject, *case) for subject in SUBJECTS for case in cases}
    for point in points.values():
        assert point["failed"] is None, point
        assert len(point["samples"]) == (1 if point["what"] == "memory" else 2)
        assert 0 < min(point["samples"]) == point["low"] <= point["median"] <= point["high"]
        assert point["peak_bytes"] >= report["weights_bytes"] > 0
    assert points["taut", "padded", 3, 40]["real_tokens"] == 1 + 20 + 40
    assert points["taut", "forward", 3, 40]["real_tokens"] == 120

    for title in ("forward, all rows full, ms", "decode, 6 new tokens a row, tok/s", "Taut to best peer"):
        assert title in result.stdout
    drawn = {file.name for file in (tmp_path / "charts").iterdir()}
    assert drawn == {
        *("forward-length.png", "forward-batch.png", "padded-length.png", "generate-length.png"),
        *("generate-batch.png", "decode-batch.png", "memory-length.png", "memory-batch.png"),
    }
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in (tmp_path / "charts").iterdir())

    again = taut("--from", str(tmp_path / "b.json"), "--plot", str(tmp_path / "again"))
    assert again.stdout == result.stdout.replace(str(tmp_path / "charts"), str(tmp_path / "again"))
    assert {file.name for file in (tmp_path / "again").iterdir()} == drawn


@pytest.mark.parametrize(("load_in", "form"), [("4bit", "nf4"), ("int8", "int8")])
def test_small_formats_beside_bitsandbytes_and_16_bit(load_in: str, form: str) -> None:
    pytest.importorskip("bitsandbytes")
    options = Options(
        shape="tiny-llama",
        what="forward,decode",
        lengths="8",
        batches="1",
        contexts="6",
        new_tokens=6,
        repeats=1,
        dtype="float32",
        device="cpu",
        peers="sdpa",
        load_in=load_in,
    )
    report = measure_all(options)
    subjects = [f"taut {form}", f"transformers sdpa {form}", "taut float32", "transformers sdpa float32"]
    assert report.subjects() == subjects and all(point.failed is None for point in report.points)
    # The peer computes with the same codes (in the dtype that it has on a CPU; int8 with rounded activations,
    # where Taut's product of few rows takes them as they are), the others with what they were made of.
    assert report.agreement[subjects[1]] < 0.8 * report.agreement[subjects[3]]
    assert report.agreement[subjects[2]] == pytest.approx(report.agreement[subjects[3]], rel=1e-3)


def test_packing_again_is_refused(tmp_path: Path) -> None:
    config = {**SHAPES["tiny-llama"].config, "torch_dtype": "float32"}
    model = CausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "dense")
    CausalLM.from_pretrained(tmp_path / "dense", load_in_8bit=True).save_pretrained(tmp_path / "packed")
    options = {"what": "forward", "lengths": "5", "peers": "none", "device": "cpu"}
    with pytest.raises(ValueError, match="--load-in packs what is in 16 bit"):
        measure_all(Options(model=str(tmp_path / "packed"), load_in="nf4", **options))
    with pytest.raises(ValueError, match="the format is '5bit'; known"):
        measure_all(Options(model=str(tmp_path / "dense"), load_in="5bit", **options))


def test_a_folder_alone_on_all_logits(tmp_path: Path) -> None:
    config = {**SHAPES["tiny-llama"].config, "torch_dtype": "float32"}
    CausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    options = Options(
        model=str(tmp_path),
        what="forward",
        lengths="5",
        batches="2",
        peers="none",
        logits="all",
        device="cpu",
    )
    report = measure_all(options)
    assert [(p.subject, p.batch, p.length) for p in report.points] == [("taut", 2, 5)]
    assert report.model == tmp_path.name and report.agreement == {}
    with pytest.raises(ValueError, match="context of 64 tokens, and a case takes 65"):
        measure_all(Options(model=str(tmp_path), what="forward", lengths="65", peers="none", device="cpu"))


def test_a_peer_that_fails_is_reported_and_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = peers.Transformers.forward

    def fail(self: peers.Transformers, inputs: Any) -> Any:
        if self.name == "transformers eager":
            raise RuntimeError("no such kernel")
        return forward(self, inputs)

    monkeypatch.setattr(peers.Transformers, "forward", fail)
    result = taut(*TINY, "--what", "forward", "--lengths", "4", "--batches", "2", "--repeats", "1")
    assert result.exit_code == 1
    assert "transformers eager, forward 2 x 4: RuntimeError: no such kernel" in result.stdout
    assert "transformers sdpa: scores within" in result.stdout
    assert "transformers eager: scores" not in result.stdout


# Parameters that the published models have.
SIZES = {
    "llama-7b": 6_738_415_616,
    "falcon-7b": 6_921_720_704,
    "mistral-7b": 7_241_732_096,
    "llama-8b": 8_030_261_248,
    "bert-base": 109_482_240,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "gpt-oss-20b": 20_914_757_184,
}


@pytest.mark.parametrize("name", SIZES)
def test_shapes_are_the_published_models(name: str) -> None:
    shape = SHAPES[name]
    options = {key: value for key, value in shape.config.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(shape.config["model_type"], **options)
    with torch.device("meta"):
        model = getattr(transformers, shape.auto).from_config(config)
    assert model.num_parameters() == SIZES[name]
    if shape.known and shape.generates:
        assert CausalLM.from_config(dict(shape.config), device="meta").num_parameters() == SIZES[name]


ERRORS = [
    (["--shape", "lama-7b"], "nearest: llama-7b"),
    (["--shape", "llama-7b", "--model", "x"], "--model and --shape"),
    ([*TINY, "--what", "forwards"], "nearest: forward"),
    ([*TINY, "--what", ","], "--what is empty"),
    ([*TINY, "--what", "padded", "--batches", "1"], "--batches has only 1"),
    ([*TINY, "--lengths", "8,x"], "--lengths is '8,x'"),
    ([*TINY, "--batches", "0"], "--batches is '0'"),
    ([*TINY, "--contexts", ""], "--contexts is ''"),
    ([*TINY, "--new-tokens", "4"], "--new-tokens is 4"),
    ([*TINY, "--repeats", "0"], "--repeats is 0"),
    ([*TINY, "--dtype", "int3"], "--dtype is 'int3'"),
    ([*TINY, "--logits", "some"], "--logits is 'some'"),
    ([*TINY, "--peers", "transformer"], "nearest: transformers"),
    ([*TINY, "--json", "/nowhere/b.json"], "/nowhere does not exist"),
    ([*TINY, "--json", "/"], "is a folder"),
    ([*TINY, "--plot", __file__], "is a file"),
    (["--shape", "tiny-llama", "--device", "tpu"], "tpu"),
    (["--from", "/nowhere/b.json"], "/nowhere/b.json cannot be read"),
    (["--from", __file__], "is no report of `taut bench`"),
    ([*TINY, "--from", "b.json"], "nothing but --plot"),
    (["--model", "/nowhere/model.gguf"], "/nowhere/model.gguf"),
]


@pytest.mark.parametrize(("arguments", "named"), ERRORS, ids=lambda value: " ".join(value)[:60])
def test_an_error_is_one_line_before_anything_is_measured(arguments: list[str], named: str) -> None:
    result = taut(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.search(r"^error: [^\n]+\n\Z", result.stderr, re.M), result.stderr
    assert named in result.stderr


def test_a_shape_of_a_family_that_taut_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "families", lambda: ["llama"])
    with pytest.raises(ValueError, match=r"'mistral'.* does not have; shapes it has: llama-7b, llama-8b$"):
        shapes.find("mistral-7b")


def test_an_encoder_generates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes.Shape, "known", property(lambda self: True))
    with pytest.raises(ValueError, match=r"bert-base is an encoder.* it has: forward, padded, memory"):
        measure_all(Options(shape="bert-base", what="forward,decode"))
    folder = str(checkpoint(encoders.CASES[0], "AutoModelForMaskedLM"))
    with pytest.raises(ValueError, match=r"is an encoder, which generates no text; it has: forward, padded"):
        measure_all(Options(model=folder, what="generate", device="cpu"))
    options = {"what": "forward,padded", "lengths": "20", "batches": "3", "repeats": 1, "device": "cpu"}
    report = measure_all(Options(model=folder, peers="sdpa", **options))
    assert {(p.subject, p.what) for p in report.points} == {
        (subject, what) for subject in ("taut", "transformers sdpa") for what in ("forward", "padded")
    }
    assert report.agreement["transformers sdpa"] < 1e-5


@pytest.mark.parametrize(
    ("missing", "arguments", "named"),
    [("transformers", [], "pip install transformers"), ("matplotlib", ["--plot", "charts"], "taut[plot]")],
)
def test_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, missing: str, arguments: list[str], named: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    result = taut(*TINY, *arguments)
    assert result.exit_code == 1 and named in result.stderr


def test_flash_attn_is_left_out_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def wanted(**place: Any) -> tuple[list[str], str]:
        found, notes = peers.attentions("all", **place)
        return found, " ".join(notes)

    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found, note = wanted(dtype=torch.bfloat16, device=gpu)
    assert found == ["eager", "sdpa"] and "not installed" in note
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert wanted(dtype=torch.bfloat16, device=gpu) == (["eager", "sdpa", "flash_attention_2"], "")
    for place in ({"dtype": torch.float32, "device": gpu}, {"dtype": torch.bfloat16, "device": cpu}):
        found, note = wanted(**place)
        assert found == ["eager", "sdpa"] and "on a GPU" in note


def test_peers_are_imported_only_when_they_run() -> None:
    code = (
        "import sys\nfrom taut.bench.run import Options, measure_all\n"
        "options = Options(shape='tiny-llama', what='forward', lengths='4', batches='1', peers='none',"
        " device='cpu')\nmeasure_all(options)\n"
        "print(sorted({'transformers', 'matplotlib', 'flash_attn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
