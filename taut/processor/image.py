"""Image processors: pictures to pixel values as `preprocessor_config.json` says, resampled by pillow."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from taut.config import Reader
from taut.errors import ConfigError, MediaError
from taut.processor.base import Preprocessor
from taut.processor.output import BatchFeature
from taut.processor.read import each, is_source, library, open_image

_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}

# Pillow's filters by the numbers that files give.
_FILTERS = {0: "NEAREST", 1: "LANCZOS", 2: "BILINEAR", 3: "BICUBIC", 4: "BOX", 5: "HAMMING"}
_SIZES = ({"height", "width"}, {"shortest_edge"})


class ImageProcessor(Preprocessor):
    """Images to `pixel_values` `[images, channels, height, width]`: to RGB, resize, centre crop, rescale,
    normalise, each where the settings ask for it.

    | setting | meaning |
    |---|---|
    | `do_convert_rgb` | to three channels; transparency becomes white |
    | `do_resize`, `size`, `resample` | to `{"height", "width"}` or `{"shortest_edge"}`, by a pillow filter |
    | `do_center_crop`, `crop_size` | `{"height", "width"}`; a smaller image gets black edges |
    | `do_rescale`, `rescale_factor` | a pixel times the factor |
    | `do_normalize`, `image_mean`, `image_std` | less the mean, by the deviation, of each channel |
    """

    input_names = ("pixel_values",)
    # Read for every class; a class has its own values in `defaults`.
    shared: ClassVar[Mapping[str, Any]] = {
        "do_resize": True,
        "size": {"height": 224, "width": 224},
        "resample": 2,
        "default_to_square": True,
        "do_center_crop": False,
        "crop_size": {"height": 224, "width": 224},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": False,
        **_HALF,
    }

    def read(self, r: Reader) -> dict[str, Any]:
        r.only("do_pad", False)
        r.only("data_format", "channels_first")
        r.ignore("input_data_format", "pad_size", "disable_grouping", "device", "return_tensors")
        r.ignore("do_reduce_labels", "reduce_labels", "_valid_processor_keys")  # of segmentation maps
        square = r.bool("default_to_square")
        found: dict[str, Any] = {
            name: r.bool(name)
            for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")
        }
        found["size"] = _size(r, "size", square)
        found["crop_size"] = _size(r, "crop_size", True)
        found["resample"] = r.int("resample", minimum=0)
        if found["resample"] not in _FILTERS:
            known = ", ".join(f"{number} ({name})" for number, name in _FILTERS.items())
            raise ConfigError(f"{r.source}: 'resample' is {found['resample']}; known: {known}")
        found["rescale_factor"] = r.float("rescale_factor")
        found["image_mean"], found["image_std"] = _numbers(r, "image_mean"), _numbers(r, "image_std")
        if found["do_center_crop"] and set(found["crop_size"]) != {"height", "width"}:
            raise ConfigError(
                f"{r.source}: 'crop_size' is {found['crop_size']!r}; expected a height and a width"
            )
        return found

    def __call__(
        self,
        images: Any,
        *,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
        timeout: float | None = 30.0,
        **changes: Any,
    ) -> BatchFeature:
        """`pixel_values` of one image or a list of them.

        An image is a path, an `http(s)://` or `data:` address or a file's bytes (made upright and RGB), a
        pillow image, or an array or tensor `[channels, height, width]`, `[height, width, channels]`
        (`input_data_format` "channels_first" or "channels_last" decides where both could be) or
        `[height, width]`; one more dimension in front is a batch. `changes` are to the settings, for this
        call. With `return_tensors` "pt" or "np" one tensor, otherwise a list of arrays. `MediaError` names
        the image that can't be read or processed, and has its place as `index`.
        """
        chosen = self.changed(changes)
        if input_data_format not in (None, "channels_first", "channels_last"):
            raise MediaError(
                f"input_data_format is {input_data_format!r}; known: channels_first, channels_last"
            )

        def process(image: Any) -> np.ndarray:
            return chosen.process(image, input_data_format, timeout)

        if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
            images = list(images)
        several = isinstance(images, (list, tuple))
        rows = each(images, "images", process) if several else [process(images)]
        return BatchFeature.of({"pixel_values": rows}, return_tensors)

    preprocess = __call__

    def process(self, image: Any, layout: str | None = None, timeout: float | None = 30.0) -> np.ndarray:
        """One image, `[channels, height, width]`."""
        pixels = _to_array(image, layout, self.do_convert_rgb, timeout)  # [height, width, channels]
        if not pixels.size:
            raise MediaError(f"the image is empty: {list(pixels.shape)}")
        if self.do_resize:
            pixels = self._resized(pixels)
        if self.do_center_crop:
            pixels = _cropped(pixels, self.crop_size["height"], self.crop_size["width"])
        pixels = np.moveaxis(pixels, -1, 0)
        if not self.do_rescale and not self.do_normalize:
            return np.ascontiguousarray(pixels)
        if self.do_normalize and len(pixels) != len(self.image_mean):
            raise MediaError(
                f"the image has {len(pixels)} channel(s), and image_mean has {len(self.image_mean)} values; "
                "pass do_convert_rgb=True, or convert it first: image.convert('RGB')"
            )
        if pixels.dtype != np.uint8:
            return np.stack([self._scaled(channel, c) for c, channel in enumerate(pixels)])
        # A byte has 256 values: what each becomes is looked up.
        values = np.arange(256, dtype=np.uint8)
        return np.stack([self._scaled(values, c).take(channel) for c, channel in enumerate(pixels)])

    def _scaled(self, pixels: np.ndarray, channel: int) -> np.ndarray:
        """Pixels of one channel rescaled and normalised, float32."""
        if self.do_rescale:
            pixels = (pixels.astype(np.float64) * self.rescale_factor).astype(np.float32)
        pixels = pixels.astype(np.float32)
        if self.do_normalize:
            pixels = (pixels - np.float32(self.image_mean[channel])) / np.float32(self.image_std[channel])
        return pixels

    def _resized(self, pixels: np.ndarray) -> np.ndarray:
        """`[height, width, channels]` in the settings' size. Pillow resamples bytes: floats in [0, 1] become
        bytes and then floats again."""
        pil = library("PIL.Image", "image")
        height, width = _target(pixels.shape[0], pixels.shape[1], self.size)
        scaled = _is_unit(pixels)
        if scaled:
            pixels = (pixels.astype(np.float64) * 255).astype(np.float32)
        try:
            image = pil.fromarray(np.ascontiguousarray(_flat(pixels.astype(np.uint8))))
        except TypeError:
            raise MediaError(
                f"pillow resizes no image of {pixels.shape[-1]} channels; pass do_resize=False"
            ) from None
        resized = np.asarray(image.resize((width, height), resample=self.resample))
        resized = resized[..., None] if resized.ndim == 2 else resized
        return (resized.astype(np.float64) * (1 / 255)).astype(np.float32) if scaled else resized


class ViTImageProcessor(ImageProcessor):
    """Of `vit`: a square of 224."""

    models = ("vit",)


class DeiTImageProcessor(ImageProcessor):
    """Of `deit`: the middle of a square of 256."""

    models = ("deit",)
    defaults: ClassVar[Mapping[str, Any]] = {
        "resample": 3,
        "size": {"height": 256, "width": 256},
        "do_center_crop": True,
    }


class BeitImageProcessor(ImageProcessor):
    """Of `beit`."""

    models = ("beit",)
    defaults: ClassVar[Mapping[str, Any]] = {"resample": 3}


class BitImageProcessor(ImageProcessor):
    """Of `dinov2`: the middle of what has a shorter edge of 224."""

    models = ("dinov2",)
    defaults: ClassVar[Mapping[str, Any]] = {
        "resample": 3,
        "size": {"shortest_edge": 224},
        "default_to_square": False,
        "do_center_crop": True,
        "do_convert_rgb": True,
        **_CLIP,
    }


class CLIPImageProcessor(BitImageProcessor):
    """Of `clip`, the same."""

    models = ("clip",)

    def read(self, r: Reader) -> dict[str, Any]:
        r.ignore("use_square_size")
        return super().read(r)


class SiglipImageProcessor(ImageProcessor):
    """Of `siglip`."""

    models = ("siglip",)
    defaults: ClassVar[Mapping[str, Any]] = {
        "resample": 3,
        "default_to_square": False,
        "do_convert_rgb": True,
    }


def _size(r: Reader, key: str, square: bool) -> dict[str, int]:
    """A size as a dict of whole numbers, from a number, a pair or a dict."""
    value = r.value(key)
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    elif isinstance(value, (list, tuple)) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    elif isinstance(value, Mapping):
        value = {name: number for name, number in value.items() if number is not None}
    known = isinstance(value, Mapping) and set(value) in _SIZES
    if not known or not all(isinstance(n, int) and n > 0 for n in value.values()):
        kinds = "; ".join(" and ".join(sorted(names)) for names in _SIZES)
        raise ConfigError(f"{r.source}: {key!r} is {r.value(key)!r}; expected whole numbers for {kinds}")
    return dict(value)


def _numbers(r: Reader, key: str) -> list[float]:
    """One number for each of three channels, or those of a list."""
    value = r.value(key)
    values = list(value) if isinstance(value, (list, tuple)) else [value] * 3
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        raise ConfigError(f"{r.source}: {key!r} is {value!r}; expected a number for each channel")
    return [float(v) for v in values]


def _target(height: int, width: int, size: Mapping[str, int]) -> tuple[int, int]:
    """Height and width that an image is resized to; the other edge is rounded down."""
    if "height" in size:
        return size["height"], size["width"]
    long = int(size["shortest_edge"] * max(height, width) / min(height, width))
    return (size["shortest_edge"], long) if height < width else (long, size["shortest_edge"])


def _cropped(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle of `[rows, columns, channels]`, on black where it is smaller."""
    rows, columns = pixels.shape[:2]
    if rows < height or columns < width:
        whole = np.zeros((max(height, rows), max(width, columns), pixels.shape[2]), pixels.dtype)
        top, left = ceil((whole.shape[0] - rows) / 2), ceil((whole.shape[1] - columns) / 2)
        whole[top : top + rows, left : left + columns] = pixels
        # The middle is counted from the image's edge, not from that of the black around it.
        top, left = top + (rows - height) // 2, left + (columns - width) // 2
        return whole[top : top + height, left : left + width]
    top, left = (rows - height) // 2, (columns - width) // 2
    return pixels[top : top + height, left : left + width]


