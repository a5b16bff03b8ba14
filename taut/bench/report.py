"""A run's report: where, with what, on which model, and every point; written to JSON as it grows."""

from __future__ import annotations

import datetime
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from taut.bench.measure import Point
from taut.errors import RequestError

PACKAGES = ("taut", "torch", "triton", "transformers", "bitsandbytes", "flash_attn", "numpy")


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter here and are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass
class Report:
    """Everything a run found, JSON-ready. `agreement`: for each peer, the largest difference of its scores
    from Taut's on one prompt, relative to the largest score: that both did the same work."""

    model: str
    dtype: str
    config: dict[str, Any]
    device: dict[str, Any]
    settings: dict[str, Any]
    weights_bytes: int
    date: str = field(default_factory=_now)
    versions: dict[str, str] = field(default_factory=versions)
    agreement: dict[str, float] = field(default_factory=dict)
    plan: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)

    @staticmethod
    def read(file: Path) -> Report:
        """A report that `write` wrote; `RequestError` for anything else."""
        try:
            found = json.loads(file.read_text("utf-8"))
            del found["benchmark"]
            return Report(**found | {"points": [Point(**point) for point in found["points"]]})
        except OSError as error:
            raise RequestError(f"--from {file} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise RequestError(
                f"--from {file} is no report of `taut bench`; name a file that its --json wrote"
            ) from None

    def subjects(self) -> list[str]:
        """Names of the subjects, in the order in which they ran."""
        return list(dict.fromkeys(point.subject for point in self.points))

    def of(self, what: str) -> list[Point]:
        return [point for point in self.points if point.what == what]

    def write(self, file: Path) -> None:
        """Write the report as JSON, whole or not at all."""
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"benchmark": "taut bench"} | asdict(self), indent=1) + "\n", "utf-8")
        temporary.replace(file)


def check_writable(file: Path) -> None:
    """`RequestError` for a file that could not be written once everything is measured."""
    if file.is_dir():
        raise RequestError(f"--json {file} is a folder; name a file in it")
    if not file.absolute().parent.is_dir():
        raise RequestError(f"--json {file}: the folder {file.parent} does not exist; make it first")


def describe(device: torch.device) -> dict[str, Any]:
    """What a device is: name and memory of a GPU with its driver's CUDA, name and threads of a CPU."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
        }
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    unit = torch.backends.cpu.get_cpu_capability()
    return {"type": "cpu", "name": name, "vector_unit": unit, "threads": torch.get_num_threads()}
