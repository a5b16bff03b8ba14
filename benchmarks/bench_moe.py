"""A layer of experts: Taut's grouped products in 16, 8 and 4 bits beside torch._grouped_mm and a loop.

    python benchmarks/bench_moe.py --json benchmarks/results/moe.json

Each figure is the median time of a layer's router and experts, over tokens that choose experts of their own
each time, with the fastest and the slowest beside it in the JSON. On a GPU what waits for nothing is replayed
from a CUDA graph; the loop waits for its counts, and its time is the host's. TB/s counts the weights of the
experts in use once, TFLOP/s a multiplication and an addition for each weight that a token meets. `train` is a
forward and a backward to input and weights. On a CPU the shapes are a sixteenth as wide, and only what runs
there is measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from taut.config import Moe
from taut.kernels import moe
from taut.kernels.act import glu
from taut.kernels.dispatch import ops
from taut.layers.moe import MoeMlp
from taut.quant.config import named
from taut.quant.stored import Quantize

SHAPES = {  # dim, and the experts
    "Mixtral-8x7B": (4096, Moe(8, 2, 14336, "silu", normalised=True)),
    "Qwen3-30B-A3B": (2048, Moe(128, 8, 768, "silu", normalised=True)),
    "GPT-OSS-20B": (2880, Moe(32, 4, 2880, "gelu_quick", normalised=True, bias=True, limit=7.0)),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
INPUTS = 8  # different tokens that a measurement goes through


@dataclass
class Result:
    """Microseconds a call, and what that is of the memory's and the multipliers' speed."""

    shape: str
    tokens: int
    by: str
    us: float
    fast: float
    slow: float
    tbs: float
    tflops: float


def make(dim: int, config: Moe, device: torch.device, form: str | None = None) -> MoeMlp:
    """A layer with random weights; `form`: how its experts are packed."""
    torch.manual_seed(0)
    with torch.device(device):
        layer = MoeMlp(config, dim, dtype=torch.bfloat16)
    for param in layer.parameters():
        torch.nn.init.normal_(param, std=0.02)
    if form is not None:
        packer = Quantize(named(form))
        for linear in (layer.experts.gate_up_proj, layer.experts.down_proj):
            rows = config.hidden if linear.parts else dim
            matrices = [matrix for expert in linear.weight.detach() for matrix in expert.split(rows)]
            linear.pack([packer(None, lambda m=m: m, m.device) for m in matrices])
    return layer.requires_grad_(form is None)


def grouped_mm(layer: MoeMlp, x: Tensor) -> Tensor:
    """The layer by PyTorch's grouped product."""
    config, experts = layer.config, layer.experts
    weights, chosen = layer.gate(x)
    own, order = chosen.flatten().sort(stable=True)
    each = torch.arange(1, config.experts + 1, dtype=own.dtype, device=x.device)
    ends = torch.searchsorted(own, each, out_int32=True)
    rows = x[order // config.chosen]
    first, second = experts.gate_up_proj, experts.down_proj
    y = torch._grouped_mm(rows, first.weight.mT, offs=ends)
    y = y if first.bias is None else y + first.bias[own.long()]
    y = ops("act", y).glu(y, config.act, config.limit)
    y = torch._grouped_mm(y, second.weight.mT, offs=ends)
    y = y if second.bias is None else y + second.bias[own.long()]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    y = y[back].unflatten(0, (-1, config.chosen))
    return (y * weights.unsqueeze(-1).to(y.dtype)).sum(1)


def loop(layer: MoeMlp, x: Tensor) -> Tensor:
    """The layer by a product for each expert in use."""
    config, experts = layer.config, layer.experts
    weights, chosen = layer.gate(x)
    first, second = experts.gate_up_proj.products(), experts.down_proj.products()
    return moe.mixture(x, weights, chosen, config.experts, first, second, config.act, config.limit)


def every_expert(layer: MoeMlp, x: Tensor) -> Tensor:
    """The layer by all experts for all tokens, as if it were dense."""
    config, experts = layer.config, layer.experts
    weights, chosen = layer.gate(x)
    first, second = experts.gate_up_proj, experts.down_proj
    y = torch.einsum("td,eod->eto", x, first.weight)
    y = y if first.bias is None else y + first.bias[:, None]
    y = glu(y, config.act, config.limit)
    y = torch.einsum("eth,edh->etd", y, second.weight)
    y = y if second.bias is None else y + second.bias[:, None]
    shares = torch.zeros(x.shape[0], config.experts, dtype=y.dtype, device=x.device)
    shares.scatter_(1, chosen.long(), weights.to(y.dtype))
    return torch.einsum("te,etd->td", shares, y)


def train(call: Callable[[Tensor], Tensor], layer: MoeMlp) -> Callable[[Tensor], object]:
    """A forward and a backward of `call`."""
    learned = [p for p in layer.parameters() if p.requires_grad]

    def step(x: Tensor) -> object:
        x = x.detach().requires_grad_()
        out = call(x)
        return torch.autograd.grad(out, (x, *learned), torch.ones_like(out))

    return step


def replayed(call: Callable[[Tensor], object], inputs: list[Tensor], rounds: int) -> list[float]:
    """Microseconds a call, each round one replay of a graph of a call for each input."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for x in inputs[:2]:
            call(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in inputs:
            call(x)
    taken = []
    for _ in range(rounds + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) * 1e3 / len(inputs))
    return taken[1:]


def timed(call: Callable[[Tensor], object], inputs: list[Tensor], rounds: int) -> list[float]:
    """Microseconds a call by the host's clock."""
    taken = []
    for _ in range(rounds + 1):
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        for x in inputs:
            call(x)
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        taken.append((time.perf_counter() - started) * 1e6 / len(inputs))
    return taken[1:]


def bits(form: str | None) -> float:
    return {None: 16, "nf4": 4.5, "int8": 8}[form]


def measure(name: str, counts: list[int], device: torch.device, rounds: int, training: bool) -> list[Result]:
    dim, config = SHAPES[name]
    if device.type == "cpu":
        dim, config = dim // 16, replace(config, hidden=config.hidden // 16)
    matrix = 3 * dim * config.hidden  # weights of an expert
    found = []
    for form in (None, "nf4", "int8"):
        layer = make(dim, config, device, form)
        calls: dict[str, Callable[[Tensor], object]] = {f"taut {form or 'bf16'}": layer}
        if form is None:
            calls |= {f.__name__: (lambda x, f=f, n=layer: f(n, x)) for f in (grouped_mm, loop, every_expert)}
        for tokens in counts:
            inputs = [torch.randn(tokens, dim, dtype=torch.bfloat16, device=device) for _ in range(INPUTS)]
            with torch.no_grad():
                used = statistics.mean(layer.gate(x)[1].unique().numel() for x in inputs)
                want = layer(inputs[0]).float()
            for by, call in calls.items():
                if by == "every_expert" and tokens > 64:
                    continue
                for kind in ("", " train") if training and form is None and tokens >= 256 else ("",):
                    step = train(call, layer) if kind else call
                    try:
                        with torch.set_grad_enabled(bool(kind)):
                            off = ((call(inputs[0]).float() - want).norm() / want.norm()).item()
                            assert off < 0.02, (by, off)
                            graphed = device.type == "cuda" and by != "loop" and not kind
                            taken = (replayed if graphed else timed)(step, inputs, rounds)
                    except (RuntimeError, NotImplementedError) as error:
                        print(
                            f"{name}, {tokens} tokens, {by}{kind}: {str(error).splitlines()[0]}", flush=True
                        )
                        continue
                    us = statistics.median(taken)
                    work = 2 * matrix * tokens * config.chosen * (3 if kind else 1)
                    read = used * matrix * bits(form) / 8
                    made = Result(
                        name, tokens, by + kind, us, min(taken), max(taken), read / us / 1e6, work / us / 1e6
                    )
                    found.append(made)
                    print(
                        f"{name:14} {tokens:5} {made.by:18} {us:10.1f} us {made.tbs:5.2f} TB/s "
                        f"{made.tflops:6.1f} TFLOP/s",
                        flush=True,
                    )
        del layer, calls
    return found


def show(found: list[Result]) -> None:
    for shape in dict.fromkeys(result.shape for result in found):
        own = [result for result in found if result.shape == shape]
        subjects = list(dict.fromkeys(result.by for result in own))
        table = Table("tokens", *subjects, title=f"{shape}: microseconds a layer", title_justify="left")
        for tokens in dict.fromkeys(result.tokens for result in own):
            at = {result.by: result.us for result in own if result.tokens == tokens}
            table.add_row(str(tokens), *(f"{at[by]:.0f}" if by in at else "" for by in subjects))
        Console(width=150).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 1 to 4096; on a CPU 1, 4 and 32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--train", action="store_true", help="a forward with its backward too, from 256 tokens"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    asked = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts = asked.tokens or (TOKENS if device.type == "cuda" else (1, 4, 32))
    found = []
    for name in asked.shapes:
        found += measure(name, counts, device, asked.rounds, asked.train)
        if asked.json:
            about = {
                "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
                "date": datetime.date.today().isoformat(),
                "python": platform.python_version(),
                "torch": torch.__version__,
            }
            asked.json.parent.mkdir(parents=True, exist_ok=True)
            rows = [asdict(result) for result in found]
            asked.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    show(found)


if __name__ == "__main__":
    main()
