"""Images to labels, and to the vectors of their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taut.errors import RequestError
from taut.pipelines.base import Piece, Pipeline, Settings
from taut.pipelines.classification import MediaClassificationSettings, apply, labelled
from taut.processor import open_image


class ImagePipeline(Pipeline):
    """A pipeline that sees images through an image processor. An item is whatever that takes: a path, an
    address, bytes, a pillow image, an array or a tensor; those of four dimensions are several."""

    window = 128  # images as models take them are large

    def is_item(self, inputs: Any) -> bool:
        if isinstance(inputs, (np.ndarray, Tensor)):
            return inputs.ndim < 4
        return _pillow(inputs) or super().is_item(inputs)  # a pillow image is not iterated over

    def see(self, item: Any, **options: Any) -> list[Piece]:
        """The pixels of one image; `options` are the processor's. A pillow image is turned upright and into
        RGB, as a file is."""
        item = open_image(item) if _pillow(item) else item
        pixels = self.processor(item, return_tensors="pt", **options)["pixel_values"][0]
        patches = self.model.pictures.patches
        tokens = pixels.shape[1] * pixels.shape[2] // (patches.size[0] * patches.size[1]) + patches.prefix
        return [Piece({"pixel_values": pixels}, tokens)]

    def run(self, pieces: Sequence[Piece], pick: Any) -> list[Tensor]:
        """`pick` of the model's output for each image, float32 on the host; those of one size go together."""
        found: list[Any] = [None] * len(pieces)
        shapes: dict[torch.Size, list[int]] = {}
        for index, piece in enumerate(pieces):
            shapes.setdefault(piece.inputs["pixel_values"].shape, []).append(index)
        for rows in shapes.values():
            pixels = torch.stack([pieces[row].inputs["pixel_values"] for row in rows])
            output = pick(self.model(pixels.to(self.device, self.dtype))).to(torch.float32).cpu()
            for row, one in zip(rows, output.unbind(0), strict=True):
                found[row] = one
        return found


def _pillow(item: Any) -> bool:
    return hasattr(item, "getexif")


class ImageClassification(ImagePipeline):
    """An image to its labels, `[{"label", "score"}]`, the best first."""

    task = "image-classification"
    settings = MediaClassificationSettings

    def prepare_one(self, item: Any, settings: MediaClassificationSettings) -> list[Piece]:
        return self.see(item, timeout=settings.timeout)

    def compute(self, pieces: Sequence[Piece], settings: MediaClassificationSettings) -> Sequence[Tensor]:
        return self.run(pieces, lambda output: output.logits)

    def finish(
        self,
        item: Any,
        pieces: Sequence[Piece],
        outputs: Sequence[Tensor],
        settings: MediaClassificationSettings,
    ) -> list[dict[str, Any]]:
        scores = apply(outputs[0], self.model.config, settings.function_to_apply)
        return labelled(scores, self.model.config, settings.top_k)


@dataclass(frozen=True)
class ImageFeatureSettings(Settings):
    """`pool`: the vector of the whole image, of a model with a pooler; `return_tensors`: tensors instead of
    lists; `image_processor_kwargs`: changes to the processor's settings; `timeout`: seconds to wait for an
    address."""

    pool: bool = False
    return_tensors: bool = False
    image_processor_kwargs: Mapping[str, Any] | None = None
    timeout: float | None = 30.0


class ImageFeatureExtraction(ImagePipeline):
    """An image to the last hidden states of its tokens, `[1, tokens, dim]`, or with `pool` to its vector,
    `[1, dim]`; float32, as nested lists."""

    task = "image-feature-extraction"
    settings = ImageFeatureSettings

    def check(self, settings: ImageFeatureSettings) -> None:
        fresh = any("pooler" in name for name in self.model.newly_initialised())
        if settings.pool and (fresh or self.model.model.pooler is None):
            raise RequestError(
                f"pool=True needs a pooler's weights, which this {self.model.architecture()} lacks; leave it "
                "out for the vectors of all tokens"
            )

    def prepare_one(self, item: Any, settings: ImageFeatureSettings) -> list[Piece]:
        return self.see(item, timeout=settings.timeout, **(settings.image_processor_kwargs or {}))

    def compute(self, pieces: Sequence[Piece], settings: ImageFeatureSettings) -> Sequence[Tensor]:
        return self.run(
            pieces, lambda output: output.pooler_output if settings.pool else output.last_hidden_state
        )

    def finish(
        self, item: Any, pieces: Sequence[Piece], outputs: Sequence[Tensor], settings: ImageFeatureSettings
    ) -> Any:
        return outputs[0][None] if settings.return_tensors else outputs[0][None].tolist()
