"""A GGUF model under its Hugging Face names: tensors, config keys, and llama.cpp's changes to values undone.

What llama.cpp's converter does to each architecture (conversion/*.py in its repository) is the fact this
module inverts: it renames, interleaves the rows of q and k for its own rotary layout, and stores Gemma's
norms plus one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taut.checkpoint.base import Checkpoint, LazyTensor, rows, some
from taut.checkpoint.gguf import GGUFTensor, read_gguf
from taut.errors import CheckpointError, ConfigError, nearest

_GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA2_BLOCK = _BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PHI3_BLOCK = _BLOCK | {"ffn_up": "mlp.gate_up_proj"}
_TENSOR = re.compile(r"(?:blk\.(\d{1,4})\.)?([a-z0-9_]+)\.(weight|bias)")

# Frequencies rather than weights: they become config keys.
_ROPE_TENSORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


@dataclass(frozen=True)
class _Architecture:
    """How one `general.architecture` becomes a Hugging Face model."""

    model_type: str
    model_class: str
    settings: Callable[[_Metadata, dict[str, Any]], dict[str, Any]]
    block: Mapping[str, str] = field(default_factory=lambda: _BLOCK)
    interleaved: bool = False  # rows of q and k
    norm_offset: float = 0.0  # what the file's norms have been raised by


class _Metadata:
    """The key-values of one architecture, each used, known to be without effect, or reported."""

    def __init__(self, path: Path, architecture: str, values: Mapping[str, Any]) -> None:
        self.path = path
        self._prefix = architecture + "."
        self._values = values
        self._used: set[str] = set()

    def _get(self, key: str) -> Any:
        self._used.add(self._prefix + key)
        value = self._values.get(self._prefix + key)
        if isinstance(value, list):  # one value a layer
            if not value or any(item != value[0] for item in value):
                raise self.error(key, "expected the same for every layer")
            value = value[0]
        return value

    def error(self, key: str, expected: str) -> ConfigError:
        value = repr(self._values.get(self._prefix + key))
        value = value if len(value) <= 80 else value[:77] + "..."
        return ConfigError(f"{self.path}: '{self._prefix}{key}' is {value}; {expected}")

    def int(self, key: str, default: Any = ..., *, minimum: int = 1) -> Any:
        value = self._get(key)
        if value is None and default is not ...:
            return default
        if type(value) is not int or not minimum <= value < 2**31:
            raise self.error(key, f"expected an integer of at least {minimum}")
        return value

    def float(self, key: str, default: Any = ...) -> Any:
        value = self._get(key)
        if value is None and default is not ...:
            return default
        if type(value) not in (int, float) or not math.isfinite(value):
            raise self.error(key, "expected a number")
        return _decimal(value)

    def str(self, key: str, default: str) -> str:
        value = self._get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "expected a string")
        return default if value is None else value

    def only(self, key: str, *allowed: Any) -> None:
        value = self._get(key)
        if value is not None and value not in allowed:
            raise self.error(key, f"which is not supported; known: {some(map(repr, allowed))}")

    def finish(self) -> None:
        """Raises for a setting that nothing asked for, unless it is switched off."""
        for key, value in self._values.items():
            if key.startswith(self._prefix) and key not in self._used and value:
                raise self.error(key.removeprefix(self._prefix), "a setting Taut does not know")


def model_types() -> set[str]:
    """The families whose GGUF files are read."""
    return {architecture.model_type for architecture in _ARCHITECTURES.values()}


def open_gguf(path: Path) -> Checkpoint:
    """A `.gguf` file as a `Checkpoint`: config keys and tensor names are Hugging Face's.

    Raises `CheckpointError` for a damaged file or a tensor without a known name or type, and `ConfigError`
    for an architecture or a setting that Taut does not know.
    """
    metadata, stored = read_gguf(path)
    if (parts := metadata.get("split.count", 1)) not in (0, 1):
        raise CheckpointError(
            f"{path}: one of {parts} parts of a split file; merge them first: "
            "llama-gguf-split --merge FIRST_PART OUTPUT"
        )
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise ConfigError(
            f"{path}: 'general.architecture' is {name!r}; known: {', '.join(_ARCHITECTURES)}"
            + nearest(str(name), _ARCHITECTURES)
        )
    embedding = stored.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{path}: no 'token_embd.weight' matrix; the file holds no language model")
    architecture = _ARCHITECTURES[name]
    config = _config(path, name, architecture, metadata, stored)
    tensors = {
        tensor.name: tensor
        for source in stored.values()
        if source.name not in _ROPE_TENSORS and not source.name.endswith(".attn_rot_embd.weight")
        for tensor in [_rename(source, architecture, config)]
    }
    return Checkpoint(path, config, _generation(config), tensors, metadata)


# ---------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class _Renamed:
    """A stored tensor under its Hugging Face name, less `offset`."""

    name: str
    source: GGUFTensor
    offset: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        value = self.source.read(start, stop)
        return value.sub_(self.offset) if self.offset else value

    @property
    def block_format(self) -> str | None:
        """Name of the block format that `read_blocks` gives, None where the values aren't the file's."""
        return None if self.offset else self.source.block_format

    @property
    def blocks_shape(self) -> tuple[int, int, int]:
        return self.source.blocks_shape

    def read_blocks(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows as packed in the file: uint8 `[rows, blocks, bytes of a block]`."""
        return self.source.read_blocks(start, stop)


