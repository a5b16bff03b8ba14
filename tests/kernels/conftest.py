"""What Triton's interpreter needs beside NumPy 2.4; outputs that nobody wrote are found."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    from triton.runtime import interpreter

    _patch = interpreter._patch_lang_tensor

    def _patch_with_bounds(tensor, scope):
        """Loop bounds read on the device: the interpreter holds them as arrays of one element, which NumPy
        2.4 no longer turns into integers by itself."""
        _patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = _patch_with_bounds


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """`torch.empty` gives NaN, so that an element nobody writes is found."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
