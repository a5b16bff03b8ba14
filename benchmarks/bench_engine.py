"""The engine on requests of mixed lengths, beside transformers' continuous batching in the same process.

    python benchmarks/bench_engine.py --json benchmarks/results/engine.json

All requests are there at once; what is measured is the time to the last token, greedy, without end tokens, so
that both make the same number. Weights are random and shared, prompts are random and share no prefix. One
after the other, each library first serves some of the requests uncounted (kernels compile, graphs are
captured), then all of them, as often as `--rounds` says. `limit` is what the arithmetic of the prompts and
reading weights and cache would take at the device's own speed (`--tflops`, `--tbs`): weights are read once a
decode step of Taut's, the cache once a token. `--shape tiny-llama` runs anywhere in seconds.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import statistics
import time
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
from taut.engine.request import Request, SamplingParams
from taut.engine.resident import Resident


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

    def part(self, count: int) -> Load:
        return Load(self.prompts[:count], self.new[:count])

    @property
    def tokens(self) -> int:
        return sum(self.new)


class Taut:
    """Taut's engine, as `generate_batch` uses it."""

    name = "taut"

    def __init__(self, model: Any, load: Load):
        self.model = model
        self.engine = Resident.of(model).engine(model, self._requests(load))
        self.steps = 0

    @staticmethod
    def _requests(load: Load) -> list[Request]:
        pairs = zip(load.prompts, load.new, strict=True)
        return [Request(list(prompt), SamplingParams(new), scope=None) for prompt, new in pairs]

    def serve(self, load: Load) -> int:
        """Serve the load; tokens that were made."""
        requests = sorted(self._requests(load), key=lambda request: len(request.prompt), reverse=True)
        for request in requests:
            self.engine.submit(request)
        self.steps = 0
        while self.engine.has_work:
            self.engine.step()
            self.steps += 1
        return sum(len(request.output) for request in requests)

    def close(self) -> None:
        del self.engine
        self.model.free_cache()


class Transformers:
    """transformers' own continuous batching."""

    name = "transformers"

    def __init__(self, model: Any, load: Load):
        from transformers import ContinuousBatchingConfig, GenerationConfig
        from transformers.utils import logging

        logging.set_verbosity_error()
        config = GenerationConfig(
            do_sample=False, max_new_tokens=max(load.new), eos_token_id=-1, pad_token_id=0
        )
        batching = ContinuousBatchingConfig(allow_block_sharing=False)  # each round has the same prompts
        if model.device.type == "cpu":  # where it would take most of the host's memory
            batching.num_blocks, batching.max_batch_tokens = 64, 1024
        self._context = model.continuous_batching_context_manager(
            generation_config=config, continuous_batching_config=batching, block=True, timeout=60
        )
        self.manager = self._context.__enter__()

    def serve(self, load: Load) -> int:
        for prompt, new in zip(load.prompts, load.new, strict=True):
            self.manager.add_request(prompt, max_new_tokens=new)
        made = finished = 0
        while finished < len(load.prompts):
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


def measure(subject: Any, load: Load, rounds: int, warm: int, device: torch.device) -> list[float]:
    """Seconds of each round."""
    subject.serve(load.part(warm))
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        started = time.perf_counter()
        made = subject.serve(load)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
        if made != load.tokens:
            raise SystemExit(f"{subject.name} made {made} tokens in place of {load.tokens}")
    return seconds


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
    parser.add_argument("--warm", type=int, default=32, help="requests that are served uncounted")
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

    found: dict[str, dict[str, Any]] = {}
    taut = Taut(model, load)
    seconds = measure(taut, load, args.rounds, args.warm, device)
    bound = limit(model, load, taut.steps, args.tflops, args.tbs) if device.type == "cuda" else None
    facts = {"steps": taut.steps, "cache_tokens": taut.engine.pages.tokens}
    taut.close()
    found["taut"] = {"seconds": seconds, **facts}
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
            found["transformers"] = {"seconds": measure(other, load, args.rounds, args.warm, device)}
        finally:
            other.close()

    table = Table("", "seconds", "tok/s", title=f"{args.requests} requests, {load.tokens} new tokens")
    for name, result in found.items():
        result["median"] = statistics.median(result["seconds"])
        result["tokens_per_second"] = load.tokens / result["median"]
        spread = f"{result['median']:.2f} ({min(result['seconds']):.2f} to {max(result['seconds']):.2f})"
        table.add_row(name, spread, f"{result['tokens_per_second']:.0f}")
    if bound is not None:
        table.add_row("limit", f"{bound['all']:.2f}", f"{load.tokens / bound['all']:.0f}")
    Console().print(table)
    if args.json is not None:
        report = {
            "date": datetime.date.today().isoformat(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
            "options": {k: v for k, v in vars(args).items() if k not in ("json",)},
            "prompt_tokens": sum(map(len, load.prompts)),
            "new_tokens": load.tokens,
            "limit": bound,
            **found,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
