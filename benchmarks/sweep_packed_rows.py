"""Every cut of the few-row products with 4- and 8-bit weights on one GPU, beside the one that is chosen.

    python benchmarks/sweep_packed_rows.py --bits 4 --rows 1,8,32 --json cuts.json

For the products of a Llama-7B block: microseconds a call, the median of graph replays that rotate among
copies of the weight, so that nothing is read from the L2 cache. What wins here is for `cut_of` in
`taut/kernels/packed_rows.py` to choose. Compiling takes longer than measuring: processes share it first
(`--jobs`).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from itertools import product as combinations
from itertools import starmap
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from bench_decode_ops import DEVICE, DTYPE, time
from torch import Tensor
from triton import next_power_of_2
from triton.runtime.errors import OutOfResources

from taut.kernels.device import Workspace
from taut.kernels.packed import Scales
from taut.kernels.packed_rows import Cut, cut_of, product
from taut.quant.blockwise import CODES

SHAPES = {  # outputs, inputs, gated
    "qkv": (12288, 4096, False),
    "o": (4096, 4096, False),
    "gate_up": (22016, 4096, True),
    "down": (4096, 11008, False),
}
TILES, AHEAD, SIDE, SHARED, SPLITS = (1, 2), (1, 2, 4), (1, 2), (2, 4, 8, 16), (1, 2)
LOOKUPS = {4: (0, 2, 4), 8: (0,)}


def cuts(gated: bool, rows: int, bits: int) -> list[Cut]:
    """All that are worth a try."""
    found = combinations((2,) if gated else TILES, AHEAD, SIDE, SHARED, SPLITS, LOOKUPS[bits])
    return [cut for cut in starmap(Cut, found) if worthwhile(cut, rows)]


def worthwhile(cut: Cut, rows: int) -> bool:
    """Not what fills a table for two warps, nor, beside the x of many rows, what has no registers for so many
    codes; splits only where a program is of middling size."""
    warps = cut.wn * cut.wk
    if warps > 16 or (cut.lookups and warps <= 2) or (cut.splits > 1 and (cut.wn > 1 or warps not in (4, 8))):
        return False
    return rows <= 16 or (cut.ahead <= 2 and cut.lookups != 2)


def weights(outputs: int, inputs: int, gated: bool, bits: int, copies: int) -> list[Callable[..., Tensor]]:
    """Products `(x, cut=...)` with weights of their own."""
    made = []
    for _ in range(copies):
        if bits == 4:
            codes = torch.randint(0, 256, (outputs * inputs // 2,), device=DEVICE, dtype=torch.uint8)
        else:
            codes = torch.randint(-127, 128, (outputs, inputs), device=DEVICE, dtype=torch.int8)
        scales = Scales(torch.rand(outputs * inputs // 64 if bits == 4 else outputs, device=DEVICE))
        values, act = CODES["nf4"] if bits == 4 else None, "silu" if gated else None
        made.append(partial(product, codes=codes, scales=scales, outputs=outputs, values=values, act=act))
    return made


def compiled(rows: int, inputs: int, gated: bool, bits: int, cut: Cut) -> None:
    """Compile, for a weight of a few outputs, what serves all."""
    x = torch.randn(rows, inputs, device=DEVICE, dtype=DTYPE)
    with suppress(OutOfResources):
        weights(256, inputs, gated, bits, 1)[0](x, cut=cut)
        torch.cuda.synchronize()


def measured(memory: Workspace, made: list[Callable[..., Tensor]], x: Tensor, cut: Cut) -> float:
    try:
        return median(time([partial(w, x, cut=cut) for w in made], memory, 2 * len(made), rounds=5))
    except OutOfResources:
        return float("inf")


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=numbers, default=[4, 8])
    parser.add_argument("--rows", type=numbers, default=[1, 8, 16, 32, 64])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    kernels = {}
    for bits, rows, (_, inputs, gated) in combinations(asked.bits, asked.rows, SHAPES.values()):
        columns = next_power_of_2(-(-rows // 8))
        for cut in cuts(gated, rows, bits):
            # Compiled alike: all numbers of rows that fill as many columns, all inputs that fit alike.
            key = bits, columns, inputs // 64 % cut.ahead, gated, cut
            kernels.setdefault(key, (rows, inputs, gated, bits, cut))
    with ProcessPoolExecutor(asked.jobs, get_context("spawn")) as pool:
        list(pool.map(compiled, *zip(*kernels.values(), strict=True), chunksize=2))

    memory, found = Workspace.of(DEVICE, 1 << 24), []
    for bits, (name, (outputs, inputs, gated)), rows in combinations(asked.bits, SHAPES.items(), asked.rows):
        made = weights(outputs, inputs, gated, bits, max(2, 160_000_000 * 8 // (outputs * inputs * bits)))
        x = torch.randn(rows, inputs, device=DEVICE, dtype=DTYPE)
        chosen = cut_of(rows, outputs // 2 if gated else outputs, inputs, gated, bits, DEVICE)
        tried = {chosen, *cuts(gated, rows, bits)}
        us = {cut: measured(memory, made, x, cut) for cut in tried}
        best = sorted(us, key=us.get)
        found += [
            {"product": name, "rows": rows, "bits": bits, "us": us[cut], "chosen": cut == chosen}
            | asdict(cut)
            for cut in best
        ]
        told = ", ".join(f"{us[cut]:.1f} {tuple(asdict(cut).values())}" for cut in best[:4])
        mine = tuple(asdict(chosen).values())
        print(f"{bits} bits, {name}, {rows} rows: chosen {us[chosen]:.1f} {mine}; {told}", flush=True)
    if asked.json:
        facts = {
            "device": torch.cuda.get_device_name(DEVICE),
            "date": datetime.date.today().isoformat(),
            "versions": {name: version(name) for name in ("torch", "triton")},
            "unit": "microseconds a call, median over replays",
        }
        asked.json.write_text(json.dumps(facts | {"results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
