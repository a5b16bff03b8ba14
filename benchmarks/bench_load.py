"""Loading a checkpoint in 16, 4 and 8 bits: time and peaks of memory, beside transformers + bitsandbytes.

    python benchmarks/bench_load.py --shape llama-7b --json benchmarks/results/load.json

A checkpoint of the shape with random weights is written to `--folder` (a temporary one by default), or
`--model` names one that is there. Every load runs in a process of its own, in turns, on files that the page
cache holds; the clock runs from before the load to an idle device, with everything imported and the device
awake. GPU figures are those of torch's allocator: what it had allocated at most, and what it has taken from
the device. Host memory is the peak of the process above what it held before. Each figure is a median over the
rounds, with all of them in the JSON.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from taut.bench import shapes
from taut.bench.measure import synchronize
from taut.bench.subjects import make_model

LIBRARIES = ("taut", "transformers")
FORMATS = ("bf16", "nf4", "nf4-double", "int8")
PACKAGES = ("taut", "torch", "transformers", "bitsandbytes", "safetensors")
OPTIONS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
UNITS = {  # of each figure, its column, what it is divided by, and decimals
    "seconds": ("seconds", 1.0, 2),
    "weights_bytes": ("weights, GB", 1e9, 2),
    "device_peak_bytes": ("GPU peak, GB", 1e9, 2),
    "device_reserved_bytes": ("GPU reserved, GB", 1e9, 2),
    "host_peak_bytes": ("host peak, GB", 1e9, 2),
}


def write(shape: str, folder: Path, device: torch.device) -> None:
    """A checkpoint of the shape with random bfloat16 weights."""
    found = shapes.find(shape)
    model = make_model(found, context=1, dtype=torch.bfloat16, device=device)
    model.save_pretrained(folder)


def touch(folder: Path) -> None:
    """Read all files once, so that the page cache holds them."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 26):
                pass


def memory(key: str) -> int:
    """Bytes that this process holds (`VmRSS`) or has held at most (`VmHWM`), as Linux counts them."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(key))
    return int(line.split()[1]) * 1024


def measure(library: str, form: str, folder: str, device: torch.device) -> dict[str, float]:
    """One load, in this process."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": str(device)}
    if library == "taut":
        from taut import AutoModelForCausalLM, BitsAndBytesConfig
    else:
        from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(folder))]  # imports the family
    if form != "bf16":
        if library == "transformers":
            import bitsandbytes  # noqa: F401
        options["quantization_config"] = BitsAndBytesConfig(**OPTIONS[form])
    if device.type == "cuda":
        torch.zeros(1, device=device)
        synchronize(device)
    before, allocated = memory("VmRSS"), 0
    if device.type == "cuda":
        allocated = torch.cuda.memory_allocated(device)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    synchronize(device)
    found = {
        "seconds": time.perf_counter() - started,
        "weights_bytes": model.get_memory_footprint(),
        "host_peak_bytes": memory("VmHWM") - before,
    }
    if device.type == "cuda":
        found["weights_bytes"] = torch.cuda.memory_allocated(device) - allocated
        found["device_peak_bytes"] = torch.cuda.max_memory_allocated(device) - allocated
        found["device_reserved_bytes"] = torch.cuda.memory_reserved(device)
    return found


def in_process(library: str, form: str, folder: Path, device: torch.device) -> dict[str, float] | str:
    """One load in a process of its own; why there is none where it fails."""
    command = [sys.executable, __file__, "--one", library, form, str(folder), "--device", str(device)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return json.loads(done.stdout.splitlines()[-1])


def show(found: dict[tuple[str, str], dict[str, list[float]]]) -> None:
    keys = [key for key in UNITS if any(key in figures for figures in found.values())]
    table = Table("format", "library", *(UNITS[key][0] for key in keys))
    for (form, library), figures in found.items():
        cells = []
        for key in keys:
            _, unit, places = UNITS[key]
            cells.append(f"{statistics.median(figures[key]) / unit:.{places}f}" if figures.get(key) else "")
        table.add_row(form, library, *cells)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-7b", help="a shape of taut bench")
    parser.add_argument("--model", type=Path, help="the folder of a checkpoint, in place of --shape")
    parser.add_argument("--folder", type=Path, help="where to write the checkpoint, and leave it")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--one", nargs=3, metavar=("LIBRARY", "FORMAT", "FOLDER"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    device = torch.device(asked.device)
    if asked.one:
        print(json.dumps(measure(*asked.one, device)))
        return
    with tempfile.TemporaryDirectory(prefix="taut-load-") as temporary:
        folder = asked.model or asked.folder or Path(temporary)
        if asked.model is None and not (folder / "config.json").is_file():
            print(f"writing {asked.shape} to {folder}", flush=True)
            write(asked.shape, folder, device)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        touch(folder)
        found: dict[tuple[str, str], dict[str, list[float]]] = {}
        for _ in range(asked.rounds):
            for form in asked.formats:
                for library in asked.libraries:
                    got = in_process(library, form, folder, device)
                    if isinstance(got, str):
                        print(f"{library}, {form}: {got}", flush=True)
                        continue
                    print(f"{library}, {form}: {got['seconds']:.2f} s", flush=True)
                    figures = found.setdefault((form, library), {})
                    for key, value in got.items():
                        figures.setdefault(key, []).append(value)
    show(found)
    if asked.json:
        about = {
            "model": asked.shape if asked.model is None else str(asked.model),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            **{name: version(name) for name in PACKAGES},
        }
        rows = [{"format": form, "library": library, **figures} for (form, library), figures in found.items()]
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
