"""What every test shares: it draws the same numbers every time; tests marked `gpu` are skipped where there is
no CUDA device; scratch folders are removed at the end."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from tests.scratch import remove

# Kernels run in Triton's interpreter where there is no CUDA device. Its own functions are decorated when it
# is first imported, as transformers does, so this stands before any test module.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_runtest_setup() -> None:
    """What failed fails again, alone too."""
    torch.manual_seed(0)
    np.random.seed(0)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Processes of one run share a GPU: none keeps what a test has freed."""
    if item.get_closest_marker("gpu"):
        torch.cuda.empty_cache()


def pytest_unconfigure() -> None:
    remove()
