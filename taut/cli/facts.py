"""The line of facts that every command ends with: load time, prompt and decode speed, peak memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def peak_memory(device: str = "cpu") -> int:
    """Peak memory in bytes: allocated by torch on a CUDA device, otherwise resident in this process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where ru_maxrss begins at what the parent process held
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def human_bytes(count: float) -> str:
    """`count` bytes in the largest unit that keeps it >= 1: `134.5 MB` (decimal units, as files are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_count(count: float) -> str:
    """`count` with a K, M, B or T suffix: `134.5M`."""
    for unit in ("", "K", "M", "B"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f}T"


class Clock:
    """Times one answer: `start()`, then `reach(count)` whenever text has come, with the tokens so far.

    Text may stand for several tokens (a character of three, say), so the first sight of tokens isn't
    always that of the first: what the others took is estimated from the rest of the answer.
    """

    def __init__(self, prompt_tokens: int, now: Callable[[], float] = time.perf_counter):
        self.prompt_tokens, self.tokens = prompt_tokens, 0
        self._now = now
        self._started = 0.0
        self._first = self._last = (0.0, 0)  # time, tokens

    def start(self) -> None:
        self._started = self._now()

    def reach(self, tokens: int) -> None:
        if tokens == self.tokens:
            return
        self._last = (self._now(), tokens)
        if not self.tokens:
            self._first = self._last
        self.tokens = tokens

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first were seen; None where none were."""
        seconds, tokens = (self._last[i] - self._first[i] for i in range(2))
        return tokens / seconds if tokens and seconds > 0 else None

    @property
    def prompt_rate(self) -> float | None:
        """Prompt tokens a second, up to the first new token; None before there is one, or where the only
        text came with several at once."""
        time, tokens = self._first
        extra, rate = tokens - 1, self.decode_rate
        if not tokens or (extra and rate is None):
            return None
        seconds = time - self._started - (extra / rate if extra else 0)
        return self.prompt_tokens / seconds if seconds > 0 else None


@dataclass(frozen=True)
class Facts:
    """What a command measured. Seconds, tokens a second, bytes; None where it did not do that."""

    load_seconds: float
    peak_memory_bytes: int
    prompt_tokens: int | None = None
    prompt_tokens_per_second: float | None = None
    new_tokens: int | None = None
    decode_tokens_per_second: float | None = None

    @staticmethod
    def of(load_seconds: float, device: str, clock: Clock | None = None) -> Facts:
        if clock is None:
            return Facts(load_seconds, peak_memory(device))
        return Facts(
            load_seconds=load_seconds,
            peak_memory_bytes=peak_memory(device),
            prompt_tokens=clock.prompt_tokens,
            prompt_tokens_per_second=clock.prompt_rate,
            new_tokens=clock.tokens,
            decode_tokens_per_second=clock.decode_rate,
        )

    def line(self) -> str:
        """For example `load 0.71 s | prompt 38 tokens, 612.0 tok/s | decode 64 tokens, 71.3 tok/s | peak
        memory 512.3 MB`, on one line."""
        parts = [f"load {self.load_seconds:.2f} s"]
        for name, tokens, rate in (
            ("prompt", self.prompt_tokens, self.prompt_tokens_per_second),
            ("decode", self.new_tokens, self.decode_tokens_per_second),
        ):
            if tokens is not None:
                speed = "" if rate is None else f", {rate:.1f} tok/s"
                parts.append(f"{name} {tokens} token{'' if tokens == 1 else 's'}{speed}")
        parts.append(f"peak memory {human_bytes(self.peak_memory_bytes)}")
        return " | ".join(parts)
