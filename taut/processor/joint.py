"""`Processor`: a tokenizer beside an image processor or feature extractor, in one call; `AutoProcessor`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

from taut.errors import MediaError
from taut.processor.base import Preprocessor
from taut.processor.files import find, has_settings
from taut.processor.image import ImageProcessor
from taut.processor.load import load_media
from taut.processor.output import BatchFeature
from taut.processor.sound import WhisperFeatureExtractor
from taut.tokenizer import AutoTokenizer, Tokenizer

Self = TypeVar("Self", bound="Processor")

# Options of both parts, and of the tokenizer alone.
_SHARED = ("padding", "truncation", "max_length", "pad_to_multiple_of", "return_attention_mask")
_OF_TEXT = ("add_special_tokens", "padding_side", "return_token_type_ids", "stride", "text_pair")


class Processor:
    """Text together with images or sounds. `tokenizer`, and `image_processor` or `feature_extractor`, are its
    parts; `decode` and `batch_decode` are the tokenizer's."""

    def __init__(
        self,
        media: Preprocessor | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        image_processor: ImageProcessor | None = None,
        feature_extractor: Preprocessor | None = None,
    ):
        media = media or image_processor or feature_extractor
        if media is None or tokenizer is None:
            raise MediaError("a processor has a tokenizer, and an image processor or feature extractor")
        self.media, self.tokenizer = media, tokenizer
        self.image_processor = media if isinstance(media, ImageProcessor) else None
        self.feature_extractor = None if isinstance(media, ImageProcessor) else media

    @classmethod
    def from_pretrained(cls: type[Self], name: str | os.PathLike[str], **options: Any) -> Self:
        """From a folder or a Hub id that has both parts. `revision`, `cache_dir`, `token` and
        `local_files_only` are the Hub's; other options change settings of the image processor or feature
        extractor. Raises `CheckpointError`, `ConfigError` or `TokenizerError` for a part that isn't right."""
        folder, changes = find(name, options)
        return cls(load_media(folder, joint=True).changed(changes), AutoTokenizer.from_pretrained(folder))

    def __call__(
        self,
        media: Any = None,
        text: Any = None,
        *,
        images: Any = None,
        audio: Any = None,
        return_tensors: str | None = None,
        **options: Any,
    ) -> BatchFeature:
        """The inputs of `images` or `audio` (also as the first argument) and `text`, together.

        Options are those of the parts. `padding`, `truncation` and `max_length` are the tokenizer's and,
        where there is audio, also the audio's; text beside audio becomes `labels`. Raises `MediaError` or
        `TokenizerError`.
        """
        given = next((value for value in (media, images, audio) if value is not None), None)
        if given is None and text is None:
            raise MediaError("nothing to process: give images or audio, text, or both")
        sound = self.feature_extractor is not None
        if (images if sound else audio) is not None:
            takes, other = ("audio", "images") if sound else ("images", "audio")
            raise MediaError(f"this model takes {takes}, and no {other}")
        found = BatchFeature()
        if given is not None:
            others = _OF_TEXT if sound else (*_OF_TEXT, *_SHARED)
            own = {name: value for name, value in options.items() if name not in others}
            found.update(self.media(given, return_tensors=return_tensors, **own))
        if text is not None:
            if given is not None:
                options = {name: value for name, value in options.items() if name in (*_OF_TEXT, *_SHARED)}
            encoded = self.tokenizer(text, return_tensors=return_tensors, **options)
            found.update({"labels": encoded["input_ids"]} if sound and given is not None else encoded)
        return found

    def decode(self, *args: Any, **options: Any) -> Any:
        return self.tokenizer.decode(*args, **options)

    def batch_decode(self, *args: Any, **options: Any) -> Any:
        return self.tokenizer.batch_decode(*args, **options)

    @property
    def model_input_names(self) -> list[str]:
        return [*self.tokenizer.model_input_names, *self.media.model_input_names]

    def save_pretrained(self, folder: str | Path) -> list[str]:
        """Write the files of both parts, which transformers and Taut read; returns their paths."""
        return [*self.tokenizer.save_pretrained(folder), *self.media.save_pretrained(folder)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.media!r}, {self.tokenizer!r})"


class WhisperProcessor(Processor):
    """A tokenizer that knows languages, tasks and times beside a feature extractor."""

    def get_decoder_prompt_ids(self, *args: Any, **options: Any) -> list[tuple[int, int]]:
        """See `WhisperTokenizer.get_decoder_prompt_ids`."""
        return self.tokenizer.get_decoder_prompt_ids(*args, **options)

    def get_prompt_ids(self, *args: Any, **options: Any) -> Any:
        """See `WhisperTokenizer.get_prompt_ids`."""
        return self.tokenizer.get_prompt_ids(*args, **options)


class AutoProcessor:
    """Loads all that makes a checkpoint's inputs: its tokenizer with its image processor or feature
    extractor, or the one that it has."""

    def __init__(self) -> None:
        raise TypeError("AutoProcessor is no processor itself; call AutoProcessor.from_pretrained(name)")

    @classmethod
    def from_pretrained(
        cls, name: str | os.PathLike[str], **options: Any
    ) -> Processor | Preprocessor | Tokenizer:
        """From a folder or a Hub id; options as for `Processor.from_pretrained`."""
        folder, changes = find(name, options)
        if not has_settings(folder):
            return AutoTokenizer.from_pretrained(folder, **changes)
        tokenizer = ("tokenizer_config.json", "tokenizer.json", "vocab.json")
        if any((folder / file).is_file() for file in tokenizer):
            return _joint(folder).from_pretrained(folder, **changes)
        return load_media(folder, joint=True).changed(changes)


def _joint(folder: Path) -> type[Processor]:
    """The class of a folder with both parts."""
    return WhisperProcessor if isinstance(load_media(folder), WhisperFeatureExtractor) else Processor
