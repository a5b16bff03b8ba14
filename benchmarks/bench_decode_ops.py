"""Taut's decode kernels beside cuBLAS and PyTorch on one GPU, each figure from CUDA graph replays.

    python benchmarks/bench_decode_ops.py --json benchmarks/results/decode_ops.json

Products rotate among copies of their weight and attention among caches, so that nothing is read from the L2
cache that a model would read from memory. A figure is the median over replays, in microseconds a call, with
the smallest and the largest beside it; TB/s counts each byte of weight or cache once. `step` is a whole
decode step of Llama-2-7B's shape (random weights, embedding and sampler included).
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from taut.kernels import act_triton, gemv, linear_ce, norm, norm_triton, paged_triton, rope_triton, sample
from taut.kernels.attention import Pages, Scoring
from taut.kernels.device import Workspace, using

DEVICE, DTYPE = torch.device("cuda", 0), torch.bfloat16
PRODUCTS = {  # outputs, inputs, gated
    "Llama-7B qkv 4096x12288": (12288, 4096, False),
    "Llama-7B o 4096x4096": (4096, 4096, False),
    "Llama-7B gate_up 4096x22016": (22016, 4096, True),
    "Llama-7B down 11008x4096": (4096, 11008, False),
    "Llama-7B head 4096x32000": (32000, 4096, False),
    "Llama-8B qkv 4096x6144": (6144, 4096, False),
    "Llama-8B gate_up 4096x28672": (28672, 4096, True),
    "Llama-8B down 14336x4096": (4096, 14336, False),
}
ROWS = (1, 2, 4, 8, 16, 32)
CACHES = [  # rows, keys a row, heads, key heads, head dim
    (1, 512, 32, 32, 128),
    (8, 512, 32, 32, 128),
    (32, 512, 32, 32, 128),
    (1, 4096, 32, 32, 128),
    (8, 4096, 32, 32, 128),
    (1, 32768, 32, 32, 128),
    (8, 4096, 32, 8, 128),
    (1, 131072, 32, 8, 128),
    (8, 32768, 32, 8, 128),
    (8, 4096, 71, 1, 64),
    (8, 32768, 71, 1, 64),
    (4, 8192, 16, 8, 256),
]


@dataclass(frozen=True)
class Result:
    group: str
    name: str
    by: str
    us: float
    low: float
    high: float
    tbs: float | None = None


def time(calls: list[Callable[[], object]], memory: Workspace, repeats: int, rounds: int = 7) -> list[float]:
    """Microseconds a call of each replay of a graph of `repeats` calls, taken from `calls` in turn."""
    with using(memory):
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for index in range(repeats):
                calls[index % len(calls)]()
    graph.replay()
    taken = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) * 1e3 / repeats)
    return taken


class Bench:
    def __init__(self) -> None:
        self.memory = Workspace.of(DEVICE, 1 << 24)
        self.results: list[Result] = []

    def run(self, group: str, name: str, calls: dict[str, list], size: int | None = None, repeats: int = 16):
        """Time every implementation of one op. `size`: bytes that it has to read."""
        cells = []
        for by, alternatives in calls.items():
            taken = time(alternatives, self.memory, repeats)
            us = statistics.median(taken)
            tbs = None if size is None else size / us / 1e6
            self.results.append(Result(group, name, by, us, min(taken), max(taken), tbs))
            cells.append(f"{by} {us:.1f}" + ("" if tbs is None else f" ({tbs:.2f} TB/s)"))
        print(f"{group:10} {name:44} {'   '.join(cells)}", flush=True)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def products(bench: Bench) -> None:
    for name, shape in PRODUCTS.items():
        product(bench, name, *shape)


def product(bench: Bench, name: str, outputs: int, inputs: int, gated: bool) -> None:
    """The product alone, and with what stands around it in a block: norm and activation, or residual."""
    size = outputs * inputs * 2
    weights = [normal(outputs, inputs) * 0.02 for _ in range(max(2, -(-200_000_000 // size)))]
    norm_weight = normal(inputs)

    def fused(x, w, residual):
        if gated:
            return gemv.gemv(x, w, act="silu", norm_weight=norm_weight, eps=1e-5)
        return gemv.gemv(x, w, residual=residual)

    def apart(x, w, residual):
        if gated:
            gate, up = F.linear(F.rms_norm(x, x.shape[1:], norm_weight, 1e-5), w).chunk(2, -1)
            return F.silu(gate) * up
        return residual + F.linear(x, w)

    each = {
        "taut": lambda x, w, residual: gemv.gemv(x, w),
        "cuBLAS": lambda x, w, residual: F.linear(x, w),
        "taut, fused": fused,
        "apart": apart,
    }
    for rows in ROWS:
        x, residual = normal(rows, inputs), normal(rows, outputs)
        calls = {by: [partial(f, x, w, residual) for w in weights] for by, f in each.items()}
        bench.run("product", f"{name}, {rows} rows", calls, size)


def attention(bench: Bench) -> None:
    for shape in CACHES:
        decode_attention(bench, *shape)


def decode_attention(bench: Bench, rows: int, length: int, heads: int, kv_heads: int, dim: int) -> None:
    size, page = rows * length * kv_heads * dim * 4, 16
    width = -(-length // page)
    caches = [
        [normal(rows * width, page, kv_heads, dim) for _ in range(2)]
        for _ in range(max(1, min(8, -(-150_000_000 // size))))
    ]
    table = torch.randperm(rows * width, device=DEVICE).view(rows, width).int()
    lengths = torch.full((rows,), length, device=DEVICE, dtype=torch.int32)
    starts = torch.arange(rows + 1, device=DEVICE, dtype=torch.int32)
    q, scoring = normal(rows, heads, dim), Scoring(dim**-0.5)

    def paged(cache):
        return paged_triton.paged_attention(q, starts, 1, scoring, Pages(*cache, table, lengths, length))

    def dense(cache):
        k, v = (t.view(rows, -1, kv_heads, dim).transpose(1, 2) for t in cache)
        return F.scaled_dot_product_attention(q.view(rows, kv_heads, heads // kv_heads, dim), k, v)

    each = {"taut": paged, "SDPA, dense cache": dense}
    calls = {by: [partial(f, cache) for cache in caches] for by, f in each.items()}
    name = f"{rows} x {length} keys, {heads} over {kv_heads} heads of {dim}"
    bench.run("attention", name, calls, size, repeats=16 if length <= 4096 else 4)


def elementwise(bench: Bench) -> None:
    for rows in (1, 32, 8192):
        around_products(bench, rows)


def around_products(bench: Bench, rows: int) -> None:
    weight, copies = normal(4096), 1 if rows < 8192 else 3
    pairs = [(normal(rows, 4096), normal(rows, 4096)) for _ in range(copies)]
    each = {
        "taut": lambda x, r: norm_triton.add_rms_norm(x, r, weight, 1e-5),
        "PyTorch": lambda x, r: norm.add_rms_norm(x, r, weight, 1e-5),
        "F.rms_norm": lambda x, r: F.rms_norm(x + r, (4096,), weight, 1e-5),
    }
    calls = {by: [partial(f, *pair) for pair in pairs] for by, f in each.items()}
    bench.run("norm", f"add and RMSNorm, {rows} x 4096", calls, rows * 4096 * 6)
    gate_ups = [normal(rows, 22016) for _ in range(copies)]
    each = {
        "taut": lambda g: act_triton.glu(g, "silu"),
        "PyTorch": lambda g: F.silu(g[:, :11008]) * g[:, 11008:],
    }
    calls = {by: [partial(f, gate_up) for gate_up in gate_ups] for by, f in each.items()}
    bench.run("glu", f"silu, {rows} x 11008", calls, rows * 11008 * 6)
    positions = torch.arange(rows, device=DEVICE, dtype=torch.int32)
    cos, sin = rope_triton.angles(positions, torch.rand(64, device=DEVICE), 1.0, DTYPE)
    qkv, cache = normal(rows, 96 * 128), [normal(-(-rows // 16), 16, 32, 128) for _ in range(2)]
    slots = torch.arange(rows, device=DEVICE)
    store = [lambda: rope_triton.rotate_and_store(qkv, 32, 32, cos, sin, *cache, slots)]
    bench.run("rope", f"rotate, store, {rows} x 96 heads of 128", {"taut": store}, rows * 96 * 512)


def cross_entropy(bench: Bench) -> None:
    hidden, weight = normal(8192, 4096).requires_grad_(), (normal(32000, 4096) * 0.02).requires_grad_()
    labels = torch.randint(32000, (8192,), device=DEVICE)

    def measure(loss: Callable[[], Tensor]) -> tuple[float, float]:
        for _ in range(2):
            torch.autograd.grad(loss(), (hidden, weight))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        torch.autograd.grad(loss(), (hidden, weight))
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e3, (torch.cuda.max_memory_allocated() - before) / 2**30

    each = {
        "taut": lambda: linear_ce.linear_cross_entropy(hidden, weight, labels),
        "PyTorch": lambda: F.cross_entropy(F.linear(hidden, weight).float(), labels),
    }
    for by, loss in each.items():
        us, peak = measure(loss)
        name = f"8192 x 4096 x 32000, both ways, peak {peak:.2f} GiB"
        bench.results.append(Result("linear_ce", name, by, us, us, us))
        print(f"linear_ce  {name}: {by} {us:.0f}", flush=True)


def sampler(bench: Bench) -> None:
    for vocab, rows in ((32000, 1), (32000, 32), (128256, 1), (128256, 32)):
        logits = 3 * torch.randn(rows, vocab, device=DEVICE)
        for name, (temperature, top_k, top_p) in {
            "greedy": (0.0, 0, 1.0),
            "temperature": (1.0, 0, 1.0),
            "top-k 50": (1.0, 50, 1.0),
            "top-k 50, top-p 0.9": (1.0, 50, 0.9),
            "top-p 0.9": (1.0, 0, 0.9),
        }.items():

            def full(value, dtype, rows=rows):
                return torch.full((rows,), value, device=DEVICE, dtype=dtype)

            how = sample.Sampling(
                full(temperature, torch.float32), full(top_k, torch.int32), full(top_p, torch.float32),
                full(0.0, torch.float32), full(3, torch.int64), full(5, torch.int64),
            )  # fmt: skip
            each = {"taut": sample.sample, "PyTorch": sample.sample_reference}
            calls = {by: [lambda f=f, x=logits, h=how: f(x, h)] for by, f in each.items()}
            bench.run("sample", f"{name}, {rows} x {vocab}", calls, repeats=4)


def step(bench: Bench) -> None:
    """A decode step of Llama-2-7B's shape: products by Taut or by cuBLAS, all else Taut's."""
    dim, hidden, layers, vocab, page = 4096, 11008, 32, 32000, 16
    shapes = ((3 * dim, dim), (dim, dim), (2 * hidden, dim), (dim, hidden))
    weights = [[normal(*shape) * 0.02 for shape in shapes] for _ in range(layers)]
    head, embedding, norm_weight = normal(vocab, dim) * 0.02, normal(vocab, dim), normal(dim)
    frequencies = 10000.0 ** (-torch.arange(0, 128, 2, device=DEVICE).float() / 128)
    scoring = Scoring(128**-0.5)
    for rows, length in ((1, 512), (8, 512), (32, 512), (1, 4096), (1, 32768)):
        width = -(-length // page)
        caches = [[normal(rows * width, page, 32, 128) for _ in range(2)] for _ in range(layers)]
        table = torch.randperm(rows * width, device=DEVICE).view(rows, width).int()
        lengths = torch.full((rows,), length, device=DEVICE, dtype=torch.int32)
        starts = torch.arange(rows + 1, device=DEVICE, dtype=torch.int32)
        slots = table[:, -1].long() * page + page - 1
        ids = torch.zeros(rows, device=DEVICE, dtype=torch.int64)
        zeros = torch.zeros(rows, device=DEVICE)
        how = sample.Sampling(zeros, zeros.int(), zeros + 1, zeros, zeros.long(), zeros.long())

        def cublas(x, w, normed=False, act=None, residual=None):
            y = F.linear(norm_triton.rms_norm(x, norm_weight, 1e-5) if normed else x, w)
            y = y if act is None else act_triton.glu(y, act)
            return y if residual is None else residual + y

        def taut(x, w, normed=False, act=None, residual=None):
            before = {"norm_weight": norm_weight, "eps": 1e-5} if normed else {}
            return gemv.gemv(x, w, act=act, residual=residual, **before)

        def decode(product, rows=rows, length=length, caches=caches, table=table, lengths=lengths,
                   starts=starts, slots=slots, ids=ids, how=how):  # fmt: skip
            x = F.embedding(ids, embedding)
            cos, sin = rope_triton.angles(lengths - 1, frequencies, 1.0, DTYPE)
            for (qkv, o, gate_up, down), cache in zip(weights, caches, strict=True):
                q = rope_triton.rotate_and_store(product(x, qkv, True), 32, 32, cos, sin, *cache, slots)
                pages = Pages(*cache, table, lengths, length)
                a = paged_triton.paged_attention(q, starts, 1, scoring, pages)
                x = product(a.flatten(1), o, residual=x)
                x = product(product(x, gate_up, True, "silu"), down, residual=x)
            ids.copy_(sample.sample(product(x, head, True), how)[0])

        size = sum(w.numel() for layer in weights for w in layer) * 2 + head.numel() * 2
        size += rows * length * 32 * 128 * 4 * layers
        calls = {"taut": [lambda: decode(taut)], "cuBLAS products": [lambda: decode(cublas)]}
        bench.run("step", f"Llama-2-7B, {rows} x {length} keys", calls, size, repeats=1)
        for result in bench.results[-2:]:
            print(f"{'':10} {result.by}: {rows / result.us * 1e6:.0f} tok/s", flush=True)
        del caches


PARTS = {
    "product": products,
    "attention": attention,
    "elementwise": elementwise,
    "linear_ce": cross_entropy,
    "sample": sampler,
    "step": step,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="parts to run")
    parser.add_argument("--json", type=Path, help="write the figures, with device and versions, to this file")
    arguments = parser.parse_args()
    bench = Bench()
    for part in arguments.only:
        with torch.set_grad_enabled(part == "linear_ce"):
            PARTS[part](bench)
        torch.cuda.empty_cache()
    if arguments.json:
        report = {
            "device": torch.cuda.get_device_name(DEVICE),
            "date": datetime.date.today().isoformat(),
            "versions": {name: version(name) for name in ("torch", "triton")},
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
            "dtype": str(DTYPE),
            "unit": "microseconds a call: median, smallest, largest over replays",
            "results": [vars(result) for result in bench.results],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
