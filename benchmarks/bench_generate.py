"""Taut beside transformers on one checkpoint: decode speed, prefill time, load time and peak host memory.

    .venv/bin/python benchmarks/bench_generate.py --json results.json

All run in this process, in turns, with the same weights, dtype, prompt and number of threads; each figure
is a median over the rounds with the smallest and the largest beside it. Loading is measured in a fresh
process each time: memory is the peak of that process less what it held before the load began.

dtype "auto" is what each makes of the file by itself: of a GGUF file Taut on a CPU keeps 4 and 8 bits, as
does llama.cpp (where llama-cpp-python is installed); transformers runs in bfloat16, and dequantizes where it
has no kernels for the packed file.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from taut.hub import default_model

LIBRARIES = ("taut", "transformers", "llama.cpp")
PROMPT = "Write a short story about a lighthouse keeper who finds a message in a bottle."
PACKAGES = ("taut", "torch", "llvmlite", "transformers", "tokenizers", "gguf", "llama_cpp_python")


def libraries(model: str, dtype: str, device: str) -> list[str]:
    """Those that are measured."""
    takes = model.endswith(".gguf") and dtype == "auto" and device == "cpu"
    return [*LIBRARIES[:2], *(LIBRARIES[2:] if takes and find_spec("llama_cpp") else ())]


class LlamaCpp:
    """A `.gguf` file in llama.cpp, with the part of `generate` that is measured here."""

    def __init__(self, model: str):
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self.llama = Llama(model, n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)

    @property
    def nbytes(self) -> int:
        from llama_cpp import llama_model_size

        return llama_model_size(self.llama.model)

    def generate(
        self, input_ids: torch.Tensor, max_new_tokens: int, streamer: Any = None, **ignored: Any
    ) -> torch.Tensor:
        self.llama.reset()
        made = []
        if streamer is not None:
            streamer.put(input_ids)
        for token in self.llama.generate(input_ids[0].tolist(), temp=0.0):
            made.append(token)
            if streamer is not None:
                streamer.put(token)
            if len(made) == max_new_tokens:
                break
        return torch.cat((input_ids, torch.tensor([made])), 1)


def load(library: str, model: str, kind: str, device: str) -> tuple[Any, Any]:
    """The model and its tokenizer, as `library` loads a folder, a Hub id or a `.gguf` file."""
    if library == "llama.cpp":
        return LlamaCpp(model), None
    dtype = kind if kind == "auto" else getattr(torch, kind)
    if library == "taut":
        from taut import AutoModelForCausalLM, AutoTokenizer

        return AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, device_map=device
        ), AutoTokenizer.from_pretrained(model)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, extra = model, {}
    if model.endswith(".gguf"):
        where, extra = str(Path(model).parent), {"gguf_file": Path(model).name}
        dtype = torch.bfloat16 if kind == "auto" else dtype
    loaded = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **extra).to(device).eval()
    return loaded, AutoTokenizer.from_pretrained(where, **extra)


def memory(key: str) -> int:
    """Bytes this process holds (`VmRSS`) or has held at most (`VmHWM`), as Linux counts them. Not
    `ru_maxrss`: a child starts with its parent's."""
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(key))
    return int(line.split()[1]) * 1024


def measure_load(library: str, model: str, dtype: str, device: str) -> dict[str, float]:
    """Loads once, in this process: seconds, and peak bytes above what the process held before."""
    __import__({"llama.cpp": "llama_cpp"}.get(library, library))
    if library == "taut":
        import taut.auto  # noqa: F401  names in `taut` load lazily; importing is not loading
    elif library == "transformers":
        from transformers import AutoModelForCausalLM  # noqa: F401
    before = memory("VmRSS")
    started = time.perf_counter()
    loaded, _ = load(library, model, dtype, device)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    if isinstance(loaded, LlamaCpp):
        size = loaded.nbytes
    else:
        held = (*loaded.parameters(), *loaded.buffers())  # what is packed lies in buffers
        size = sum({t.data_ptr(): t.numel() * t.element_size() for t in held}.values())
    return {"load_seconds": seconds, "load_peak_bytes": memory("VmHWM") - before, "weights_bytes": size}


