"""`scratch`: folders for checkpoints that tests share; they are removed when the run ends."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

_made: list[Path] = []


def scratch(what: str) -> Path:
    """A new folder."""
    _made.append(Path(tempfile.mkdtemp(prefix=f"taut-{what}-")))
    return _made[-1]


def remove() -> None:
    """Remove all that were made."""
    while _made:
        shutil.rmtree(_made.pop(), ignore_errors=True)
