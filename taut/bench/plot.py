"""A report as PNG charts, one file a kind of work and axis."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taut.bench.cases import KINDS
from taut.bench.measure import Point
from taut.bench.report import Report
from taut.errors import RequestError


@dataclass(frozen=True)
class Chart:
    """`what` against `x`, a panel for each value of `panel`; both are fields of a point."""

    what: str
    x: str
    panel: str

    @property
    def file(self) -> str:
        axis = KINDS[self.what].axis if self.x == "length" else self.x
        return f"{self.what}-{axis}.png"


CHARTS = tuple(
    Chart(what, x, panel) for what in KINDS for x, panel in (("length", "batch"), ("batch", "length"))
)
_MARKERS = "os^Dv"


def check(folder: Path) -> None:
    """`RequestError` where matplotlib is missing or `folder` is a file, before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RequestError(
            "--plot needs matplotlib, which is not installed; pip install 'taut[plot]', or leave --plot out "
            "and keep the figures with --json"
        )
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"--plot {folder} is a file; name a folder")


def draw(report: Report, folder: Path) -> list[Path]:
    """Write the charts that the report has points for; an axis of one value makes a chart only where the
    other axis has one value too."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for chart in CHARTS:
        points = report.of(chart.what)
        along = {getattr(point, chart.x) for point in points}
        across = {getattr(point, chart.panel) for point in points}
        if len(along) > 1 or (points and len(across) == 1 and chart.x == "length"):
            figure = _figure(report, chart, points, sorted(across))
            files.append(folder / chart.file)
            figure.savefig(files[-1], dpi=150)
    return files


def _figure(report: Report, chart: Chart, points: list[Point], panels: list[int]) -> Any:
    from matplotlib.figure import Figure

    kind = KINDS[chart.what]
    figure = Figure(figsize=(4.6 * len(panels) + 0.6, 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    name = {"length": kind.axis, "batch": "batch"}
    for panel, axis in zip(panels, axes, strict=True):
        ticks = set()
        for index, subject in enumerate(report.subjects()):
            own = [p for p in points if p.subject == subject and getattr(p, chart.panel) == panel]
            own.sort(key=lambda point: getattr(point, chart.x))
            ticks |= {getattr(point, chart.x) for point in own}
            done = [p for p in own if p.median is not None]
            if done:
                below = [p.median - p.low for p in done]
                above = [p.high - p.median for p in done]
                axis.errorbar(
                    [getattr(p, chart.x) for p in done],
                    [p.median for p in done],
                    yerr=[below, above],
                    label=subject,
                    marker=_MARKERS[index % len(_MARKERS)],
                    color=f"C{index}",
                    linewidth=2.4 if subject.startswith("taut") else 1.2,
                    capsize=3,
                )
            # What did not fit stands at the top of the panel, where it would have gone.
            lost = [getattr(p, chart.x) for p in own if p.out_of_memory]
            if lost:
                axis.plot(
                    lost,
                    [0.97 - 0.05 * index] * len(lost),
                    "x",
                    color=f"C{index}",
                    transform=axis.get_xaxis_transform(),
                    label=f"{subject}: out of memory",
                )
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_xlabel(f"{name[chart.x]}, {'rows' if chart.x == 'batch' else 'tokens'}")
        axis.set_title(f"{name[chart.panel]} {panel}", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(kind.unit)
    handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    axes[0].legend(handles.values(), handles.keys(), fontsize=8)
    between = "\n" if len(panels) == 1 else ", "  # as wide as the panels at most
    facts = f"{report.model}, {report.dtype}{between}{report.device['name']}, {report.date[:10]}"
    figure.suptitle(f"{kind.title}\n{facts}", fontsize=10)
    return figure