class Stamps:
    """A streamer for `generate` that notes when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def decode_rate(model: Any, ids: torch.Tensor, count: int) -> float:
    """Tokens a second from the first new token to the last of `count`; ids `[1, length]`."""
    stamps = Stamps()
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        streamer=stamps,
    )
    made = out.shape[1] - ids.shape[1]
    if made != count:
        raise SystemExit(f"{made} new tokens in place of {count}: the rates can't be compared")
    # The prompt comes first, in one put; then one put a token.
    return (count - 1) / (stamps.times[-1] - stamps.times[1])


def prefill_seconds(model: Any, ids: torch.Tensor) -> float:
    """Seconds from a prompt `[1, length]` to its first new token."""
    # Taut would find a prompt again that it has seen; transformers never does.
    options = {"use_cache": False} if hasattr(model, "free_cache") else {}
    started = time.perf_counter()
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, **options
    ).tolist()
    return time.perf_counter() - started


def summary(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": values}


def loads(args: argparse.Namespace, dtype: str, device: str) -> dict[str, dict[str, Any]]:
    """`measure_load` of each library in fresh processes, in turns."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in libraries(args.model, dtype, device)}
    for _ in range(args.load_rounds):
        for library in runs:
            command = [sys.executable, __file__, "--child", library, "--model", args.model]
            command += ["--dtype", dtype, "--device", device]
            if args.threads:
                command += ["--threads", str(args.threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs[library].append(json.loads(done.stdout.splitlines()[-1]))
    return {
        library: {key: summary([run[key] for run in found]) for key in found[0]}
        for library, found in runs.items()
    }


def speeds(args: argparse.Namespace, dtype: str, device: str) -> dict[str, dict[str, Any]]:
    """Decode and prefill of each library in this process, in turns; the first round is not counted."""
    names = libraries(args.model, dtype, device)
    models = {library: load(library, args.model, dtype, device) for library in names}
    _, tokenizer = models["taut"]
    short = tokenizer(PROMPT, return_tensors="pt").input_ids.to(device)
    long = short.repeat(1, args.prefill // short.shape[1] + 1)[:, : args.prefill]
    runs: dict[str, dict[str, list[float]]] = {
        library: {"decode_tokens_per_second": [], "prefill_seconds": []} for library in names
    }
    for turn in range(args.rounds + 1):
        for library in names:
            model, _ = models[library]
            rate, seconds = decode_rate(model, short, args.new_tokens), prefill_seconds(model, long)
            if turn:
                runs[library]["decode_tokens_per_second"].append(rate)
                runs[library]["prefill_seconds"].append(seconds)
    del models
    gc.collect()
    return {library: {key: summary(v) for key, v in found.items()} for library, found in runs.items()}


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    return platform.processor() or platform.machine()


def show(report: dict[str, Any]) -> None:
    """Prints the report as a table: median, smallest and largest of each figure."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(140, Console().width))
    table = Table(title=f"{Path(report['model']).name} on {report['device']}, {report['threads']} threads")
    shown = [name for name in LIBRARIES if any(name in found for found in report["results"].values())]
    for column in ("dtype", "figure", *shown, *(f"Taut / {name}" for name in shown[1:])):
        table.add_column(column, justify="left" if column in ("dtype", "figure") else "right")
    rows = (
        ("decode_tokens_per_second", f"decode {report['new_tokens']} tokens, tok/s", 1, ".1f"),
        ("prefill_seconds", f"prefill {report['prefill']} tokens, ms", 1e3, ".0f"),
        ("load_seconds", "load model and tokenizer, s", 1, ".2f"),
        ("load_peak_bytes", "peak host memory of loading, MB", 1e-6, ".0f"),
        ("weights_bytes", "weights, MB", 1e-6, ".0f"),
    )
    for dtype, found in report["results"].items():
        for key, label, scale, form in rows:
            cells = []
            for library in shown:
                if library not in found:
                    cells.append("")
                    continue
                value = found[library][key]
                low, middle, high = (format(value[k] * scale, form) for k in ("min", "median", "max"))
                cells.append(middle if low == high else f"{middle} ({low} to {high})")
            own = found["taut"][key]["median"]
            ratios = (
                f"{own / found[peer][key]['median']:.2f}" if peer in found else "" for peer in shown[1:]
            )
            table.add_row(dtype, label, *cells, *ratios)
        table.add_section()
    console.print(table)
    console.print(", ".join(f"{name} {number}" for name, number in report["versions"].items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=default_model(), help="folder, .gguf file or Hub id")
    parser.add_argument("--dtype", action="append", choices=("auto", "bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of decode and prefill")
    parser.add_argument("--load-rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prefill", type=int, default=512, help="prompt tokens of the prefill")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: torch's own choice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample here")
    parser.add_argument("--child", choices=LIBRARIES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"  # transformers' bars; the child processes inherit it
    if args.threads:
        torch.set_num_threads(args.threads)
    dtypes = args.dtype or [*(["auto"] if args.model.endswith(".gguf") else []), "bfloat16", "float32"]
    if args.child:
        print(json.dumps(measure_load(args.child, args.model, dtypes[0], args.device)))
        return
    results = {}
    for dtype in dtypes:
        loading, running = loads(args, dtype, args.device), speeds(args, dtype, args.device)
        results[dtype] = {library: loading[library] | running[library] for library in running}
    report = {
        "benchmark": "generate",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": Path(args.model).name if Path(args.model).exists() else args.model,
        "device": device_name(args.device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | versions(),
        "new_tokens": args.new_tokens,
        "prefill": args.prefill,
        "results": results,
    }
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
