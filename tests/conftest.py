"""What every test shares: tests marked `gpu` are skipped where there is no CUDA device;
scratch folders are removed at the end."""

from __future__ import annotations

import pytest

from tests.scratch import remove


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Processes of one run share a GPU: none keeps what a test has freed."""
    if item.get_closest_marker("gpu"):
        import torch

        torch.cuda.empty_cache()


def pytest_unconfigure() -> None:
    remove()
