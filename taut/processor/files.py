"""Where a processor's settings are in a checkpoint's folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import MappingProxyType
from typing import Any

from taut.errors import CheckpointError, ConfigError
from taut.hub import resolve

FILE = "preprocessor_config.json"
JOINT = "processor_config.json"  # newer: the settings of each part inside

# Processors of transformers that do more than their parts.
_REFUSED = MappingProxyType(
    {
        "Wav2Vec2ProcessorWithLM": "decoding with a language model is not supported; load the parts with "
        "AutoFeatureExtractor and AutoTokenizer"
    }
)


def find(name: str | os.PathLike[str], options: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The folder that a name leads to, and those of the options that aren't the Hub's."""
    hub = {
        key: options[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in options
    }
    rest = {
        key: value for key, value in options.items() if key not in (*hub, "use_fast", "trust_remote_code")
    }
    folder = resolve(name, weights=False, **hub)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: a .gguf file has no processor; name the folder or repository with {FILE}"
        )
    return folder, rest


def settings_in(folder: Path, *, joint: bool = False) -> tuple[dict[str, Any], Path]:
    """The settings of a folder's image processor or feature extractor, and the file they are in. Raises
    `CheckpointError` where there are none, `ConfigError` for a file that is not JSON and, for `joint`, a
    processor that Taut hasn't."""
    outer = read_json(folder / JOINT)
    inner = next((outer[part] for part in ("image_processor", "feature_extractor") if outer.get(part)), None)
    found, where = (inner, folder / JOINT) if inner else (read_json(folder / FILE), folder / FILE)
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: expected an object of settings, got {type(found).__name__}")
    if not found:
        raise CheckpointError(f"{folder}: no {FILE} there; name the folder or repository that has it")
    for source in (outer, found) if joint else ():
        if (why := _REFUSED.get(source.get("processor_class"))) is not None:
            raise ConfigError(f"{where}: 'processor_class' is {source['processor_class']}: {why}")
    return found, where


def has_settings(folder: Path) -> bool:
    return (folder / FILE).is_file() or (folder / JOINT).is_file()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