def _to_array(image: Any, layout: str | None, rgb: bool, timeout: float | None) -> np.ndarray:
    """`[height, width, channels]` of any image."""
    if is_source(image):
        return np.asarray(open_image(image, timeout))
    if isinstance(image, Tensor):
        pixels = image.detach().cpu().numpy()
    elif isinstance(image, np.ndarray):
        pixels = image
    else:
        return _from_pillow(image, rgb)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    elif pixels.ndim != 3:
        raise MediaError(f"an image has 2 or 3 dimensions, and this array is {list(pixels.shape)}")
    elif _channels_first(pixels, layout):
        pixels = np.moveaxis(pixels, 0, -1)
    return _rgb(pixels) if rgb else pixels


def _from_pillow(image: Any, rgb: bool) -> np.ndarray:
    pil = library("PIL.Image", "image")
    if not isinstance(image, pil.Image):
        raise MediaError(
            "an image is a path, an address, bytes, a pillow image, an array or a tensor, not "
            f"{type(image).__name__}"
        )
    try:
        image.load()
    except Exception as error:  # a file that pillow opened but had not yet read
        raise MediaError(f"the image is damaged ({error})") from error
    if rgb and ("A" in image.getbands() or image.info.get("transparency") is not None):
        image = image.convert("RGBA")
        image = pil.alpha_composite(pil.new("RGBA", image.size, (255, 255, 255, 255)), image)
    pixels = np.asarray(image.convert("RGB") if rgb else image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _channels_first(pixels: np.ndarray, layout: str | None) -> bool:
    if layout is not None:
        return layout == "channels_first"
    for first, axis in ((True, 0), (False, 2)):
        if pixels.shape[axis] in (1, 3, 4):
            return first
    raise MediaError(
        f"none of the edges of {list(pixels.shape)} is 1, 3 or 4 channels; pass input_data_format="
    )


def _rgb(pixels: np.ndarray) -> np.ndarray:
    """Three channels: grey three times, or colours over white by their opacity."""
    if pixels.shape[-1] == 1:
        return np.repeat(pixels, 3, axis=-1)
    if pixels.shape[-1] != 4:
        return pixels
    whole = np.issubdtype(pixels.dtype, np.integer)
    if not whole and not (pixels.min() >= 0 and pixels.max() <= 1):
        raise MediaError(
            "a transparent image of floats has values from 0 to 1, and this one "
            f"{pixels.min()} to {pixels.max()}"
        )
    white = 255 if whole else 1.0
    opacity = pixels[..., 3:] / white
    mixed = opacity * pixels[..., :3] + (1 - opacity) * white
    return (np.round(mixed) if whole else mixed).astype(pixels.dtype)


def _is_unit(pixels: np.ndarray) -> bool:
    """Whether values are in [0, 1] rather than bytes, whatever their dtype; `MediaError` if they are
    neither."""
    if pixels.dtype == np.uint8:
        return False
    low, high = pixels.min(), pixels.max()
    if np.isfinite(low) and np.isfinite(high):
        if low >= 0 and high <= 255 and np.allclose(pixels, np.trunc(pixels)):
            return False
        if low >= 0 and high <= 1:
            return True
    raise MediaError(
        f"pixels are whole numbers from 0 to 255 or floats from 0 to 1, and these are {low} to {high}; "
        "scale them, or pass do_resize=False"
    )


def _flat(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., 0] if pixels.shape[-1] == 1 else pixels
