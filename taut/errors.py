"""The errors Taut raises on bad input, and the helper that offers the nearest known names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TautError(ValueError):
    """Base of every error that Taut raises on purpose: the message names the thing, the value, the
    choices and the next step, and the command line prints it without a traceback."""


class ConfigError(TautError):
    """A `config.json` (or GGUF metadata) value is missing, of the wrong type, or not supported."""


class CheckpointError(TautError):
    """A checkpoint file is missing, truncated, corrupt or unsafe to read."""


class WeightsError(TautError):
    """Checkpoint tensors and model parameters do not match one to one."""


class TokenizerError(TautError):
    """A tokenizer file is missing or corrupt, or a text, id or chat template can't be processed."""


class MediaError(TautError):
    """An image or a sound is missing, corrupt, of an unknown kind or can't be processed. `index` is its place
    in the list that was given, None where it was given alone."""

    index: int | None = None


class RequestError(TautError):
    """A generation request (prompt, option or combination of options) can't be served."""


class NumericsError(TautError):
    """A computation gave values that are not finite."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; nearest: a, b"` for the known names that resemble `name`, or `""` when none does."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
    return f"; nearest: {', '.join(close)}" if close else ""
