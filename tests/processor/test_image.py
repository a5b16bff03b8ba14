"""Image processors against transformers', on pictures of every kind that programs pass."""

from __future__ import annotations

import json

import numpy as np
import PIL.Image
import pytest
import torch
import transformers

from taut import AutoFeatureExtractor, AutoImageProcessor, processor
from taut.errors import CheckpointError, ConfigError, MediaError
from tests.processor.media import image_bytes, picture

KINDS = ["ViT", "DeiT", "Beit", "Bit", "CLIP", "Siglip"]
SETTINGS = {
    "as-it-is": {},
    "small": {"size": 30, "crop_size": 20},
    "shortest": {"size": {"shortest_edge": 37}, "do_center_crop": True, "crop_size": 32},
    "crop-beyond": {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 60, "width": 55}},
    "plain": {"do_normalize": False, "size": {"height": 21, "width": 34}},
    "bytes": {"do_normalize": False, "do_rescale": False, "size": 24},
    "unscaled": {"do_rescale": False, "size": 24, "image_mean": 0.3, "image_std": [0.1, 0.2, 0.7]},
    **{f"filter-{number}": {"resample": number, "size": [25, 70]} for number in range(6)},
}
IMAGES = {
    "wide": picture(40, 57),
    "high": picture(63, 38),
    "array-last": np.asarray(picture(33, 45)),
    "array-first": np.moveaxis(np.asarray(picture(45, 33)), -1, 0),
    "tensor": torch.from_numpy(np.asarray(picture(41, 41)).copy()).permute(2, 0, 1),
    "floats": (np.asarray(picture(40, 50)) / 255).astype(np.float32),
}


def pair(kind: str, settings: dict, tmp_path):
    """Transformers' processor of pillow, and ours from what it saves."""
    theirs = getattr(transformers, f"{kind}ImageProcessorPil")(**settings)
    theirs.save_pretrained(tmp_path)
    return theirs, AutoImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_equal_the_oracles(kind, settings, tmp_path):
    theirs, ours = pair(kind, settings, tmp_path)
    assert ours.unused == ()
    for name, image in IMAGES.items():
        if name == "floats" and not theirs.do_resize:
            continue
        want = theirs(image, return_tensors="np").pixel_values
        got = ours(image, return_tensors="np").pixel_values
        assert got.dtype == want.dtype and np.array_equal(got, want), name


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_other_modes_become_rgb_as_the_oracle_has_them(mode, tmp_path):
    theirs, ours = pair("CLIP", {"size": 30, "crop_size": 30}, tmp_path)
    image = PIL.Image.new("I;16", (35, 35), 3000) if mode == "I;16" else picture(35, 50, mode)
    assert np.array_equal(ours(image)["pixel_values"][0], theirs(image)["pixel_values"][0])
    if mode not in ("P", "CMYK"):
        pixels = np.asarray(image)
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        if pixels.shape[-1] in (1, 4) and pixels.dtype == np.uint8:
            want = theirs(pixels, input_data_format="channels_last")["pixel_values"][0]
            assert np.array_equal(ours(pixels, input_data_format="channels_last")["pixel_values"][0], want)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_files_equal_what_pillow_reads(kind, tmp_path):
    theirs, ours = pair("ViT", {"size": 24}, tmp_path)
    content = image_bytes(picture(40, 57), kind)
    path = tmp_path / f"image.{kind.lower()}"
    path.write_bytes(content)
    want = theirs(str(path), return_tensors="pt").pixel_values
    for source in (str(path), path, content):
        assert torch.equal(ours(source, return_tensors="pt").pixel_values, want)
    batch = ours([path, PIL.Image.open(path), content], return_tensors="pt").pixel_values
    assert torch.equal(batch, want.expand(3, -1, -1, -1))


def test_files_are_upright_and_pictures_are_left_as_they_are(tmp_path):
    theirs, ours = pair("ViT", {"do_resize": False}, tmp_path)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    (tmp_path / "turned.png").write_bytes(image_bytes(picture(20, 30), "PNG", exif=exif))
    path = str(tmp_path / "turned.png")
    assert ours(path)["pixel_values"][0].shape == (3, 30, 20)
    assert np.array_equal(ours(path)["pixel_values"][0], theirs(path)["pixel_values"][0])
    image = PIL.Image.open(path)
    assert np.array_equal(ours(image)["pixel_values"][0], theirs(image)["pixel_values"][0])
    assert processor.open_image(image).size == (20, 30)


