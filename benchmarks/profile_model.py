"""Where the time of a decode step or of a forward goes: every kernel of a GPU, and what lies between them.

    python benchmarks/profile_model.py --load-in nf4 --batches 1,8,32 --json profile_nf4.json
    python benchmarks/profile_model.py --shape bert-base --dtype float16 --real 100,73,50,27

A forward scores the last position of one row; of an encoder it is a padded batch, of whose tokens so many per
cent are real. Decode steps are those of the model's own engine, from the tenth new token on. Idle is what no
kernel takes of the time from the first one's start to the last one's end. Kernels that begin before the one
ahead has ended (programmatic dependent launch) are counted from when it has. The profiler itself slows the
host, so idle time between forwards that are no graph is more than without it.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections import defaultdict
from pathlib import Path

import torch
import triton
from bench_encoder import grid
from rich.console import Console
from rich.table import Table

from taut.bench.shapes import find
from taut.bench.subjects import make_model, quantized
from taut.engine.request import Request, SamplingParams
from taut.engine.resident import Resident
from taut.quant.config import named

WARM = 10


def traced(work, count: int) -> dict:
    """Kernels of `work`, which does the same `count` times: name -> microseconds and calls, of one time."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    spans = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in profile.events()
        if e.device_type == torch.autograd.DeviceType.CUDA and "Sync" not in e.name
    )
    kernels, end, idle = defaultdict(lambda: [0.0, 0]), spans[0][0], 0.0
    for start, stop, name in spans:
        idle += max(0.0, start - end)
        kernels[name][0] += max(0.0, stop - max(start, end))
        kernels[name][1] += 1
        end = max(end, stop)
    return {
        "us": (end - spans[0][0]) / count,
        "idle_us": idle / count,
        "kernels": {
            name: {"us": us / count, "calls": calls / count}
            for name, (us, calls) in sorted(kernels.items(), key=lambda kernel: -kernel[1][0])
        },
    }


def decode(model, batch: int, context: int, steps: int) -> dict:
    ids = torch.randint(0, model.config.vocab_size, (batch, context)).tolist()

    def ready():
        requests = [Request(row, SamplingParams(WARM + steps), scope=None) for row in ids]
        engine = Resident.of(model).engine(model, requests)
        for request in requests:
            engine.submit(request)
        while min(len(request.output) for request in requests) < WARM:
            engine.step()
        return engine

    def finish(engine):
        while engine.has_work:
            engine.step()

    finish(ready())
    engine = ready()
    return traced(lambda: finish(engine), steps)


def forward(model, batch: int, length: int, times: int = 3) -> dict:
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device=model.device)

    def work():
        for _ in range(times):
            model(ids, logits_to_keep=1)

    work()
    return traced(work, times)


def padded(model, rows: int, length: int, share: float, times: int = 10) -> dict:
    given = grid(rows, length, share, model.device)

    def work():
        for _ in range(times):
            model(**given)

    work()
    return traced(work, times)


def show(console: Console, title: str, found: dict) -> None:
    table = Table(title=f"{title}: {found['us']:.0f} us, {found['idle_us']:.0f} of them idle")
    for column in ("kernel", "calls", "us each", "us", "share"):
        table.add_column(column, justify="left" if column == "kernel" else "right", no_wrap=True)
    for name, kernel in list(found["kernels"].items())[:14]:
        each, share = kernel["us"] / kernel["calls"], kernel["us"] / found["us"]
        table.add_row(
            name[:60], f"{kernel['calls']:.1f}", f"{each:.2f}", f"{kernel['us']:.0f}", f"{share:.1%}"
        )
    console.print(table)


@torch.no_grad()
def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",") if number]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-7b")
    parser.add_argument("--load-in", default="16bit", help="16bit, nf4, fp4 or int8")
    parser.add_argument("--batches", type=numbers, default=[1], help="rows of decode steps")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--lengths", type=numbers, default=[512], help="of forwards of one row")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=32, help="of a padded batch through an encoder")
    parser.add_argument("--real", type=numbers, default=[100], help="real tokens of it, in per cent")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, help="write what was found here")
    asked = parser.parse_args()
    shape, context = find(asked.shape), max(asked.lengths)
    if shape.generates:
        context = max(context, asked.context + WARM + asked.steps)
    dtype = getattr(torch, asked.dtype)
    model = make_model(shape, context=context, dtype=dtype, device=torch.device("cuda"))
    if asked.load_in != "16bit":
        model = quantized(model, named(asked.load_in))
    console, found = Console(width=110), {}

    def add(title: str, profile: dict) -> None:
        found[f"{asked.shape}, {asked.load_in}, {title}"] = profile
        show(console, title, profile)

    for length in asked.lengths:
        if shape.generates:
            add(f"forward of 1 x {length}", forward(model, 1, length))
            continue
        for share in asked.real:
            profile = padded(model, asked.rows, length, share / 100)
            add(f"{asked.rows} x {length}, {share} % real", profile)
    for batch in asked.batches if shape.generates else ():
        add(f"decode of {batch} x {asked.context}", decode(model, batch, asked.context, asked.steps))
    if asked.json:
        facts = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "date": datetime.date.today().isoformat(),
        }
        asked.json.write_text(json.dumps(facts | {"found": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
