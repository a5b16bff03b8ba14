"""A stand-in, on the CPU, for the device that a load reads ahead for."""

from __future__ import annotations

import torch


class Standin:
    """A device that copies a buffer at once, and leaves nothing in it."""

    def __init__(self):
        self.copied = 0

    def buffer(self, size):
        return torch.full((size,), 255, dtype=torch.uint8)

    def empty(self, size):
        return torch.full((size,), 255, dtype=torch.uint8)

    def copy(self, to, buffer):
        to.copy_(buffer)
        buffer.fill_(255)
        self.copied += to.numel()
        return lambda: None
