"""How cases become inputs and samples become figures, with subjects that do as they are told."""

from __future__ import annotations

import mmap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from taut.bench import plot, table
from taut.bench.cases import Case, Inputs, make_cases
from taut.bench.measure import DoesNotFit, Point, measure, peak
from taut.bench.report import Report

CPU = torch.device("cpu")


class Fake:
    """A subject whose calls are noted in `calls`, and which fails at call `at` with `error`."""

    weights_bytes = 1000

    def __init__(self, name: str, calls: list[str], error: Exception | None = None, at: int = 0):
        self.name, self.calls, self.error, self.at = name, calls, error, at

    def forward(self, inputs: Inputs) -> None:
        self.calls.append(self.name)
        if self.error is not None and self.calls.count(self.name) > self.at:
            raise self.error

    def generate(self, inputs: Inputs, new_tokens: int) -> None:
        self.forward(inputs)

    def decode(self, inputs: Inputs, new_tokens: int, uncounted: int) -> float:
        self.forward(inputs)
        return 0.5


def run(case: Case, *subjects: Fake, repeats: int = 3) -> list[Point]:
    return measure(case, subjects, unit="x", vocab=9, device=CPU, repeats=repeats)


def test_subjects_take_turns_after_two_uncounted_runs() -> None:
    calls: list[str] = []
    points = run(Case("forward", 1, 4), Fake("a", calls), Fake("b", calls))
    assert "".join(calls) == "aabb" + "ab" * 3
    assert [len(point.samples) for point in points] == [3, 3]


def test_a_decode_counts_the_tokens_after_the_fourth() -> None:
    (point,) = run(Case("decode", 3, 8, new_tokens=14), Fake("a", []))
    assert point.samples == [3 * 10 / 0.5] * 3 and point.median == 60.0


def test_a_forward_is_timed_in_milliseconds() -> None:
    slow = Fake("a", [])
    slow.forward = lambda inputs: time.sleep(0.03)
    (point,) = run(Case("forward", 1, 4), slow)
    assert point.low >= 30


FAILURES = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), 0, True),
    (RuntimeError("out of memory\nmore"), 3, True),
    (DoesNotFit("8 tokens fit"), 1, True),
    (RuntimeError("shapes differ\nmore"), 3, False),
    (NotImplementedError(), 0, False),
]


@pytest.mark.parametrize(("error", "at", "memory"), FAILURES, ids=lambda value: str(value)[:20])
def test_a_failure_is_a_result_and_the_others_go_on(error: Exception, at: int, memory: bool) -> None:
    calls: list[str] = []
    bad, good = run(Case("forward", 1, 4), Fake("bad", calls, error, at), Fake("good", calls))
    assert calls.count("bad") == at + 1 and calls.count("good") == 5
    assert bad.samples == [] and bad.median is None and bad.out_of_memory is memory
    assert bad.failed.startswith(type(error).__name__) and "more" not in bad.failed
    assert good.failed is None and good.median is not None
    assert table.cell(bad) == ("out of memory" if memory else "failed")


def test_memory_is_the_peak_and_not_the_end() -> None:
    size = 64 << 20

    def use() -> None:
        with mmap.mmap(-1, size) as pages:  # the allocator may have pages left over, which count already
            for page in range(0, size, mmap.PAGESIZE):
                pages[page] = 1

    found = peak(use, CPU)
    if found is None:
        pytest.skip("this system does not tell the peak memory of a process")
    assert size * 0.9 < found < size * 2


@pytest.mark.parametrize(
    ("case", "rows"),
    [
        (Case("forward", 3, 64), [64, 64, 64]),
        (Case("padded", 3, 64), [2, 33, 64]),
        (Case("padded", 2, 5), [1, 5]),
        (Case("generate", 1, 64, 8), [64]),
        (Case("generate", 2, 64, 8), [2, 64]),
        (Case("decode", 2, 64, 8), [64, 64]),
    ],
    ids=lambda value: str(value),
)
def test_rows_and_their_padding(case: Case, rows: list[int]) -> None:
    assert case.rows == rows
    inputs = Inputs.of(case, 9, CPU)
    assert torch.equal(inputs.ids, Inputs.of(case, 9, CPU).ids)
    assert inputs.ids.shape == (case.batch, case.length) and 0 <= inputs.ids.min() <= inputs.ids.max() < 9
    if len(set(rows)) == 1:
        assert inputs.mask is None
        return
    assert inputs.mask.sum(1).tolist() == rows
    shortest = inputs.mask[0].tolist()
    assert shortest == sorted(shortest, reverse=case.what == "padded")


def test_eight_rows_are_half_padding() -> None:
    assert sum(Case("padded", 8, 2048).rows) / (8 * 2048) == pytest.approx(0.52, abs=0.005)


def test_cases_go_from_small_to_large() -> None:
    made = make_cases(["padded", "decode"], lengths=[4, 8], batches=[1, 2], contexts=[16], new_tokens=5)
    assert made == [
        Case("padded", 2, 4),
        Case("padded", 2, 8),
        Case("decode", 1, 16, 5),
        Case("decode", 2, 16, 5),
    ]
    assert [case.span for case in made] == [4, 8, 21, 21]


def point(subject: str, median: float | None, **changes: Any) -> Point:
    fields: dict[str, Any] = {"what": "forward", "batch": 1, "length": 8, "new_tokens": 0, "real_tokens": 8}
    made = Point(subject, **{**fields, "unit": "ms", **changes})
    made.samples = [] if median is None else [median]
    made.close()
    return made


def test_advantage_is_more_than_one_where_taut_is_better() -> None:
    medians = {"taut": 2.0, "a": 4.0, "b": 3.0}
    points = {name: point(name, median) for name, median in medians.items()}
    assert table.advantage(points, more=False) == "1.50x"
    assert table.advantage(points, more=True) == "0.50x"
    assert table.advantage({**points, "taut": point("taut", None)}, more=False) == ""
    assert table.advantage({"taut": points["taut"], "a": point("a", None)}, more=False) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00123, "0.0012"), (0.5, "0.500"), (12.345, "12.35"), (123.45, "123.5"), (12345.6, "12,346")],
)
def test_numbers(value: float, text: str) -> None:
    assert table.number(value) == text


def test_a_chart_shows_what_did_not_fit(tmp_path: Path) -> None:
    report = Report("m", "float32", {}, {"type": "cpu", "name": "c"}, {}, 0)
    report.points = [
        point("taut", 1.0),
        point("a", 2.0),
        point("taut", 2.0, length=16),
        point("a", None, length=16, out_of_memory=True),
    ]
    assert [file.name for file in plot.draw(report, tmp_path / "x" / "y")] == ["forward-length.png"]
    (axes,) = plot._figure(report, plot.CHARTS[0], report.points, [1]).axes
    labels = axes.get_legend_handles_labels()[1]
    assert sorted(labels) == ["a", "a: out of memory", "taut"]
    report.points = report.points[:2]  # one value on either axis: still a chart
    assert [file.name for file in plot.draw(report, tmp_path)] == ["forward-length.png"]
