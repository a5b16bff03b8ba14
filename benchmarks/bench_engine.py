"""The engine on requests of mixed lengths, beside transformers' continuous batching in the same process.

    python benchmarks/bench_engine.py --within 50 --json benchmarks/results/engine_h100.json

is the run of 256 requests on the Llama-7B shape, in about three minutes of an H100.

All requests are there at once; what is measured is the time to the last token, greedy, without end tokens, so
that both make the same number. Weights are random and shared, prompts are random and share no prefix. One
after the other, each library first serves a part uncounted (kernels compile, graphs are captured), then all
of it, as often as `--rounds` and `--within` allow. A library whose first round takes longer than that is cut
off, and its speed up to there is reported: of full batches, without the last long rows that run alone.

`limit` is what the arithmetic of the prompts and reading weights and cache would take at the device's own
speed (`--tflops`, `--tbs`): weights are read once a decode step of Taut's, the cache once a token.
`--shape tiny-llama` runs anywhere in seconds.

`kinds` says where Taut's last round went: number and seconds of steps that the host launched before it had
read the one ahead (`chained`), of other steps in which rows only decode, and of those with a prefill, and the
longest of each; `captured`, how many graphs were made meanwhile, and `compiled`, which kernels.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from taut.bench.measure import synchronize
from taut.bench.peers import make_peers
from taut.bench.shapes import SHAPES, find
from taut.bench.subjects import make_model, shared_weights
from taut.engine.engine import token_bytes
from taut.engine.graph import ROW_BUCKETS
from taut.engine.request import Request, SamplingParams
from taut.engine.resident import Resident
from taut.kernels.gemv import WINNING_ROWS


@dataclass(frozen=True)
class Load:
    """What is asked: prompts, and new tokens of each."""

    prompts: list[list[int]]
    new: list[int]

    @staticmethod
    def of(args: argparse.Namespace, vocab: int) -> Load:
        draw = torch.Generator().manual_seed(args.seed)

        def between(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=draw))

        lengths = [between(*args.prompts) for _ in range(args.requests)]
        return Load(
            [torch.randint(3, vocab, (length,), generator=draw).tolist() for length in lengths],
            [between(*args.outputs) for _ in range(args.requests)],
        )

    def brief(self, count: int | None = None) -> Load:
        """The first `count` prompts, with an eighth of their new tokens."""
        return Load(self.prompts[:count], [-(-new // 8) for new in self.new[:count]])

    @property
    def tokens(self) -> int:
        return sum(self.new)


@contextmanager
def compilations(names: list[str]) -> Iterator[None]:
    """Note the names of the Triton kernels that are compiled, or read from the disk, meanwhile."""
    try:
        from triton import knobs
    except ImportError:
        yield
        return

    def noted(*, src: Any, **_: Any) -> None:
        names.append(src.fn.__name__)

    with knobs.compilation.scope():
        knobs.compilation.listener = noted
        yield


class Taut:
    """Taut's engine, as `generate_batch` uses it."""

    name = "taut"

    def __init__(self, model: Any, load: Load):
        self.model = model
        self.engine = Resident.of(model).engine(model, self._requests(load))
        self.steps: dict[str, list[float]] = {}
        self.captured = 0
        self.compiled: list[str] = []
        self.plan: list[Any] = []
        schedule = self.engine.scheduler.schedule

        def noted(*drafts: Any) -> list[Any]:
            self.plan = schedule(*drafts)
            return self.plan

        self.engine.scheduler.schedule = noted

    @staticmethod
    def _requests(load: Load) -> list[Request]:
        pairs = zip(load.prompts, load.new, strict=True)
        return [Request(list(prompt), SamplingParams(new), scope=None) for prompt, new in pairs]

    def warm(self, load: Load, few: int) -> None:
        """All prompts, then few rows, short and long, which have kernels of their own: the peer captures its
        graphs when it starts."""
        self.serve(load.brief(), math.inf)
        longest = max(load.prompts, key=len)
        for rows in (rows for rows in ROW_BUCKETS if rows <= WINNING_ROWS):
            for prompt in (longest[:1], longest):
                self.serve(Load([prompt] * rows, [4] * rows), math.inf)

    def serve(self, load: Load, until: float) -> int:
        """Serve the load, or what can be until then; tokens that were made."""
        requests = sorted(self._requests(load), key=lambda request: len(request.prompt), reverse=True)
        for request in requests:
            self.engine.submit(request)
        self.steps, before = {"chained": [], "decode": [], "prefill": []}, self._graphs()
        self.compiled = []
        now = time.perf_counter()
        with compilations(self.compiled):
            while self.engine.has_work and now < until:
                chained, began = self.engine._under_way is not None, now
                self.engine.step()
                now = time.perf_counter()
                decodes = all(work.count == 1 and work.ready for work in self.plan)
                self.steps["chained" if chained else "decode" if decodes else "prefill"].append(now - began)
        self.captured = self._graphs() - before
        for request in requests:
            self.engine.cancel(request)
        return sum(len(request.output) for request in requests)

    def _graphs(self) -> int:
        own = {} if self.engine.graphs is None else self.engine.graphs._graphs
        return len(own) + len(self.engine.runner.replays._graphs)

    def facts(self) -> dict[str, Any]:
        kinds = {
            kind: {"count": len(took), "seconds": sum(took), "longest": sorted(took)[-8:]}
            for kind, took in self.steps.items()
        }
        return {
            "steps": sum(map(len, self.steps.values())),
            "kinds": kinds,
            "captured": self.captured,
            "compiled": self.compiled,
            "cache_tokens": self.engine.pages.tokens,
        }

    def close(self) -> None:
        del self.engine
        self.model.free_cache()


