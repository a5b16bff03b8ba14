"""Time to the first token of a prompt: in a fresh process, with and without kernels on disk, and warm.

    python benchmarks/bench_first_token.py --shape llama-7b --json benchmarks/results/first_token.json

Each figure of a fresh process is one process, from its start to the first token, the making of the model
(random weights) aside; warm ones are prompts of their own, so that no cache of prefixes helps.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BEGAN = time.perf_counter()


def here(shape: str, length: int, repeats: int, device: str) -> dict:
    """Measure in this process."""
    import torch
    import triton

    from taut.bench import shapes, subjects
    from taut.bench.measure import synchronize
    from taut.placement import pick_device

    imported = time.perf_counter()
    where = pick_device(device)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    model = subjects.make_model(shapes.find(shape), context=length + 1, dtype=dtype, device=where)
    synchronize(where)
    times = []
    for _ in range(repeats + 3):
        ids = torch.randint(0, model.config.vocab_size, (1, length), device=where)
        synchronize(where)
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=1, do_sample=False)
        synchronize(where)
        times.append(time.perf_counter() - start)
    return {
        "device": torch.cuda.get_device_name() if where.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "to_first_token_s": imported - BEGAN + times[0],
        "warm_ms": [1000 * t for t in times[3:]],
    }


def fresh(arguments: list[str], cache: str) -> dict:
    """Measure in a process of its own, with kernels kept in `cache`."""
    env = {**os.environ, "TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, "--inside", *arguments]
    return json.loads(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-7b")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        print(json.dumps(here(asked.shape, asked.length, asked.repeats, asked.device)))
        return
    arguments = ["--shape", asked.shape, "--length", str(asked.length), "--device", asked.device]
    with tempfile.TemporaryDirectory() as cache:
        cold = fresh([*arguments, "--repeats", "1"], cache)
        warm = fresh([*arguments, "--repeats", str(asked.repeats)], cache)
    times = sorted(warm["warm_ms"])
    found = {
        "about": {k: warm[k] for k in ("device", "torch", "triton")}
        | {"date": datetime.date.today().isoformat(), "shape": asked.shape, "length": asked.length},
        "fresh process, kernels compiled": cold["to_first_token_s"],
        "fresh process, kernels on disk": warm["to_first_token_s"],
        "warm_ms": times,
    }
    print(f"{asked.shape}, prompt of {asked.length} tokens, {warm['device']}")
    print(f"fresh process, kernels to be compiled: {cold['to_first_token_s']:.1f} s to the first token")
    print(f"fresh process, kernels on disk: {warm['to_first_token_s']:.1f} s")
    print(f"warm: {statistics.median(times):.1f} ms ({times[0]:.1f} to {times[-1]:.1f})")
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
