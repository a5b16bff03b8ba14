"""The line of facts: rates, units and what is left out."""

from __future__ import annotations

import subprocess
import sys

import pytest

from taut.cli.facts import Clock, Facts, human_bytes, human_count


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999 B"), (1000, "1.0 kB"), (269_032_320, "269.0 MB"), (2e9, "2.0 GB"), (3e12, "3.0 TB")],
)
def test_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12"), (1500, "1.5K"), (134_515_008, "134.5M"), (7e9, "7.0B"), (1e12, "1.0T")]
)
def test_counts(count: float, text: str) -> None:
    assert human_count(count) == text


@pytest.mark.parametrize(
    ("sights", "prompt", "decode"),
    [
        ([(3.0, 1), (4.0, 3), (5.0, 5)], 5.0, 2.0),  # the first token is the prompt's
        ([(4.0, 3), (5.0, 5)], 5.0, 2.0),  # the first text stood for three tokens
        ([(3.0, 1), (3.5, 1)], 5.0, None),
        ([(4.0, 3)], None, None),
        ([], None, None),
    ],
)
def test_rates(sights: list[tuple[float, int]], prompt: float | None, decode: float | None) -> None:
    times = iter([1.0] + [time for time, _ in sights])
    clock = Clock(10, now=lambda: next(times))
    clock.start()
    for _, tokens in sights:
        clock.reach(tokens)
    assert (clock.prompt_rate, clock.decode_rate) == (prompt, decode)


def test_line() -> None:
    facts = Facts(0.5, 2_000_000, 3, 30.0, 1, None)
    assert facts.line() == "load 0.50 s | prompt 3 tokens, 30.0 tok/s | decode 1 token | peak memory 2.0 MB"
    assert Facts(0.5, 2_000_000).line() == "load 0.50 s | peak memory 2.0 MB"


def test_peak_memory_is_this_process_at_its_largest() -> None:
    code = (
        "from taut.cli.facts import peak_memory\nbefore = peak_memory()\nblock = bytearray(300 << 20)\n"
        "del block\nprint(before >> 20, peak_memory() - before >> 20)"
    )
    held = bytearray(600 << 20)  # of the parent, which is not the child's to report
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    del held
    before, grown = map(int, done.stdout.split())
    assert before < 300 and 290 < grown < 350
