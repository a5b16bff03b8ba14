"""Reads images and sounds from files, bytes, addresses and what other libraries hold."""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPException
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from taut.errors import MediaError

T = TypeVar("T")

_MOST_BYTES = 1 << 30  # of a download
_BLOCK = 1 << 20  # samples read at a time: what a header claims is not believed


def each(items: Sequence[Any], name: str, convert: Callable[[Any], T]) -> list[T]:
    """`convert` of each item; an error names the item's place in the list, and has it as `index`."""
    out = []
    for index, item in enumerate(items):
        try:
            out.append(convert(item))
        except MediaError as error:
            placed = MediaError(f"{name}[{index}]: {error}")
            placed.index = index
            raise placed from error
    return out


def is_source(value: Any) -> bool:
    """Whether `value` is a file, an address or its content."""
    return isinstance(value, (str, os.PathLike, bytes, bytearray))


def open_image(source: Any, timeout: float | None = 30.0) -> Any:
    """The pillow image of a file, an `http(s)://` or `data:` address or a file's bytes, upright (its EXIF
    orientation applied) and in RGB; a pillow image likewise. `MediaError` for what pillow can't read."""
    pil = library("PIL.Image", "image")
    ops = import_module("PIL.ImageOps")
    name, image = _name(source), source
    with _reported(name, "an image that pillow can read"):
        if not isinstance(source, pil.Image):
            image = pil.open(_file(source, timeout))
        return ops.exif_transpose(image).convert("RGB")


def read_sound(source: Any, rate: int, timeout: float | None = 30.0) -> np.ndarray:
    """The samples of a sound file, address or file's bytes, float32 `[samples]` in [-1, 1] at `rate` Hz: the
    mean of its channels, resampled if need be. `MediaError` for what soundfile can't read."""
    soundfile = library("soundfile", "audio")
    name = _name(source)
    with _reported(name, "a sound that soundfile can read (wav, flac, ogg or mp3)"):
        with soundfile.SoundFile(_file(source, timeout)) as file:
            found, blocks = file.samplerate, []
            while len(block := file.read(_BLOCK, dtype="float32", always_2d=True)):
                blocks.append(block.mean(1) if block.shape[1] > 1 else block[:, 0])
        if not blocks:
            raise MediaError(f"{name}: the sound has no samples")
        return resample(np.concatenate(blocks), found, rate)


def resample(samples: np.ndarray, rate: int, to: int) -> np.ndarray:
    """float32 `[samples]` at `rate` Hz, at `to` Hz (soxr, high quality): `ceil(samples * to / rate)` of
    them."""
    if rate == to:
        return samples
    count = math.ceil(len(samples) * to / rate)
    made = library("soxr", "audio").resample(samples.astype(np.float32), rate, to, quality="soxr_hq")[:count]
    return np.pad(made, (0, count - len(made)))


def sounds(
    given: Any, rate: int, sampling_rate: int | None, timeout: float | None = 30.0
) -> list[np.ndarray]:
    """Clips, float32 `[samples]` at `rate` Hz, of one sound or a list of them. Each is a file, an address or
    bytes; an array, tensor or list of samples (at `sampling_rate`, which has to be `rate`); or a dict of
    "array" or "raw" and its own "sampling_rate". A two-dimensional array holds a clip a row."""
    if sampling_rate is not None and sampling_rate != rate:
        raise MediaError(
            f"sampling_rate is {sampling_rate}, and the model was trained at {rate} Hz; "
            f"resample first: taut.processor.resample(samples, {sampling_rate}, {rate})"
        )

    def clip(item: Any) -> np.ndarray:
        if is_source(item):
            return _checked(read_sound(item, rate, timeout))
        if isinstance(item, Mapping):
            return _checked(_described(item, rate))
        return _checked(_samples(item))

    if isinstance(given, (np.ndarray, Tensor)) and given.ndim == 2:
        given = list(given)
    several = isinstance(given, (list, tuple)) and not (len(given) and isinstance(given[0], (int, float)))
    return each(given, "sounds", clip) if several else [clip(given)]


def _described(item: Mapping[str, Any], rate: int) -> np.ndarray:
    values = item.get("array", item.get("raw"))
    if values is None or item.get("sampling_rate") is None:
        has = ", ".join(str(key) for key, value in item.items() if value is not None) or "nothing"
        raise MediaError(f"a sound as a dict has 'array' (or 'raw') and 'sampling_rate'; this one has {has}")
    own = item["sampling_rate"]
    if isinstance(own, bool) or not isinstance(own, (int, float, np.integer, np.floating)) or not own >= 1:
        raise MediaError(f"sampling_rate is {own!r}; expected samples a second, such as {rate}")
    return resample(_samples(values), int(own), rate)


def _samples(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu().float().numpy()
    try:
        samples = np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError):
        samples = None
    if samples is None or (samples.ndim == 0 and not isinstance(values, np.ndarray)):
        raise MediaError(
            "a sound is a path, an address, bytes, samples (an array, tensor or list), or a dict of 'array' "
            f"and 'sampling_rate'; not {type(values).__name__}"
        )
    if samples.ndim != 1:
        raise MediaError(f"a sound has one channel, [samples], and this array is {list(samples.shape)}")
    return samples


def _checked(samples: np.ndarray) -> np.ndarray:
    if not len(samples):
        raise MediaError("the sound has no samples")
    if not np.isfinite(samples).all():
        at = int(np.flatnonzero(~np.isfinite(samples))[0])
        raise MediaError(f"sample {at} of the sound is {samples[at]}")
    return samples


def library(name: str, extra: str) -> ModuleType:
    """A library of one of Taut's extras; `MediaError` says how to install it."""
    try:
        return import_module(name)
    except ImportError as error:
        package = {"PIL.Image": "pillow"}.get(name, name)
        raise MediaError(
            f"this needs {package}, which is not installed ({error}); pip install 'taut[{extra}]'"
        ) from error


@contextmanager
def _reported(name: str, kind: str) -> Iterator[None]:
    """Whatever a library raises about a file, as a `MediaError`: libraries raise errors of many kinds for
    damaged files."""
    try:
        yield
    except MediaError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MediaError(f"{name} is not {kind}, or it is damaged ({reason})") from error


def _file(source: Any, timeout: float | None) -> Any:
    """What a library opens: a path, or a file of bytes."""
    if isinstance(source, (bytes, bytearray)):
        return io.BytesIO(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(source, timeout=timeout) as answer:
                content = answer.read(_MOST_BYTES + 1)
        except (OSError, ValueError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise MediaError(f"{source} can't be downloaded ({reason})") from error
        if len(content) > _MOST_BYTES:
            raise MediaError(f"{source}: more than {_MOST_BYTES >> 20} MB; download it and give its path")
        return io.BytesIO(content)
    if isinstance(source, str) and source.startswith("data:"):
        head, _, text = source.partition(",")
        try:
            return io.BytesIO(base64.b64decode(text, validate=True))
        except binascii.Error as error:
            raise MediaError(f"{head}: the rest is not base64 ({error})") from None
    if not is_source(source):
        raise MediaError(f"expected a path, an address or bytes, not {type(source).__name__}")
    path = os.path.expanduser(os.fspath(source))
    if not os.path.isfile(path):
        raise MediaError(f"{path}: {'a folder, not a file' if os.path.isdir(path) else 'no such file'}")
    return path


def _name(source: Any) -> str:
    if isinstance(source, (bytes, bytearray)):
        return f"{len(source)} bytes"
    return str(source)[:200] if is_source(source) else type(source).__name__
