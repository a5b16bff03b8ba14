"""Writes a tokenizer's files so that transformers and Taut load it back equal."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from taut.errors import TokenizerError

if TYPE_CHECKING:
    from taut.tokenizer.tokenizer import Tokenizer

TOKENIZER = "tokenizer.json"
CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"


def save_tokenizer(
    tokenizer: Tokenizer, folder: Path, vocabulary: Mapping[str, str | bytes] | None = None
) -> tuple[str, ...]:
    """Writes the files into `folder`, made if need be; returns their paths. `vocabulary` has the files that
    stand in place of `tokenizer.json`."""
    files = {
        **({TOKENIZER: _backend(tokenizer)} if vocabulary is None else vocabulary),
        CONFIG: _json(_config(tokenizer)),
        SPECIAL: _json(tokenizer.special_tokens_map),
    }
    return write_files(folder, files | _templates(tokenizer.chat_template))


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> tuple[str, ...]:
    """Writes files under their names into `folder`, made if need be; returns their paths."""
    if folder.exists() and not folder.is_dir():
        raise TokenizerError(f"{folder} is a file; a tokenizer is saved into a folder")
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(partial, path)
    return tuple(str(folder / name) for name in files)


def _backend(tokenizer: Tokenizer) -> str:
    with tokenizer._lock:  # padding and truncation of the last call are no part of the tokenizer
        backend = tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        return backend.to_str(pretty=True)


def _config(tokenizer: Tokenizer) -> dict[str, object]:
    config: dict[str, object] = {
        **tokenizer.special_tokens_map,
        "clean_up_tokenization_spaces": tokenizer.clean_up_tokenization_spaces,
        "model_input_names": tokenizer.model_input_names,
        "model_max_length": tokenizer.model_max_length,
        "padding_side": tokenizer.padding_side,
        "split_special_tokens": tokenizer.split_special_tokens,
        "truncation_side": tokenizer.truncation_side,
        **tokenizer._saved_settings(),
    }
    if tokenizer.extra_special_tokens:
        config["extra_special_tokens"] = tokenizer.extra_special_tokens
    return config


def _templates(templates: str | Mapping[str, str] | None) -> dict[str, str]:
    named = {"default": templates} if isinstance(templates, str) else dict(templates or {})
    files = {}
    for name, text in named.items():
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            raise TokenizerError(f"a chat template can't be saved under the name {name!r}; rename it")
        files[TEMPLATE if name == "default" else f"{TEMPLATES}/{name}.jinja"] = text
    return files


def _json(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
