"""What a folder, a `.gguf` file or a Hub id says its model is, with changes to that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taut.checkpoint import open_checkpoint
from taut.checkpoint.base import read_json
from taut.config import ModelConfig
from taut.hub import config_file
from taut.models import read_config


def config_at(name: str | Path, changes: Mapping[str, Any], **where: Any) -> ModelConfig:
    """The config there, of which nothing else is downloaded. `changes` take the place of what `config.json`
    says, under its names; those that nothing reads are in `unused`. `where` are options of
    `hub.config_file`."""
    path = config_file(name, **where)
    data = read_json(path) if path.suffix == ".json" else open_checkpoint(path).config
    return read_config({**data, **changes}, str(path))
