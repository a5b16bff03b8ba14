"""`BitsAndBytesConfig`: how a model is, or is to be, quantized, in the words of transformers."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from taut.errors import ConfigError, nearest
from taut.quant.blockwise import BLOCKS, CODES

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.uint8)
}

HEADS = ("lm_head", "embed_out")  # what stays dense where nothing is named


@dataclass(frozen=True)
class BitsAndBytesConfig:
    """4-bit (`load_in_4bit`) or 8-bit (`load_in_8bit`) linear layers, as transformers' class of this name.

    `bnb_4bit_quant_type`: "fp4" or "nf4". `bnb_4bit_use_double_quant`: scales in 8 bits too.
    `bnb_4bit_compute_dtype`: what 4-bit products are computed in; float32, which files hold where nobody
    chose, and None stand for the model's own dtype (sums are float32 in any case). `bnb_4bit_quant_storage`:
    the dtype that saved codes are viewed as. `bnb_4bit_blocksize`: values that share a scale.
    `llm_int8_threshold`: magnitude from which a column of activations stays in 16 bit; 0: never.
    `llm_int8_skip_modules`: modules that stay as they are, by the beginning or the end of their names, `*`
    for anything; None: the head. `llm_int8_enable_fp32_cpu_offload` changes nothing: what lies on the CPU is
    quantized like the rest.

    Raises `ConfigError` for unknown names, types and values.
    """

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list[str] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: torch.dtype | str | None = None
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: torch.dtype | str | None = None
    bnb_4bit_blocksize: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "bool" and not isinstance(getattr(self, field.name), bool):
                raise ConfigError(f"{field.name} is {getattr(self, field.name)!r}; expected True or False")
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("load_in_4bit and load_in_8bit are both True; choose one")
        if self.llm_int8_has_fp16_weight:
            raise ConfigError(
                "llm_int8_has_fp16_weight=True keeps 16-bit weights beside the 8-bit ones; that is not "
                "supported: leave it out, or load in 16 bit"
            )
        if self.bnb_4bit_quant_type not in CODES:
            raise ConfigError(
                f"bnb_4bit_quant_type is {self.bnb_4bit_quant_type!r}; known: {', '.join(sorted(CODES))}"
            )
        if self.bnb_4bit_blocksize not in BLOCKS:
            raise ConfigError(
                f"bnb_4bit_blocksize is {self.bnb_4bit_blocksize!r}; known: {', '.join(map(str, BLOCKS))}"
            )
        threshold = self.llm_int8_threshold
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < 1e9:
            raise ConfigError(f"llm_int8_threshold is {threshold!r}; expected a number >= 0")
        skip = self.llm_int8_skip_modules
        if skip is not None and not (
            isinstance(skip, (list, tuple)) and all(isinstance(s, str) for s in skip)
        ):
            raise ConfigError(f"llm_int8_skip_modules is {skip!r}; expected a list of module names")
        defaults = {"bnb_4bit_compute_dtype": torch.float32, "bnb_4bit_quant_storage": torch.uint8}
        for name, default in defaults.items():
            object.__setattr__(self, name, _dtype(name, getattr(self, name), default))

    @classmethod
    def of(cls, given: Any, source: str = "quantization_config") -> BitsAndBytesConfig:
        """From one of these, from transformers' object, or from the dict in a `config.json`."""
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            if not callable(getattr(given, "to_dict", None)):
                raise ConfigError(
                    f"{source} is a {type(given).__name__}; expected a BitsAndBytesConfig or a dict"
                )
            given = given.to_dict()
        values = {str(key): value for key, value in given.items() if not str(key).startswith("_")}
        method = values.pop("quant_method", "bitsandbytes")
        method = getattr(method, "value", method)  # transformers has an enum
        if method != "bitsandbytes":
            raise ConfigError(
                f"{source}: 'quant_method' is {method!r}, which is not supported; known: bitsandbytes"
            )
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(
                    f"{source}: unknown key {name!r}{nearest(name, known)}; known: {', '.join(known)}"
                )
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @property
    def format(self) -> str | None:
        """ "nf4", "fp4", "int8", or None where nothing is asked for."""
        if self.load_in_8bit:
            return "int8"
        return self.bnb_4bit_quant_type if self.load_in_4bit else None

    @property
    def compute(self) -> torch.dtype | None:
        """The dtype of 4-bit products, None for their input's."""
        wanted = self.bnb_4bit_compute_dtype
        return None if not self.load_in_4bit or wanted is torch.float32 else wanted

    def skips(self, module: str, heads: tuple[str, ...] = HEADS) -> bool:
        """Whether the module of this name stays in 16 bit."""
        if self.llm_int8_skip_modules is None:
            return module in heads
        return any(_matches(pattern, module) for pattern in self.llm_int8_skip_modules)

    def to_dict(self) -> dict[str, Any]:
        """As `config.json` holds it, readable by transformers."""
        out = {field.name: getattr(self, field.name) for field in fields(self)}
        if out["bnb_4bit_blocksize"] == 64:
            del out["bnb_4bit_blocksize"]  # transformers has no such key, and bitsandbytes this value
        for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
            out[name] = str(out[name]).removeprefix("torch.")
        return {**out, "quant_method": "bitsandbytes"}


def named(name: str, *, double_quant: bool = False) -> BitsAndBytesConfig:
    """The config behind a short name: "4bit" is "nf4", the better of the two codes; "8bit" is "int8"."""
    kinds = {"4bit": "nf4", "nf4": "nf4", "fp4": "fp4", "8bit": "int8", "int8": "int8"}
    if name not in kinds:
        raise ConfigError(f"the format is {name!r}; known: {', '.join(kinds)}{nearest(name, kinds)}")
    if kinds[name] == "int8":
        if double_quant:
            raise ConfigError("double quantization is for nf4 and fp4; int8 has one scale a row")
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kinds[name], bnb_4bit_use_double_quant=double_quant
    )


def _matches(pattern: str, module: str) -> bool:
    """`pattern` is whole components from the start of the name, or any end of it."""
    pattern = pattern.replace(".*", "*").removesuffix(".weight")
    escaped = pattern.replace("[", "[[]").replace("?", "[?]")
    return any(fnmatch.fnmatchcase(module, form) for form in (escaped, f"{escaped}.*", f"*{escaped}"))


def _dtype(name: str, value: Any, default: torch.dtype) -> torch.dtype:
    if value is None:
        return default
    key = str(value).removeprefix("torch.")
    if key not in _DTYPES or (name.endswith("compute_dtype") and not _DTYPES[key].is_floating_point):
        raise ConfigError(f"{name} is {value!r}; known: {', '.join(_DTYPES)}{nearest(key, _DTYPES)}")
    return _DTYPES[key]
