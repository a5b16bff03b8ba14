"""The families: `models/<model_type>.py`, with underscores for hyphens, is the whole registry, each with its
`ARCHITECTURE` (transformers' class with the head it was trained with), a `read` and `RULES`, or, where the
files' layout depends on the config, `rules(config)`; and `MODULES`, or `modules(config)`, the same for
transformers' modules, where these have other names than its files."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import Any

from taut.config import ModelConfig, Reader
from taut.errors import ConfigError, nearest
from taut.weights import Rename, Rule, apart

# How class names of transformers end, and the kind of model that a family is whose `ARCHITECTURE` ends so.
_KINDS: Mapping[str, str] = MappingProxyType(
    {
        "ForCausalLM": "decoder",
        "LMHeadModel": "decoder",
        "ForMaskedLM": "encoder",
        "ForConditionalGeneration": "encoder-decoder",
        "MTModel": "encoder-decoder",
        "ForImageClassification": "image encoder",
        "ForAudioClassification": "spectrogram encoder",
        "ForCTC": "speech encoder",
        "TextModel": "text tower",
        "VisionModel": "image tower",
        "Model": "image-text model",
    }
)

# What files of every family of a kind call the heads that they weren't trained with.
_HEADS: Mapping[str, tuple[Rule, ...]] = MappingProxyType({"decoder": (Rename("score", "classifier"),)})


def families() -> list[str]:
    """Every `model_type` Taut knows, with underscores for hyphens, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def family(model_type: str, source: str = "") -> ModuleType:
    """The module of a `model_type`; `ConfigError` with the nearest names for an unknown one, which says that
    `source` holds it."""
    known, name = families(), model_type.replace("-", "_")
    if name not in known:
        where = f"{source}: " if source else ""
        raise ConfigError(
            f"{where}'model_type' is {model_type!r}, which Taut does not know{nearest(model_type, known)}; "
            f"known: {', '.join(known)}"
        )
    return import_module(f"{__name__}.{name}")


def read_config(data: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """The `ModelConfig` of a `config.json` (as a dict); `ConfigError` names the key that is wrong."""
    reader = Reader(data, source)
    module = family(reader.str("model_type"), source)
    config = replace(module.read(reader), kind=kind(module))
    return config if config.architecture else replace(config, architecture=module.ARCHITECTURE)


def kind(module: ModuleType) -> str:
    """The `ModelConfig.kind` of a family: its `KIND`, or what its `ARCHITECTURE` says."""
    return getattr(module, "KIND", None) or _KINDS[_suffix(module.ARCHITECTURE)]


def stem(module: ModuleType) -> str:
    """What the class names of a family begin with in transformers: `Llama`, of a half `CLIPText`."""
    suffix = "Model" if kind(module).endswith("tower") else _suffix(module.ARCHITECTURE)
    return getattr(module, "STEM", None) or module.ARCHITECTURE.removesuffix(suffix)


def _suffix(architecture: str) -> str:
    return next(suffix for suffix in _KINDS if architecture.endswith(suffix))


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """How the names on disk of a model's family map onto Taut's."""
    module = family(config.model_type)
    found = module.rules(config) if hasattr(module, "rules") else module.RULES
    return (*found, *_HEADS.get(config.kind, ()))


def module_rules(config: ModelConfig) -> tuple[Rule, ...]:
    """How the names of transformers' modules map onto Taut's."""
    module = family(config.model_type)
    found = module.modules(config) if hasattr(module, "modules") else getattr(module, "MODULES", None)
    return rules(config) if found is None else (*found, *_HEADS.get(config.kind, ()))


def layouts(config: ModelConfig) -> list[tuple[Rule, ...]]:
    """Every layout that files of a model's family may have: its `rules` first."""
    usual = rules(config)
    return list(dict.fromkeys((usual, module_rules(config), apart(usual))))