class Transformers:
    """transformers' own continuous batching."""

    name = "transformers"

    def __init__(self, model: Any, load: Load):
        from transformers import ContinuousBatchingConfig, GenerationConfig
        from transformers.generation.continuous_batching.utils import WorkloadHints
        from transformers.utils import logging

        logging.set_verbosity_error()
        config = GenerationConfig(
            do_sample=False, max_new_tokens=max(load.new), eos_token_id=-1, pad_token_id=0
        )
        batching = ContinuousBatchingConfig(allow_block_sharing=False)  # each round has the same prompts
        if model.device.type == "cpu":  # where it would take most of the host's memory
            batching.num_blocks, batching.max_batch_tokens = 64, 1024
        self._context = model.continuous_batching_context_manager(
            generation_config=config,
            continuous_batching_config=batching,
            block=True,
            timeout=60,
            workload_hints=WorkloadHints(max(map(len, load.prompts)), max(load.new), len(load.prompts)),
        )
        self.manager = self._context.__enter__()
        self.attention = model.config._attn_implementation  # it takes FlashAttention where that is installed

    def warm(self, load: Load, few: int) -> None:
        """A few requests: it has captured its graphs when it started."""
        self.serve(load.brief(few), math.inf)

    def serve(self, load: Load, until: float) -> int:
        """Serve the load; tokens that were made. One that is cut off is the last."""
        for prompt, new in zip(load.prompts, load.new, strict=True):
            self.manager.add_request(prompt, max_new_tokens=new)
        made = finished = 0
        while finished < len(load.prompts):
            if time.perf_counter() >= until:
                scheduler = self.manager.batch_processor.scheduler
                states = [*scheduler.active_requests.values(), *scheduler.waiting_requests.values()]
                return made + sum(len(state.to_generation_output().generated_tokens) for state in states)
            result = self.manager.get_result(timeout=1)
            if result is None:
                if not self.manager.is_running():
                    raise SystemExit("transformers' continuous batching ended before all requests did")
            elif result.is_finished():
                if result.error is not None:
                    raise SystemExit(f"transformers: {result.error}")
                made, finished = made + len(result.generated_tokens), finished + 1
        return made

    def close(self) -> None:
        self._context.__exit__(None, None, None)


