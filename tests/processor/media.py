"""Small pictures and sounds, in memory and as the files that people have."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import soundfile


def picture(height: int, width: int, mode: str = "RGB", seed: int = 0) -> PIL.Image.Image:
    """Smooth colours with an edge and some noise, so that every filter and every pixel counts."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [127 + 110 * np.sin(rows / (5 + c) + columns / (9 - c) + c) for c in range(4)]
    pixels = np.stack(waves, -1) + np.random.default_rng(seed).normal(0, 8, (height, width, 4))
    pixels[: height // 3, : width // 2] = (250, 10, 120, 60)
    image = PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8))  # RGBA
    return image if mode == "RGBA" else image.convert(mode)


def image_bytes(image: PIL.Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def sound(samples: int, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """A gliding tone with noise, float32 in [-1, 1]."""
    at = np.arange(samples) / rate
    tone = 0.4 * np.sin(2 * np.pi * (200 + 900 * at) * at) + 0.2 * np.sin(2 * np.pi * 1330 * at)
    return (tone + np.random.default_rng(seed).normal(0, 0.02, samples)).astype(np.float32)


def sound_bytes(samples: np.ndarray, rate: int, kind: str = "WAV") -> bytes:
    """`samples` `[samples]` or `[samples, channels]` as a file of 16-bit samples."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind)
    return file.getvalue()
