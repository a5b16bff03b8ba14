"""An engine under load that checks itself: requests of every kind, cancelled and failing ones among them.

    python benchmarks/stress_engine.py --minutes 10

Threads and event loops ask an `AsyncEngine` with a small cache for what they know the answer to: rows that
share prefixes, greedy and drawn, beams, guidance, guesses by lookup and by a draft model. Some readers leave,
some hooks raise, and now and then a whole step fails. Every answer must be the one that its request gets
alone, or the beginning of it where it was cancelled. Between rounds, when all is quiet, every page must be
free, the index of prefixes whole, no request left anywhere, and memory no more than after the first rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from taut.engine.async_engine import AsyncEngine
from taut.engine.beams import Beams
from taut.engine.draft_model import Assistant, DraftModel
from taut.engine.drafts import Ledger
from taut.engine.engine import Engine
from taut.engine.guidance import Guidance
from taut.engine.lookup import Lookup
from taut.engine.request import Request, SamplingParams
from taut.modeling import CausalLM

CONFIG = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
KINDS = ("greedy", "drawn", "beams", "drawn beams", "guidance", "lookup", "draft model")
LEFT = ("pages held", "pages lost", "prefixes astray", "requests", "drafts")  # of which nothing may be left
WORKERS = 8
NEW = 24


class Raised(Exception):
    """What a hook of a request raises."""


@dataclass(frozen=True)
class Question:
    """A request whose answer is known."""

    prompt: tuple[int, ...]
    kind: str
    seed: int
    ends: tuple[int, ...]
    answer: tuple[int, ...] = ()

    def request(self, drafts: DraftModel | None = None, **hooks: Any) -> Request:
        params = SamplingParams(
            NEW,
            greedy="drawn" not in self.kind,
            temperature=1.3,
            top_p=0.95,
            seed=self.seed,
            eos_token_ids=self.ends,
        )
        group, drafter = None, None
        if "beams" in self.kind:
            group = Beams(3, length_penalty=0.8)
        elif self.kind == "guidance":
            group = Guidance(1.6, self.prompt[:3])
        elif self.kind == "lookup":
            drafter = Lookup(6, 1)
        elif self.kind == "draft model" and drafts is not None:
            drafter = Assistant(drafts, drafts.runner.model, 5)
        return Request(list(self.prompt), params, group=group, drafter=drafter, **hooks)


def questions(model: Any, count: int, draw: random.Random) -> list[Question]:
    """Prompts that begin with one of a few stems, and what the model says to each of them alone."""
    stems = [tuple(draw.randrange(3, 97) for _ in range(size)) for size in (0, 9, 21, 40)]
    found = []
    for at in range(count):
        tail = tuple(draw.randrange(3, 97) for _ in range(draw.randint(1, 12)))
        question = Question(
            draw.choice(stems) + tail,
            KINDS[at % len(KINDS)],
            draw.randrange(1 << 30),
            tuple(draw.sample(range(3, 97), draw.randint(0, 2))),
        )
        request = question.request()
        request.drafter = None
        Engine(model, num_pages=80, page_size=16, prefix_caching=False).run([request])
        found.append(replace(question, answer=tuple(request.output)))
    return found


class Always(Ledger):
    """Guesses are always checked: here it is not speed that is looked for."""

    def affords(self, rows: int, drafted: int) -> bool:
        return True


class Stress:
    """The engine, who asks it, and what came of it."""

    def __init__(self, seed: int, device: str):
        torch.manual_seed(seed)
        draw = random.Random(seed)
        self.model = CausalLM.from_config(CONFIG, dtype=torch.float64).init_weights(std=0.3).to(device)
        small = CausalLM.from_config({**CONFIG, "num_hidden_layers": 1}, dtype=torch.float64)
        self.small = small.init_weights(std=0.3).to(device)
        self.questions = questions(self.model, 70, draw)
        self.engine = Engine(self.model, num_pages=60, page_size=4, max_rows=12, chunk=48)
        self.engine.ledger = Always()
        self.drafts = DraftModel(self.small, num_pages=40, page_size=4)
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.fails = 0.0  # how likely a step fails
        self._draw = random.Random(seed + 1)
        self.model.model.layers[1].register_forward_pre_hook(self._fail)

    def _fail(self, *_: Any) -> None:
        if self._draw.random() < self.fails:
            raise MemoryError("a step that fails")

    def round(self, seconds: float, seed: int) -> None:
        """Requests from all sides for so long, until all of them have ended."""
        until = time.monotonic() + seconds
        self.fails = 0.002
        with AsyncEngine(self.engine) as front:
            askers = [
                threading.Thread(target=self._thread, args=(front, until, seed * 99 + at))
                if at % 2
                else threading.Thread(target=asyncio.run, args=(self._loop(front, until, seed * 99 + at),))
                for at in range(4)
            ]
            for asker in askers:
                asker.start()
            for asker in askers:
                asker.join()
        self.fails = 0.0

    def _ask(self, draw: random.Random) -> tuple[Question, Request, int | None]:
        """A question, its request, and after how many pieces its reader leaves."""
        question, hooks = draw.choice(self.questions), {}
        if draw.random() < 0.03:

            def broken(*_: Any) -> Any:
                raise Raised

            hooks = {"should_stop": broken} if draw.random() < 0.5 else {"logits_processors": (broken,)}
        leaves = draw.randint(0, 10) if draw.random() < 0.25 else None
        return question, question.request(self.drafts, **hooks), leaves

    def _thread(self, front: AsyncEngine, until: float, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < until:
            asked = [self._ask(draw) for _ in range(draw.randint(1, WORKERS))]
            tickets = [front.submit(request) for _, request, _ in asked]
            for (question, request, leaves), ticket in zip(asked, tickets, strict=True):
                with contextlib.suppress(Raised, MemoryError):
                    for at, _ in enumerate(ticket):
                        if at == leaves:
                            break
                self._check(question, request)

    async def _loop(self, front: AsyncEngine, until: float, seed: int) -> None:
        draw = random.Random(seed)

        async def one() -> None:
            while time.monotonic() < until:
                question, request, leaves = self._ask(draw)
                pieces = 0
                with contextlib.suppress(Raised, MemoryError):
                    async with contextlib.aclosing(front.stream(request)) as tokens:
                        async for _ in tokens:
                            if pieces == leaves:
                                break
                            pieces += 1
                while not request.finished:  # a cancelled one ends between two steps
                    await asyncio.sleep(0.001)
                self._check(question, request)

        await asyncio.gather(*(one() for _ in range(WORKERS)))

    def _check(self, question: Question, request: Request) -> None:
        while not request.finished:
            time.sleep(0.001)
        reason, output = request.finish_reason, tuple(request.output)
        self.counts[f"{question.kind}: {reason}"] += 1
        beams = "beams" in question.kind
        if reason in ("stop", "length"):
            right = output == question.answer
        else:
            right = beams or output == question.answer[: len(output)]
            right = right and (reason != "error" or isinstance(request.error, (Raised, MemoryError)))
        if not right or request.pages or request.branches:
            self.wrong.append(f"{question}: {reason} {output} {request.error!r}")

    def quiet(self) -> dict[str, int]:
        """What is left once all requests have ended: pages that are not free, entries of the index that don't
        stand for an idle page, requests, and bytes."""
        gc.collect()
        pool, tree = self.engine.pages, self.engine.pages.prefixes
        keys = tree._keys.values()
        return {
            "pages held": pool.count - pool.free + self.drafts.pages.count - self.drafts.pages.free,
            "pages lost": len(set(range(pool.count)) ^ (set(pool._unused) | set(pool._idle))),
            "prefixes astray": sum(not isinstance(parent, tuple) and parent not in tree for parent, _ in keys)
            + len(set(pool._idle) ^ set(tree._keys))
            + len(tree._pages)
            - len(tree),
            "requests": sum(type(one) is Request for one in gc.get_objects()),
            "drafts": len(self.drafts._rows),
            "resident": resident(),
            "cuda": torch.cuda.memory_allocated() if torch.cuda.is_available() else 0,
        }


def resident() -> int:
    """Bytes of memory this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--round", type=float, default=5.0, help="seconds from one look to the next")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growth", type=float, default=8.0, help="MB that memory may grow by after a tenth")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(arguments)

    stress = Stress(args.seed, args.device)
    started, looks = time.monotonic(), []
    while time.monotonic() - started < args.minutes * 60:
        stress.round(min(args.round, args.minutes * 60), len(looks))
        looks.append({"seconds": round(time.monotonic() - started, 1), **stress.quiet()})
        left = {name: looks[-1][name] for name in LEFT}
        if stress.wrong or any(left.values()):
            raise SystemExit(f"after {looks[-1]['seconds']} s: {left}; wrong: {stress.wrong[:3]}")
    settled = looks[len(looks) // 10 :]
    growth = (settled[-1]["resident"] - settled[0]["resident"]) / 2**20
    cuda = settled[-1]["cuda"] - settled[0]["cuda"]
    served = sum(stress.counts.values())
    print(f"{served} requests in {looks[-1]['seconds']:.0f} s, every answer right, every page back")
    print(
        f"memory grew by {growth:.1f} MB in {len(settled)} looks"
        + (f", {cuda} bytes of CUDA" if cuda else "")
    )
    for name, count in sorted(stress.counts.items()):
        print(f"  {name}: {count}")
    report = {"requests": served, "growth_mb": growth, "counts": dict(stress.counts), "looks": looks}
    if args.json is not None:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if growth > args.growth or cuda > 0:
        raise SystemExit("memory leaks")
    return report


if __name__ == "__main__":
    main()
