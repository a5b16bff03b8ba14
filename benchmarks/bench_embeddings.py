"""Vectors of sentences: Taut beside sentence-transformers, with all-MiniLM-L6-v2 on 1,000 of mixed length.

    .venv/bin/python benchmarks/bench_embeddings.py --json results.json

Both run in this process, in turns, on the same texts with the same weights and threads, tokenizing included,
in float32 and in bfloat16. Each figure is a median over the rounds, with the smallest and the
largest beside it; seconds of the process are those of all its threads.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers
import torch

from taut import AutoTokenizer, SentenceTransformer
from taut.bench.report import describe, versions
from taut.hub import default_encoder


def sentences(count: int, model: str) -> list[str]:
    """Texts of 3 to 200 words of the model's vocabulary, half of them of less than 18: as queries, titles,
    sentences and paragraphs lie mixed."""
    rng = random.Random(0)
    words = sorted(word for word in AutoTokenizer.from_pretrained(model).get_vocab() if word.isalpha())
    lengths = [min(200, max(3, round(rng.lognormvariate(2.9, 0.8)))) for _ in range(count)]
    return [" ".join(rng.choice(words) for _ in range(length)) for length in lengths]


def summary(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": values}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Each subject's seconds, and how far its vectors are from sentence-transformers' own."""
    texts = sentences(args.sentences, args.model)
    where = {"device": args.device}
    subjects = {
        "taut": SentenceTransformer(args.model, dtype="float32", **where),
        "sentence-transformers": sentence_transformers.SentenceTransformer(args.model, **where),
        "taut bfloat16": SentenceTransformer(args.model, dtype="bfloat16", **where),
        "sentence-transformers bfloat16": sentence_transformers.SentenceTransformer(
            args.model, model_kwargs={"dtype": torch.bfloat16}, **where
        ),
    }
    walls: dict[str, list[float]] = {name: [] for name in subjects}
    process: dict[str, list[float]] = {name: [] for name in subjects}
    vectors: dict[str, np.ndarray] = {}
    for turn in range(args.rounds + 1):  # the first round is not counted
        for name, subject in subjects.items():
            wall, used = time.perf_counter(), time.process_time()
            vectors[name] = subject.encode(texts)  # numpy: whatever the device still does is waited for
            if turn:
                walls[name].append(time.perf_counter() - wall)
                process[name].append(time.process_time() - used)
    taut = subjects["taut"]
    return {
        "tokens": sum(
            map(len, taut.tokenizer(texts, truncation=True, max_length=taut.max_seq_length).input_ids)
        ),
        "results": {
            name: {
                "seconds": summary(walls[name]),
                "process_seconds": summary(process[name]),
                "sentences_per_second": len(texts) / statistics.median(walls[name]),
                "largest_difference": float(np.abs(vectors[name] - vectors["sentence-transformers"]).max()),
            }
            for name in subjects
        },
    }


def show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    device = report["device"]
    where = f"{report['model']} on {device['name']}" + f", {device.get('threads', 0)} threads" * (
        "threads" in device
    )
    table = Table(title=f"{report['sentences']} sentences, {report['tokens']} tokens; {where}")
    for column in ("", "s", "s of the process", "sentences/s", "as fast", "difference"):
        table.add_column(column, justify="right" if column else "left")
    for name, found in report["results"].items():
        base = report["results"][name.replace("taut", "sentence-transformers")]
        cells = [
            f"{v['median']:.2f} ({v['min']:.2f} to {v['max']:.2f})"
            for v in (found["seconds"], found["process_seconds"])
        ]
        ratio = base["seconds"]["median"] / found["seconds"]["median"]
        table.add_row(
            name,
            *cells,
            f"{found['sentences_per_second']:.0f}",
            f"{ratio:.2f}",
            f"{found['largest_difference']:.1e}",
        )
    Console(width=max(140, Console().width)).print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=default_encoder(), help="folder or Hub id")
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: torch's own choice")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample here")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    report = {
        "benchmark": "embeddings",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": "all-MiniLM-L6-v2" if args.model == default_encoder() else Path(args.model).name,
        "device": describe(torch.device(args.device)),
        "versions": versions() | {"sentence-transformers": sentence_transformers.__version__},
        "sentences": args.sentences,
        **measure(args),
    }
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
