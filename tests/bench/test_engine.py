"""`benchmarks/bench_engine.py` runs, on a shape for a CPU, and reports what it measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_engine.py"


def test_a_small_run(tmp_path: Path, monkeypatch, capsys) -> None:
    spec = importlib.util.spec_from_file_location("bench_engine", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_engine", module)
    spec.loader.exec_module(module)
    out = tmp_path / "engine.json"
    options = "--shape tiny-llama --dtype float32 --device cpu --requests 7 --prompts 3 20 --outputs 2 20"
    module.main([*options.split(), "--rounds", "2", "--warm", "2", "--json", str(out)])
    report = json.loads(out.read_text())
    assert report["new_tokens"] == round(report["taut"]["tokens_per_second"] * report["taut"]["median"])
    shown = capsys.readouterr().out
    for name in ("taut", "transformers"):
        assert len(report[name]["seconds"]) == 2 and name in shown
    module.main([*options.split(), "--within", "0.001", "--warm", "2", "--json", str(out)])
    cut = json.loads(out.read_text())
    for name in ("taut", "transformers"):
        assert len(cut[name]["seconds"]) == 1 and cut[name]["tokens"] < cut["new_tokens"]
    assert capsys.readouterr().out.count("cut off after") == 3  # the first table is of Taut alone
    assert 1 < report["taut"]["steps"] <= 20 and report["limit"] is None
    kinds = report["taut"]["kinds"]
    assert kinds["prefill"]["count"] == 1 and kinds["chained"]["count"] == 0  # there are no graphs on a CPU
    assert kinds["prefill"]["count"] + kinds["decode"]["count"] == report["taut"]["steps"]
    model = module.make_model(module.find("tiny-llama"), context=64, dtype=module.torch.float32, device="cpu")
    load = module.Load([[3] * 10, [4] * 5], [3, 2])
    bound = module.limit(model, load, steps=3, tflops=1e-6, tbs=1e-6)
    layers, width = 2, 2 * 16 * 2 * 4  # two kv heads of 16 numbers, keys and values, 4 bytes
    assert bound["cache"] == layers * width * (10 + 11 + 12 + 5 + 6) / 1e6
    assert bound["weights"] == 3 * model.get_memory_footprint() / 1e6
    assert bound["all"] == bound["cache"] + bound["weights"] + bound["prompts"]
