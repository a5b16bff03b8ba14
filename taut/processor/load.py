"""`AutoImageProcessor` and `AutoFeatureExtractor`: the class that a checkpoint's files name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from taut.errors import ConfigError, nearest
from taut.processor import image, sound
from taut.processor.base import Preprocessor
from taut.processor.files import find, read_json, settings_in

CLASSES: Mapping[str, type[Preprocessor]] = MappingProxyType(
    {
        name: kind
        for module in (image, sound)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, Preprocessor) and kind.models
    }
)


class AutoFeatureExtractor:
    """Loads the feature extractor or image processor of a checkpoint, whatever its class."""

    wanted: type[Preprocessor] = Preprocessor

    def __init__(self) -> None:
        name = type(self).__name__
        raise TypeError(f"{name} is no processor itself; call {name}.from_pretrained(name)")

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> Any:
        """From a folder or a Hub id, by its `preprocessor_config.json` or `processor_config.json`.

        `revision`, `cache_dir`, `token` and `local_files_only` are the Hub's; other options change settings.
        Raises `CheckpointError` where there is no such file, `ConfigError` for one with a wrong value.
        """
        folder, changes = find(name, options)
        found = load_media(folder)
        if not isinstance(found, cls.wanted):
            raise ConfigError(f"{folder} has a {type(found).__name__}; load it with AutoFeatureExtractor")
        return found.changed(changes)


class AutoImageProcessor(AutoFeatureExtractor):
    """Loads the image processor of a checkpoint, whatever its class."""

    wanted = image.ImageProcessor


def load_media(folder: Path, *, joint: bool = False) -> Preprocessor:
    """The image processor or feature extractor of a folder; `joint`: as the part of a processor."""
    settings, where = settings_in(folder, joint=joint)
    return _class(settings, folder, where)(settings, where=str(where))


def _class(settings: Mapping[str, Any], folder: Path, where: Path) -> type[Preprocessor]:
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    if named is None:
        model_type = read_json(folder / "config.json").get("model_type")
        found = next((kind for kind in CLASSES.values() if model_type in kind.models), None)
        if found is None:
            raise ConfigError(
                f"{where}: neither 'image_processor_type' nor 'feature_extractor_type' is there, and the "
                f"'model_type' {model_type!r} has none of its own; known: {', '.join(CLASSES)}"
            )
        return found
    # `Fast` was another implementation; images had feature extractors once.
    name = str(named).removesuffix("Fast").removesuffix("Pil")
    older = name.removesuffix("FeatureExtractor") + "ImageProcessor"
    name = older if older in CLASSES else name
    if name not in CLASSES:
        raise ConfigError(
            f"{where}: the class {named!r} is not known{nearest(name, CLASSES)}; known: {', '.join(CLASSES)}"
        )
    return CLASSES[name]
