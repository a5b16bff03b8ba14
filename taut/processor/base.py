"""What image processors and feature extractors share: settings from a file, changes to them, saving."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from taut.config import Reader
from taut.errors import ConfigError, nearest
from taut.processor.files import FILE, find, settings_in

Self = TypeVar("Self", bound="Preprocessor")


class Preprocessor:
    """Settings of `preprocessor_config.json`, each an attribute. A subclass has `shared` and its own
    `defaults` for what a file leaves out, and `read`s them strictly; `unused` lists what it left."""

    shared: ClassVar[Mapping[str, Any]] = {}
    defaults: ClassVar[Mapping[str, Any]] = {}
    models: ClassVar[tuple[str, ...]] = ()  # the model types whose files may leave out the class
    input_names: ClassVar[tuple[str, ...]] = ()
    kind_key: ClassVar[str] = "image_processor_type"

    def __init__(self, settings: Mapping[str, Any] | None = None, *, where: str = FILE, **more: Any):
        given = {name: value for name, value in {**(settings or {}), **more}.items() if value is not None}
        reader = Reader({**self.shared, **self.defaults, **given}, where)
        reader.ignore("image_processor_type", "feature_extractor_type", "processor_class", "auto_map")
        self.source = given
        self._names: tuple[str, ...] = ()
        found = self.read(reader)
        self.__dict__.update(found)
        self._names = tuple(found)
        self.unused = reader.unused()

    @classmethod
    def from_pretrained(cls: type[Self], name: str | os.PathLike[str], **options: Any) -> Self:
        """From a folder or a Hub id, whatever class its file names. `revision`, `cache_dir`, `token` and
        `local_files_only` are the Hub's; other options change settings. Raises `CheckpointError` where there
        is no such file, `ConfigError` for one with a wrong value."""
        folder, changes = find(name, options)
        settings, where = settings_in(folder)
        return cls(settings, where=str(where)).changed(changes)

    def read(self, r: Reader) -> dict[str, Any]:
        """The settings by the names of their attributes."""
        raise NotImplementedError

    def changed(self: Self, changes: Mapping[str, Any]) -> Self:
        """Itself with other settings; `ConfigError` for one that it hasn't."""
        changes = {name: value for name, value in changes.items() if value is not None}
        if not changes:
            return self
        for name in changes:
            if name not in self._names:
                raise ConfigError(
                    f"{type(self).__name__} has no setting {name!r}{nearest(name, self._names)}; it has: "
                    f"{', '.join(self._names)}"
                )
        return type(self)({**self.to_dict(), **changes}, where=type(self).__name__)

    @property
    def model_input_names(self) -> list[str]:
        return list(self.input_names)

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are now, as `preprocessor_config.json` has them."""
        return {**self.source, **{name: getattr(self, name) for name in self._names}}

    def save_pretrained(self, folder: str | Path, **more: Any) -> list[str]:
        """Write `preprocessor_config.json`, which transformers and Taut read; returns its path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path, values = folder / FILE, {**self.to_dict(), self.kind_key: type(self).__name__, **more}
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", "utf-8")
        return [str(path)]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in self._names)})"
        )
