"""A report as tables: a row a case, a column a subject, and how Taut stands to the best peer."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from taut.bench.cases import KINDS
from taut.bench.measure import Point
from taut.bench.report import Report


def number(value: float) -> str:
    """Two to four significant digits."""
    if 0 < value < 0.1:
        return f"{value:.2g}"
    places = 0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 10 else 3
    return f"{value:,.{places}f}"


def cell(point: Point | None) -> str:
    """The median, with the smallest and the largest sample where they differ."""
    if point is None:
        return ""
    if point.median is None:
        return "out of memory" if point.out_of_memory else "failed"
    if len(point.samples) < 2:
        return number(point.median)
    return f"{number(point.median)} ({number(point.low)} to {number(point.high)})"


def advantage(points: dict[str, Point], more: bool) -> str:
    """How many times better the median of Taut, the first if there are two, is than the best peer's: `1.32x`;
    "" where one is missing."""
    others = [p.median for name, p in points.items() if not _is_taut(name) and p.median is not None]
    own = next((point for name, point in points.items() if _is_taut(name)), None)
    if own is None or not own.median or not others:
        return ""
    ratio = own.median / max(others) if more else min(others) / own.median
    return f"{ratio:.2f}x"


def _is_taut(subject: str) -> bool:
    return subject.split()[0] == "taut"


def tables(report: Report) -> list[Table]:
    """One table for each kind of work in the report."""
    subjects, out = report.subjects(), []
    for what, kind in KINDS.items():
        cases: dict[tuple[int, int], dict[str, Point]] = {}
        for point in report.of(what):
            cases.setdefault((point.batch, point.length), {})[point.subject] = point
        if not cases:
            continue
        some = next(iter(next(iter(cases.values())).values()))
        more = f", {some.new_tokens} new tokens a row" if some.new_tokens else ""
        table = Table(title=f"{kind.title}{more}, {kind.unit}", box=box.SIMPLE_HEAD, title_justify="left")
        for column in ("batch", kind.axis, "real tokens", *subjects):
            table.add_column(column, justify="right")
        compared = not all(map(_is_taut, subjects))
        if compared:
            table.add_column("Taut to best peer", justify="right")
        for (batch, length), points in cases.items():
            real = next(iter(points.values())).real_tokens
            row = [str(batch), str(length), f"{real / (batch * length):.0%}"]
            row += [cell(points.get(name)) for name in subjects]
            table.add_row(*row, *([advantage(points, kind.more)] if compared else []))
        out.append(table)
    return out


def show(report: Report) -> None:
    """Prints the report: what it was measured on, its tables, its notes and failures."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    device = ", ".join(f"{v}" if k == "name" else f"{k} {v}" for k, v in report.device.items() if k != "type")
    console.print(f"{report.model}, {report.dtype}, on {device}", markup=False)
    console.print(", ".join(f"{name} {number}" for name, number in report.versions.items()), markup=False)
    for table in tables(report):
        console.print(table)
    for name, difference in report.agreement.items():
        console.print(f"{name}: scores within {difference:.1e} of Taut's, relative to the largest")
    for note in report.notes:
        console.print(f"note: {note}", markup=False)
    for point in report.points:
        if point.failed is not None:
            case = f"{point.what} {point.batch} x {point.length}"
            console.print(f"{point.subject}, {case}: {point.failed}", markup=False)
