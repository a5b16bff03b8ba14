"""`benchmarks/stress_engine.py`, for seconds here: every answer right, every page back, no request left."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "stress_engine.py"


def test_a_short_stress(monkeypatch) -> None:
    spec = importlib.util.spec_from_file_location("stress_engine", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "stress_engine", module)
    spec.loader.exec_module(module)
    report = module.main(["--minutes", "0.03", "--round", "1", "--device", "cpu", "--growth", "100"])
    kinds = {name.split(":")[0] for name in report["counts"]}
    assert kinds == set(module.KINDS) and report["requests"] > 30
