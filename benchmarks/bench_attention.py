"""Attention op: Taut's kernels beside FlashAttention-2 and cuDNN as PyTorch ships them, forward and backward.

    python benchmarks/bench_attention.py --json benchmarks/results/attention.json

All run in this process on the same shapes in bf16, 16k tokens in all; each figure is TFLOP/s at the median
time, with that of the slowest and the fastest tenth beside it in the JSON. A causal mask counts half the
products, a backward pass 2.5 times the forward. «Dispatched» is what a model runs: cuDNN, maybe. «Uneven»
are packed rows of 256 to 4992 tokens; beside them, «even rows» are as many products in rows of one length.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from taut.kernels.attention import Scoring, attention
from taut.kernels.flash import flash_attention

TOKENS, WIDTH = 16384, 2048
PEERS = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
UNEVEN = [256, 512, 896, 1408, 2048, 2688, 3584, 4992]  # 16384 tokens


def times(call) -> list[float]:
    """Milliseconds: median, fastest and slowest tenth."""
    return triton.testing.do_bench(call, warmup=10, rep=50, quantiles=[0.5, 0.1, 0.9])


def rates(products: float, milliseconds: list[float]) -> dict[str, float]:
    median, fast, slow = (products / ms / 1e9 for ms in milliseconds)
    return {"tflops": round(median, 1), "slow": round(slow, 1), "fast": round(fast, 1)}


def measure(call, inputs: list[torch.Tensor], products: float) -> dict[str, Any]:
    out = call()
    d_out = torch.randn_like(out)
    with torch.no_grad():
        forward = times(call)
    backward = times(lambda: torch.autograd.grad(out, inputs, d_out, retain_graph=True))
    return {"forward": rates(products, forward), "backward": rates(2.5 * products, backward)}


def taut(lengths: list[int], dim: int, causal: bool, op=flash_attention) -> dict[str, Any]:
    heads = WIDTH // dim
    q, k, v = (
        torch.randn(sum(lengths), heads, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
    scoring = Scoring(dim**-0.5, causal)
    return measure(
        lambda: op(q, k, v, starts, max(lengths), scoring),
        [q, k, v],
        count(lengths, dim, causal),
    )


def peer(backend: SDPBackend, length: int, dim: int, causal: bool) -> dict[str, Any] | str:
    shape = (TOKENS // length, WIDTH // dim, length, dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    try:
        with sdpa_kernel(backend):
            return measure(
                lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
                [q, k, v],
                count([length] * shape[0], dim, causal),
            )
    except RuntimeError as error:
        return str(error).splitlines()[0]


def count(lengths: list[int], dim: int, causal: bool) -> float:
    """Floating-point operations of a forward pass."""
    return sum(4 * n * n * WIDTH for n in lengths) / (2 if causal else 1)


def compare(dims: list[int], lengths: list[int]) -> list[dict[str, Any]]:
    rows = []
    for dim in dims:
        for causal in (True, False):
            for length in lengths:
                rows.append(
                    {"dim": dim, "causal": causal, "length": length}
                    | {"taut": taut([length] * (TOKENS // length), dim, causal)}
                    | {"dispatched": taut([length] * (TOKENS // length), dim, causal, attention)}
                    | {name: peer(backend, length, dim, causal) for name, backend in PEERS.items()}
                )
            # As many products in rows of one length: sum(n^2) / TOKENS.
            even = round(sum(n * n for n in UNEVEN) / sum(UNEVEN))
            rows.append(
                {
                    "dim": dim,
                    "causal": causal,
                    "length": "uneven",
                    "taut": taut(UNEVEN, dim, causal),
                    "even": taut([even] * round(TOKENS / even), dim, causal),
                }
            )
    return rows


def show(rows: list[dict[str, Any]]) -> Table:
    table = Table("head dim", "mask", "length", "Taut", "dispatched", "FA2", "cuDNN", "Taut, even rows")
    table.title = "bf16 TFLOP/s, forward; backward"

    def cell(row: dict[str, Any], name: str) -> str:
        got = row.get(name)
        if not isinstance(got, dict):
            return "" if got is None else "refused"
        return f"{got['forward']['tflops']:.0f}; {got['backward']['tflops']:.0f}"

    for row in rows:
        mask = "causal" if row["causal"] else "full"
        cells = [cell(row, name) for name in ("taut", "dispatched", "fa2", "cudnn", "even")]
        table.add_row(str(row["dim"]), mask, str(row["length"]), *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--json", type=Path, help="write the figures here")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    rows = compare(asked.dims, asked.lengths)
    Console(width=110).print(show(rows))
    if asked.json:
        about = {
            "device": torch.cuda.get_device_name(),
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cudnn": torch.backends.cudnn.version(),
        }
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