def measure(subject: Any, load: Load, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of each round, and tokens of each; fewer than the load's if the one round there is was cut."""
    subject.warm(load, args.warm)
    seconds: list[float] = []
    until = time.perf_counter() + args.within
    while len(seconds) < args.rounds and (not seconds or time.perf_counter() + seconds[-1] < until):
        synchronize(device)
        started = time.perf_counter()
        made = subject.serve(load, math.inf if seconds else until)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
        if made != load.tokens:
            if seconds[-1] < args.within:
                raise SystemExit(f"{subject.name} made {made} tokens in place of {load.tokens}")
            break
    median = statistics.median(seconds)
    return {"seconds": seconds, "tokens": made, "median": median, "tokens_per_second": made / median}


def limit(model: Any, load: Load, steps: int, tflops: float, tbs: float) -> dict[str, float]:
    """Seconds that the device itself needs, by what it spends them on."""
    embedding = model.get_input_embeddings().weight
    products = model.num_parameters() - (embedding.numel() if model.lm_head is not None else 0)
    cached = sum(
        new * len(prompt) + new * (new - 1) // 2 for prompt, new in zip(load.prompts, load.new, strict=True)
    )
    parts = {
        "weights": steps * model.get_memory_footprint() / (tbs * 1e12),
        "cache": cached * token_bytes(model) / (tbs * 1e12),
        "prompts": 2 * products * sum(map(len, load.prompts)) / (tflops * 1e12),
    }
    return {**parts, "all": sum(parts.values())}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="llama-7b", help=f"one of {', '.join(SHAPES)}")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompts", type=int, nargs=2, default=(32, 1024), metavar=("LEAST", "MOST"))
    parser.add_argument("--outputs", type=int, nargs=2, default=(16, 512), metavar=("LEAST", "MOST"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--within", type=float, default=600.0, help="seconds for a library's rounds")
    parser.add_argument("--warm", type=int, default=32, help="requests the peer serves uncounted")
    parser.add_argument("--peers", default="transformers", choices=("transformers", "none"))
    parser.add_argument("--tflops", type=float, default=770.0, help="of the device, for the limit")
    parser.add_argument("--tbs", type=float, default=3.0, help="TB/s of the device's memory, for the limit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(arguments)

    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    shape = find(args.shape)
    model = make_model(shape, context=args.prompts[1] + args.outputs[1], dtype=dtype, device=device)
    load = Load.of(args, model.config.vocab_size)

    taut = Taut(model, load)
    found = {"taut": measure(taut, load, args, device)}
    found["taut"] |= taut.facts()
    steps = found["taut"]["steps"]
    bound = limit(model, load, steps, args.tflops, args.tbs) if device.type == "cuda" else None
    taut.close()
    report(args, device, load, bound, found)
    if args.peers == "transformers":
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        state = shared_weights(model)
        (peer,), _ = make_peers(
            ["sdpa"], model.config.source, state, auto=shape.auto, dtype=dtype, device=device
        )
        other = Transformers(peer.model, load)
        try:
            found["transformers"] = {**measure(other, load, args, device), "attention": other.attention}
            report(args, device, load, bound, found)
        finally:
            other.close()


def report(
    args: argparse.Namespace, device: torch.device, load: Load, bound: Any, found: dict[str, dict[str, Any]]
) -> None:
    """Show what was measured so far, and write it."""
    table = Table("", "seconds", "tok/s", title=f"{args.requests} requests, {load.tokens} new tokens")
    for name, result in found.items():
        spread = f"{result['median']:.2f} ({min(result['seconds']):.2f} to {max(result['seconds']):.2f})"
        if result["tokens"] != load.tokens:
            spread = f"cut off after {result['median']:.2f}, with {result['tokens']} tokens"
        table.add_row(name, spread, f"{result['tokens_per_second']:.0f}")
    if bound is not None:
        table.add_row("limit", f"{bound['all']:.2f}", f"{load.tokens / bound['all']:.0f}")
    Console().print(table)
    if args.json is not None:
        facts = {
            "date": datetime.date.today().isoformat(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "options": {k: v for k, v in vars(args).items() if k not in ("json",)},
            "prompt_tokens": sum(map(len, load.prompts)),
            "new_tokens": load.tokens,
            "limit": bound,
            **found,
        }
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