def test_changes_are_for_one_call(tmp_path):
    theirs, ours = pair("CLIP", {"size": 30, "crop_size": 20}, tmp_path)
    changes = {"do_center_crop": False, "size": {"height": 10, "width": 12}, "image_std": [1.0, 2.0, 3.0]}
    got = ours(IMAGES["wide"], **changes, return_tensors="np").pixel_values
    assert np.array_equal(got, theirs(IMAGES["wide"], **changes, return_tensors="np").pixel_values)
    assert ours(IMAGES["wide"], return_tensors="np").pixel_values.shape == (1, 3, 20, 20)
    batch = np.stack([np.asarray(picture(20, 30, seed=seed)) for seed in range(3)])
    assert np.array_equal(
        ours(batch, return_tensors="np").pixel_values, np.stack([*theirs(batch)["pixel_values"]])
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"feature_extractor_type": "CLIPFeatureExtractor", "size": 40, "crop_size": 32, "do_resize": True},
        {"image_processor_type": "ViTImageProcessorFast", "size": {"height": 32, "width": 32}},
        {"size": 32},
    ],
    ids=["before-image-processors", "fast", "no-name"],
)
def test_older_and_newer_files(settings, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    want = theirs(IMAGES["wide"], return_tensors="np").pixel_values
    ours = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(ours).__name__ == type(theirs).__name__.removesuffix("Pil")
    assert np.array_equal(ours(IMAGES["wide"], return_tensors="np").pixel_values, want)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    (tmp_path / "preprocessor_config.json").unlink()
    newer = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert np.array_equal(newer(IMAGES["wide"], return_tensors="np").pixel_values, want)


def test_save_and_both_read_it(tmp_path):
    _, ours = pair("DeiT", {"size": 33, "image_mean": [0.1, 0.2, 0.3]}, tmp_path)
    ours.changed({"resample": 0}).save_pretrained(tmp_path / "saved")
    again = AutoImageProcessor.from_pretrained(tmp_path / "saved")
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "saved", backend="pil")
    want = ours(IMAGES["wide"], resample=0, return_tensors="np").pixel_values
    assert np.array_equal(again(IMAGES["wide"], return_tensors="np").pixel_values, want)
    assert np.array_equal(theirs(IMAGES["wide"], return_tensors="np").pixel_values, want)


PNG = image_bytes(picture(20, 30), "PNG")
BAD = {
    "not-an-image": (b"hello", "5 bytes is not an image that pillow can read, or it is damaged"),
    "cut": (image_bytes(picture(60, 60), "JPEG")[:700], "damaged .*truncated"),
    "empty": (b"", "0 bytes is not an image"),
    "no-file": ("nowhere/cat.png", "nowhere/cat.png: no such file"),
    "folder": (".", r"\.: a folder, not a file"),
    "address": ("http://127.0.0.1:1/cat.png", "http://127.0.0.1:1/cat.png can't be downloaded"),
    "data": ("data:image/png;base64,###", "data:image/png;base64: the rest is not base64"),
    "grey": (picture(9, 9, "L"), "1 channel.*image_mean has 3.*do_convert_rgb=True"),
    "range": (
        np.full((8, 8, 3), 300),
        "whole numbers from 0 to 255 or floats from 0 to 1, and these are 300",
    ),
    "nan": (np.full((8, 8, 3), np.nan), "these are nan"),
    "shape": (np.zeros((8, 8, 5)), r"none of the edges of \[8, 8, 5\] is 1, 3 or 4 channels"),
    "dimensions": (np.zeros((2, 2, 2, 2, 2)), r"2 or 3 dimensions, and this array is \[2, 2, 2, 2, 2\]"),
    "nothing": (np.zeros((0, 8, 3), np.uint8), r"empty: \[0, 8, 3\]"),
    "kind": ({"a": 1}, "an array or a tensor, not dict"),
}


@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
def test_a_bad_image_is_named_and_the_others_can_go_on(bad, message, tmp_path):
    _, ours = pair("ViT", {"size": 8}, tmp_path)
    with pytest.raises(MediaError, match=message) as alone:
        ours(bad)
    assert alone.value.index is None
    with pytest.raises(MediaError, match=r"images\[1\]: ") as among:
        ours([PNG, bad, PNG])
    assert among.value.index == 1


@pytest.mark.filterwarnings("ignore::UserWarning")  # pillow's, of what it skips
def test_no_damage_does_anything_but_an_error_of_ours(tmp_path):
    _, ours = pair("ViT", {"size": 8}, tmp_path)
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "TIFF"):
        whole = np.frombuffer(image_bytes(picture(20, 30), kind), np.uint8)
        for _ in range(40):
            damaged = whole[: generator.integers(1, len(whole) + 1)].copy()
            places = generator.integers(0, len(damaged), 6)
            damaged[places] = generator.integers(0, 256, 6)
            try:
                assert ours(damaged.tobytes())["pixel_values"][0].shape == (3, 8, 8)
            except MediaError:
                continue


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (None, CheckpointError, "no preprocessor_config.json there"),
        ({"image_processor_type": "ViTImageProcesor"}, ConfigError, "nearest: ViTImageProcessor"),
        ({"size": {"longest_edge": 9}}, ConfigError, r"'size' is \{'longest_edge': 9\}"),
        ({"resample": 9}, ConfigError, r"'resample' is 9; known: 0 \(NEAREST\)"),
        ({"image_mean": "grey"}, ConfigError, "'image_mean' is 'grey'"),
        ({"do_resize": "yes"}, ConfigError, "'do_resize' is 'yes'; expected true or false"),
        ({"do_pad": True}, ConfigError, "'do_pad' is True, which is not supported"),
        ({"feature_extractor_type": "WhisperFeatureExtractor"}, ConfigError, "has a WhisperFeatureExtractor"),
    ],
)
def test_bad_settings_are_named(settings, error, message, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    if settings is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(error, match=message):
        AutoImageProcessor.from_pretrained(tmp_path)


def test_settings_that_nothing_reads_are_listed(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "ViTImageProcessor", "crop_pct": 0.9})
    )
    assert AutoImageProcessor.from_pretrained(tmp_path).unused == ("crop_pct",)
    with pytest.raises(ConfigError, match="has no setting 'sise'; nearest: size"):
        AutoImageProcessor.from_pretrained(tmp_path)(IMAGES["wide"], sise=3)


def test_a_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(MediaError, match=r"this needs pillow.*pip install 'taut\[image\]'"):
        processor.ViTImageProcessor()(PNG)
