"""`taut eval`: perplexity of a model, and how far its predictions are from another's."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taut.cli.facts import Facts
from taut.cli.session import Options, Session
from taut.errors import RequestError

WINDOW = 512  # tokens scored in one pass

# Prose, facts, dialogue, code and numbers, so that no single kind of token decides.
TEXTS = (
    "The lighthouse keeper climbed the stairs every evening at six. From the gallery he could see the whole "
    "bay: the fishing boats coming home, the ferry with its row of yellow windows, and far out the container "
    "ships that never stopped. When the lamp was lit he wrote the weather into a thick green book, as his "
    "father had done before him. Nobody read the book any more, but he would not have known how to go to bed "
    "without writing in it.",
    "Water boils at 100 degrees Celsius at sea level. On a high mountain the air pressure is lower, so it "
    "boils at a lower temperature, and pasta takes longer to cook. A pressure cooker does the opposite: the "
    "steam can't escape, the pressure rises, and the water gets hotter than 100 degrees before it boils.",
    "Question: What is the capital of France?\nAnswer: Paris.\nQuestion: Which planet is the largest in our "
    "solar system?\nAnswer: Jupiter.\nQuestion: Who wrote the play Romeo and Juliet?\nAnswer: William "
    "Shakespeare.\nQuestion: How many legs does a spider have?\nAnswer: Eight.",
    'def fibonacci(n):\n    """Return the first n Fibonacci numbers."""\n    numbers = []\n    a, b = 0, 1\n'
    "    for _ in range(n):\n        numbers.append(a)\n        a, b = b, a + b\n    return numbers\n\n\n"
    "for i, value in enumerate(fibonacci(10)):\n    print(i, value)\n",
    "In 1969 the first people walked on the Moon. They stayed for less than a day, collected about twenty "
    "kilograms of rock, and left behind a small mirror. Astronomers still use it: they send a short pulse of "
    "light, wait about two and a half seconds for it to return, and so measure the distance to within a few "
    "centimetres. The Moon, it turns out, moves away from us by almost four centimetres every year.",
)


def windows(session: Session, texts: list[str]) -> list[list[int]]:
    """Token ids of the texts, cut so that each window fits the model."""
    if session.model.config.encoder is not None:
        raise RequestError(f"{session.name} is an encoder-decoder; a text's perplexity is that of a decoder")
    size = min(WINDOW, session.model.config.context)
    ids = [session.raw_ids(text) for text in texts]
    cut = [row[at : at + size] for row in ids for at in range(0, len(row), size)]
    cut = [row for row in cut if len(row) > 1]
    if not cut:
        raise RequestError("the text has fewer than two tokens; there is nothing to predict")
    return cut


@torch.inference_mode()
def log_probabilities(session: Session, rows: list[list[int]]) -> Iterator[Tensor]:
    """What the model gives each next token: float32 `[len(row) - 1, vocab]` on the CPU, a row at a time."""
    for row in rows:
        logits = session.model(torch.tensor([row], device=session.model.device)).logits[0, :-1]
        yield F.log_softmax(logits.float(), -1).cpu()


def surprise(log_p: Tensor, row: list[int]) -> Tensor:
    """Negative log-likelihood of each token of `row` but the first."""
    return -log_p.gather(1, torch.tensor(row[1:])[:, None])[:, 0]


def compare(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL divergence of `q` from `p` in nats and whether both favour the same token, per position."""
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return divergence, log_p.argmax(-1) == log_q.argmax(-1)


def evaluate(session: Session, rows: list[list[int]], against: Session | None) -> dict[str, Any]:
    """Perplexity, and against another model KL (mean and 99th percentile, from its probabilities to this
    one's) and top-1 agreement."""
    losses, others, divergences, agreements = [], [], [], []
    references = log_probabilities(against, rows) if against is not None else iter([None] * len(rows))
    for row, log_q, log_p in zip(rows, log_probabilities(session, rows), references, strict=True):
        losses.append(surprise(log_q, row))
        if log_p is not None:
            others.append(surprise(log_p, row))
            divergence, same = compare(log_p, log_q)
            divergences.append(divergence)
            agreements.append(same)
    found: dict[str, Any] = {"tokens": sum(map(len, losses)), "perplexity": _perplexity(losses)}
    if against is not None:
        divergence = torch.cat(divergences)
        found |= {
            "against_perplexity": _perplexity(others),
            "kl_mean": divergence.mean().item(),
            "kl_p99": divergence.quantile(0.99).item(),
            "top1_agreement": torch.cat(agreements).float().mean().item(),
        }
    return found


def _perplexity(losses: list[Tensor]) -> float:
    return math.exp(torch.cat(losses).mean().item())


def run(
    model: str | None, options: Options, *, against: str | None, text: Path | None, as_json: bool
) -> None:
    """Prints the figures of `model`, and its distance from `against`, which is loaded as its files say."""
    texts = [text.read_text("utf-8")] if text is not None else list(TEXTS)
    session = Session.load(model, options)
    rows, other = windows(session, texts), None
    if against is not None:
        plain = Options(dtype=options.dtype, device=options.device, local_files_only=options.local_files_only)
        other = Session.load(against, plain)
        sizes = session.model.config.vocab_size, other.model.config.vocab_size
        if sizes[0] != sizes[1] or windows(other, texts) != rows:
            raise RequestError(
                f"{session.name} and {other.name} cut the text into other tokens (vocabularies of {sizes[0]} "
                f"and {sizes[1]}); only models with the same tokenizer can be compared"
            )
    started = time.perf_counter()
    found = evaluate(session, rows, other)
    facts = Facts.of(session.load_seconds, str(session.model.device))
    if as_json:
        print(
            json.dumps(found | {"seconds": time.perf_counter() - started, "facts": asdict(facts)}, indent=2)
        )
        return
    print(f"tokens          {found['tokens']}")
    print(f"perplexity      {found['perplexity']:.4f}")
    if other is not None:
        print(f"  of {other.name}: {found['against_perplexity']:.4f}")
        print(f"KL, mean        {found['kl_mean']:.5f} nats")
        print(f"KL, 99 %        {found['kl_p99']:.5f} nats")
        print(f"top-1 agreement {100 * found['top1_agreement']:.2f} %")
    sys.stdout.flush()
    print(facts.line(), file=sys.stderr)
