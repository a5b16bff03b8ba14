"""Prompt lookup beside plain decoding: on prompts whose answers quote them, and on others.

    python benchmarks/bench_assisted.py --json benchmarks/results/assisted_cpu.json

One row at a time, greedy, in turns: each round every prompt is answered with guesses and without, the order
changing from round to round. Both give the same tokens, or the run ends with an error. What is reported is
the ratio of the median times; `quoting` should gain, and on `other` prompts lookups should switch themselves
off before they cost anything.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from taut import AutoModelForCausalLM, AutoTokenizer
from taut.bench.measure import synchronize
from taut.hub import default_model

TEXT = (
    "The harbour of Ellsmere was built in 1874 by the engineer Thomas Ward, who had already drained the "
    "marsh of Coldwater and laid the first rails along the northern coast. The harbour has two long piers "
    "of grey granite, a lighthouse of forty metres and a small market where fish is sold every morning. In "
    "winter the piers are closed, and the boats of the village lie behind the church until the ice has gone."
)
CODE = """def total(prices, discount):
    result = 0
    for price in prices:
        if price > 100:
            result += price * (1 - discount)
        else:
            result += price
    return result
"""
PROMPTS = {
    "quoting": (
        f"Repeat the following text word for word.\n\n{TEXT}",
        f"Copy this text exactly, and write nothing else: {TEXT}",
        "Correct the spelling of this text, and print the whole text: "
        + TEXT.replace("morning", "mornning").replace("granite", "granit"),
    ),
    "other": (
        # The small default model answers with a function of its own.
        f"Here is a function. Write the same function again, without changes.\n\n{CODE}",
        "Write a short story about a lighthouse keeper who finds a message in a bottle.",
        "Why is the sky blue? Explain it to a child.",
        "Give me a recipe for a soup of lentils and carrots.",
        f"Is Ellsmere a good place for a holiday? What would you do there? {TEXT}",
    ),
}


def seconds(model: Any, inputs: dict[str, torch.Tensor], new: int, lookup: int | None) -> tuple[float, list]:
    """Of one call, and its tokens."""
    options = {"max_new_tokens": new, "do_sample": False}
    synchronize(model.device)
    started = time.perf_counter()
    ids = model.generate(**inputs, **options, prompt_lookup_num_tokens=lookup)
    synchronize(model.device)
    return time.perf_counter() - started, ids.tolist()


def measure(model: Any, inputs: dict[str, torch.Tensor], args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a prompt's answers without guesses and with them."""
    found: dict[int | None, list[float]] = {None: [], args.tokens: []}
    answers = []
    for turn in range(args.rounds + 1):  # the first is not counted
        for lookup in list(found) if turn % 2 else reversed(list(found)):
            took, ids = seconds(model, inputs, args.new, lookup)
            answers.append(ids)
            if turn:
                found[lookup].append(took)
    if any(ids != answers[0] for ids in answers):
        raise SystemExit("guesses changed the tokens")
    plain, guessed = (statistics.median(times) for times in found.values())
    return {"plain": found[None], "lookup": found[args.tokens], "speedup": plain / guessed}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder, a .gguf file or a Hub id (SmolLM2-135M)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--new", type=int, default=80, help="most tokens of an answer")
    parser.add_argument("--tokens", type=int, default=10, help="prompt_lookup_num_tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args(arguments)

    name = args.model or default_model()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=args.dtype, device_map=args.device)
    results: dict[str, list[dict[str, Any]]] = {}
    table = Table("prompt", "plain, s", "lookup, s", "speedup", title=f"up to {args.new} new tokens, one row")
    for kind, prompts in PROMPTS.items():
        for prompt in prompts:
            inputs = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
            ).to(model.device)
            result = measure(model, dict(inputs), args)
            results.setdefault(kind, []).append({"prompt": prompt, **result})
            times = (f"{statistics.median(result[way]):.2f}" for way in ("plain", "lookup"))
            table.add_row(f"{kind}: {prompt.splitlines()[0][:44]}", *times, f"{result['speedup']:.2f}")
    means = {
        kind: math.exp(statistics.mean(math.log(one["speedup"]) for one in found))
        for kind, found in results.items()
    }
    for kind, mean in means.items():
        table.add_row(f"[bold]{kind}, geometric mean", "", "", f"{mean:.2f}")
    Console().print(table)
    if args.json is not None:
        report = {
            "date": datetime.date.today().isoformat(),
            "device": torch.cuda.get_device_name() if model.device.type == "cuda" else platform.processor(),
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("torch",)},
            "options": {key: value for key, value in vars(args).items() if key not in ("json", "model")},
            "model": Path(name).name,
            "speedup": means,
            "results": results,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
