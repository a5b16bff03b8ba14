"""Pipelines of images, beside those of transformers on the same tiny checkpoints."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

import taut
from taut.errors import MediaError, RequestError
from taut.pipelines import ItemError
from tests.images import BOTH, DINO, SIZE, VIT
from tests.pipelines.folders import folder, write
from tests.pipelines.test_text import same

LABELS = {0: "cat", 1: "dog", 2: "tree"}
SHARP = {"initializer_range": 0.3}


def vit(head: str = "ForImageClassification", **options: Any) -> Path:
    config = {**VIT, **SHARP, "id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}, **options}
    processor = transformers.ViTImageProcessor(size={"height": SIZE, "width": SIZE})
    return write(f"vit-{head}-{options}", f"ViT{head}", config, processor)


def dino() -> Path:
    """A model that takes images of any size, and a processor that keeps their shape."""
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": 12}, do_center_crop=False, do_convert_rgb=True
    )
    return write("dino", "Dinov2Model", {**DINO, **SHARP, "mlp_ratio": 2}, processor)


def clip() -> Path:
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    return write("clip", "CLIPModel", {**BOTH, "projection_dim": 40}, processor)


@functools.cache
def pictures() -> list[str]:
    found = []
    for index, size in enumerate([(30, 24), (24, 24), (17, 40)]):
        path = folder() / f"{index}.png"
        pixels = np.random.default_rng(index).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        found.append(str(path))
    return found


@pytest.mark.parametrize(
    ("task", "source", "options"),
    [
        ("image-classification", vit, {}),
        ("image-classification", vit, {"top_k": 2, "function_to_apply": "sigmoid"}),
        ("image-classification", functools.partial(vit, problem_type="multi_label_classification"), {}),
        ("image-feature-extraction", functools.partial(vit, "Model"), {}),
        ("image-feature-extraction", functools.partial(vit, "Model"), {"pool": True}),
        ("image-feature-extraction", dino, {"pool": True, "return_tensors": True}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value))[:30],
)
def test_results_are_those_of_transformers(task, source, options):
    pipe, reference = (
        make(task, str(source()), device="cpu") for make in (taut.pipeline, transformers.pipeline)
    )
    want = reference(pictures(), **options)
    same(pipe(pictures(), **options), want)
    same(pipe(Path(pictures()[0]), **options), want[0])
    opened = [Image.open(path) for path in pictures()]
    same(pipe(opened[1], **options), want[1])
    for mode in ("RGBA", "L", "P"):
        same(pipe(opened[1].convert(mode), **options), reference(opened[1].convert(mode), **options))
    same(list(pipe(iter(opened), batch_size=2, **options)), want)
    array = np.asarray(opened[1])
    same(pipe(array, **options), want[1])
    same(list(pipe(np.stack([array, array]), **options)), [want[1]] * 2)


def test_the_images_half_of_a_model_of_both():
    found = taut.pipeline("image-feature-extraction", clip(), device="cpu")(pictures()[0])
    reference = transformers.CLIPVisionModel.from_pretrained(clip())
    pixels = transformers.CLIPImageProcessor.from_pretrained(clip())(
        Image.open(pictures()[0]), return_tensors="pt"
    )
    same(found, reference(**pixels).last_hidden_state.tolist())


def test_a_damaged_image_among_several_is_an_error_in_its_place(tmp_path):
    pipe = taut.pipeline(model=vit(), device="cpu")
    assert pipe.task == "image-classification" and pipe.image_processor is pipe.processor
    want = pipe(pictures())
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(pictures()[0]).read_bytes()[:60])
    with pytest.warns(UserWarning) as caught:
        got = pipe([pictures()[0], str(cut), pictures()[1], "missing.png", 3, pictures()[2]])
    same([got[0], got[2], got[5]], want)
    assert [index for index, one in enumerate(got) if isinstance(one, ItemError)] == [1, 3, 4]
    said = [str(one.message) for one in caught]
    for message, part in zip(said, ("item 1: .*cut.png", "item 3: missing.png", "item 4: "), strict=True):
        assert re.match(part, message), message
    with pytest.raises(MediaError, match=r"missing.png: no such file"):
        pipe("missing.png")


def test_what_a_model_of_images_cannot_do_is_named():
    with pytest.raises(RequestError, match="no head for image-classification; its tasks: image-feature"):
        taut.pipeline("image-classification", dino())
    with pytest.raises(RequestError, match="pool=True needs a pooler's weights, which this ViTModel lacks"):
        taut.pipeline("image-feature-extraction", vit(), device="cpu", pool=True)(pictures()[0])
    with pytest.raises(RequestError, match="pixel_values"):
        taut.pipeline(model=vit("Model"), device="cpu", image_processor_kwargs={"do_resize": False})(
            pictures()[0]
        )