@dataclass(frozen=True)
class _Deinterleaved(_Renamed):
    """A q or k projection whose rows llama.cpp has interleaved.

    Hugging Face rotates feature i of a head with feature i + size / 2; llama.cpp rotates neighbours, so its
    converter has moved rows (half, i) to (i, half) within each head. A read touches whole heads.
    """

    heads: int = 1

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self._in_order(self.source.read, start, stop)

    def read_blocks(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self._in_order(self.source.read_blocks, start, stop)

    def _in_order(self, read: Callable[[int, int], Tensor], start: int, stop: int | None) -> Tensor:
        start, stop = rows(self, start, stop)
        size = self.shape[0] // self.heads
        first, last = start // size * size, -(-stop // size) * size
        stored = read(first, last)
        pairs = stored.unflatten(0, (-1, size // 2, 2))
        return pairs.transpose(1, 2).reshape(stored.shape)[start - first : stop - first].clone()


def _rename(source: GGUFTensor, architecture: _Architecture, config: Mapping[str, Any]) -> LazyTensor:
    match = _TENSOR.fullmatch(source.name)
    table = _GLOBAL if match and match[1] is None else architecture.block
    if match is None or match[2] not in table:
        raise CheckpointError(
            f"{source.path}: the tensor {source.name!r} has no place in a {architecture.model_type} model"
        )
    layer, part, kind = match.groups()
    name = f"{table[part]}.{kind}" if layer is None else f"model.layers.{int(layer)}.{table[part]}.{kind}"
    if architecture.norm_offset and part.endswith("norm"):
        return _Renamed(name, source, architecture.norm_offset)
    if architecture.interleaved and part in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        if not source.shape or source.shape[0] % (2 * heads):
            raise CheckpointError(
                f"{source.path}: {source.name!r} is {list(source.shape)}, "
                f"whose rows do not divide into {heads} heads of even size"
            )
        return _Deinterleaved(name, source, heads=heads)
    return _Renamed(name, source)


# ----------------------------------------------------------------------------------------------- config


def _config(
    path: Path,
    name: str,
    architecture: _Architecture,
    values: Mapping[str, Any],
    stored: Mapping[str, GGUFTensor],
) -> dict[str, Any]:
    meta = _Metadata(path, name, values)
    heads = meta.int("attention.head_count")
    hidden = meta.int("embedding_length")
    head_dim = meta.int("attention.key_length", hidden // heads)
    meta.only("attention.value_length", head_dim)
    meta.only("attention.causal", True)
    meta.only("vocab_size", values.get(f"{name}.vocab_size"))  # the embedding's shape says it
    meta.only("rope.scaling.finetuned", True, False)
    meta.str("tensor_data_layout", "")
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "architectures": [architecture.model_class],
        "vocab_size": stored["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": meta.int("feed_forward_length"),
        "num_hidden_layers": meta.int("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.int("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": meta.int("context_length"),
        "rms_norm_eps": meta.float("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in stored,
    }
    config["rope_parameters"] = _rope(meta, config, stored)
    for key in ("bos", "eos", "pad"):
        if (token := _token(path, values, {"pad": "padding"}.get(key, key))) is not None:
            config[f"{key}_token_id"] = token
    # llama.cpp also stops at the end-of-turn and end-of-message tokens.
    stops = [_token(path, values, key) for key in ("eos", "eot", "eom")]
    stops = list(dict.fromkeys(token for token in stops if token is not None))
    if len(stops) > 1:
        config["eos_token_id"] = stops
    config["attention_bias"] = "blk.0.attn_q.bias" in stored
    config["mlp_bias"] = "blk.0.ffn_up.bias" in stored
    config |= architecture.settings(meta, config)
    meta.finish()
    return {key: value for key, value in config.items() if value is not ...}


def _generation(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: config[key] for key in keys if key in config}


def _token(path: Path, values: Mapping[str, Any], name: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    token = values.get(key)
    if token is None or token in (-1, 2**32 - 1):  # both mean "none"
        return None
    if type(token) is not int or not 0 <= token < 2**31:
        raise ConfigError(f"{path}: {key!r} is {token!r}; expected a token id")
    return token


def _rope(meta: _Metadata, config: Mapping[str, Any], stored: Mapping[str, GGUFTensor]) -> dict[str, Any]:
    """The `rope_parameters` of the config."""
    head_dim, context = config["head_dim"], config["max_position_embeddings"]
    dim = meta.int("rope.dimension_count", head_dim)
    if dim > head_dim or dim % 2:
        raise meta.error("rope.dimension_count", f"expected an even number of at most {head_dim}")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": meta.float("rope.freq_base", 10000.0)}
    if dim != head_dim:
        rope["partial_rotary_factor"] = _fraction(dim, head_dim)
    original = meta.int("rope.scaling.original_context_length", context)
    factor = meta.float("rope.scaling.factor", meta.float("rope.scale_linear", 0.0))
    kind = meta.str("rope.scaling.type", "linear")  # llama.cpp's default, off while there is no factor
    attention = meta.float("rope.scaling.attn_factor", 1.0)

    if "rope_factors_long.weight" in stored or "rope_factors_short.weight" in stored:
        rope |= {
            "rope_type": "longrope",
            "short_factor": _factors(meta.path, stored, "rope_factors_short.weight", dim),
            "long_factor": _factors(meta.path, stored, "rope_factors_long.weight", dim),
            "original_max_position_embeddings": original,
        }
        ratio = context / original
        usual = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        if not math.isclose(attention, usual, rel_tol=1e-6):
            rope["attention_factor"] = attention
    elif attention != 1.0:
        raise meta.error("rope.scaling.attn_factor", "supported only with long and short factors")
    elif "rope_freqs.weight" in stored:
        factors = _factors(meta.path, stored, "rope_freqs.weight", dim)
        rope |= _llama3(rope["rope_theta"], dim, factors) or {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "original_max_position_embeddings": context,
            "attention_factor": 1.0,
        }
    elif kind == "yarn":
        if factor <= 0:
            raise meta.error("rope.scaling.factor", "yarn needs a positive factor")
        meta.only("rope.scaling.yarn_ext_factor", 1.0)
        rope |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for ours, theirs in (
            ("attention_factor", "yarn_attn_factor"),
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
        ):
            if (value := meta.float(f"rope.scaling.{theirs}", None)) is not None:
                rope[ours] = value
    elif kind == "linear":
        if factor not in (0.0, 1.0):
            rope |= {"rope_type": "linear", "factor": factor}
    elif kind not in ("none", "longrope"):
        raise meta.error("rope.scaling.type", "known: linear, longrope, none, yarn")
    return rope


def _fraction(dim: int, head_dim: int) -> float:
    """`dim / head_dim`, such that `int(head_dim * fraction)` is `dim` again, which rounding can prevent."""
    fraction = dim / head_dim
    return fraction if int(head_dim * fraction) == dim else math.nextafter(fraction, 1)


def _factors(path: Path, stored: Mapping[str, GGUFTensor], name: str, dim: int) -> list[float]:
    tensor = stored.get(name)
    if tensor is None:
        raise CheckpointError(f"{path}: the tensor {name!r} is missing")
    if tensor.shape != (dim // 2,):
        raise CheckpointError(f"{path}: {name!r} is {list(tensor.shape)}; expected [{dim // 2}]")
    factors = [_decimal(value) for value in tensor.read().float().tolist()]
    if not all(math.isfinite(value) and value > 0 for value in factors):
        raise CheckpointError(f"{path}: {name!r} holds values that are not positive numbers")
    return factors


def _llama3(theta: float, dim: int, factors: list[float]) -> dict[str, Any] | None:
    """The `llama3` scaling of every Llama 3.1 to 3.3 (low 1, high 4, 8192 tokens), if it explains `factors`.

    A file holds only the resulting divisor of each frequency; with other constants than these, the divisors
    themselves describe the model.
    """
    scale, low, high, context = max(factors), 1.0, 4.0, 8192
    for index, factor in enumerate(factors):
        turns = context * theta ** (-2 * index / dim) / (2 * math.pi)  # within the original context
        blend = min(max((turns - low) / (high - low), 0.0), 1.0)
        if not math.isclose(factor, 1 / ((1 - blend) / scale + blend), rel_tol=1e-4):
            return None
    return {
        "rope_type": "llama3",
        "factor": scale,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }


def _decimal(value: float) -> float:
    """A float32 as the shortest decimal that names it: 1e-05, where its exact value is 9.99999974e-06."""
    single = np.float32(value)
    return float(str(single)) if single == value else float(value)


# Settings by architecture; `...` takes a key of the shared ones back out.


def _llama_settings(meta: _Metadata, config: dict[str, Any]) -> dict[str, Any]:
    window = meta.int("attention.sliding_window", 0, minimum=0)
    if not window:
        return {"hidden_act": "silu"}
    # Mistral files call themselves llama; the window tells.
    return {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "hidden_act": "silu",
        "sliding_window": window,
        "attention_bias": ...,
        "mlp_bias": ...,
    }


def _qwen2_settings(meta: _Metadata, config: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": ..., "mlp_bias": ...}


def _qwen3_settings(meta: _Metadata, config: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "silu", "use_sliding_window": False, "mlp_bias": ...}


def _smollm3_settings(meta: _Metadata, config: dict[str, Any]) -> dict[str, Any]:
    # llama.cpp leaves every fourth layer without rotation, whatever the file.
    rotates = [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])]
    return {"hidden_act": "silu", "no_rope_layers": rotates, "no_rope_layer_interval": 4}


def _gemma_settings(meta: _Metadata, config: dict[str, Any]) -> dict[str, Any]:
    return {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "mlp_bias": ...}


def _gemma2_settings(meta: _Metadata, config: dict[str, Any]) -> dict[str, Any]:
    # The scale is not in the file: llama.cpp knows the 27B model, the only one that differs, by its depth.
    largest = config["num_hidden_layers"] == 46
    per_head = config["hidden_size"] // config["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": per_head if largest else config["head_dim"],
        "sliding_window": meta.int("attention.sliding_window", 4096),
        "attn_logit_softcapping": meta.float("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": meta.float("final_logit_softcapping", 30.0),
        "mlp_bias": ...,
    }


def _phi3_settings(meta: _Metadata, config: dict[str, Any]) -> dict[str, Any]:
    original = meta.int("rope.scaling.original_context_length", config["max_position_embeddings"])
    return {
        "hidden_act": "silu",
        "original_max_position_embeddings": original,
        "sliding_window": meta.int("attention.sliding_window", 0, minimum=0) or None,
        "attention_bias": ...,
        "mlp_bias": ...,
    }


_ARCHITECTURES = MappingProxyType(
    {
        "llama": _Architecture("llama", "LlamaForCausalLM", _llama_settings, interleaved=True),
        "qwen2": _Architecture("qwen2", "Qwen2ForCausalLM", _qwen2_settings),
        "qwen3": _Architecture("qwen3", "Qwen3ForCausalLM", _qwen3_settings),
        "smollm3": _Architecture("smollm3", "SmolLM3ForCausalLM", _smollm3_settings, interleaved=True),
        "gemma": _Architecture("gemma", "GemmaForCausalLM", _gemma_settings, norm_offset=1.0),
        "gemma2": _Architecture(
            "gemma2", "Gemma2ForCausalLM", _gemma2_settings, _GEMMA2_BLOCK, norm_offset=1.0
        ),
        "phi3": _Architecture("phi3", "Phi3ForCausalLM", _phi3_settings, _PHI3_BLOCK),
    }
)
