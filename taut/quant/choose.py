"""Which matrices of a checkpoint are packed, and how: what the caller asks for, and what the files say."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from taut.checkpoint import Checkpoint, LazyTensor
from taut.checkpoint.base import some
from taut.errors import RequestError, nearest
from taut.kernels.dispatch import compiled_refuses
from taut.quant.config import HEADS, BitsAndBytesConfig
from taut.quant.mxfp4 import open_mxfp4
from taut.quant.stored import (
    AsStored,
    Packer,
    Quantize,
    StoredMatrix,
    open_bitsandbytes,
    open_gguf_blocks,
)


@dataclass(frozen=True)
class Choice:
    """The checkpoint's tensors, packed ones under their own shapes; what packs which; and the config that
    saving writes, None for a model that bitsandbytes has no words for."""

    tensors: Mapping[str, LazyTensor]
    packers: Mapping[str, Packer] = field(default_factory=dict)
    config: BitsAndBytesConfig | None = None


def asked(load_in_4bit: bool, load_in_8bit: bool, quantization_config: Any) -> BitsAndBytesConfig | None:
    """What a caller of `from_pretrained` wants, None if nothing."""
    for name, value in (("load_in_4bit", load_in_4bit), ("load_in_8bit", load_in_8bit)):
        if not isinstance(value, (bool, type(None))):
            raise RequestError(f"{name} is {value!r}; expected True or False")
    if load_in_4bit and load_in_8bit:
        raise RequestError("load_in_4bit and load_in_8bit are both True; choose one")
    if quantization_config is None:
        if not (load_in_4bit or load_in_8bit):
            return None
        return BitsAndBytesConfig(load_in_4bit=bool(load_in_4bit), load_in_8bit=bool(load_in_8bit))
    config = BitsAndBytesConfig.of(quantization_config)
    if load_in_4bit or load_in_8bit:
        raise RequestError(
            "give load_in_4bit or load_in_8bit inside quantization_config or beside it, not both"
        )
    if config.format is None:
        raise RequestError(
            "quantization_config asks for neither load_in_4bit nor load_in_8bit; set one, or leave it out"
        )
    return config


def unpacked(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as if it had never been packed, where its format is one that is only read: MXFP4."""
    own = checkpoint.config.get("quantization_config")
    if not isinstance(own, Mapping) or own.get("quant_method") != "mxfp4":
        return checkpoint
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    return replace(checkpoint, config=config, tensors=open_mxfp4(checkpoint.tensors))


def keeps_blocks(checkpoint: Checkpoint, choice: object, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a GGUF file's 4- and 8-bit matrices stay packed where `choice` of a dtype came to `dtype`:
    products of them are fast where there are kernels for them."""
    like = torch.empty(0, dtype=dtype, device=device)
    return choice in ("auto", None) and bool(checkpoint.metadata) and compiled_refuses(like) is None


def choose(
    checkpoint: Checkpoint,
    wanted: BitsAndBytesConfig | None,
    linears: Sequence[str],
    dtype: torch.dtype,
    *,
    heads: Collection[str] = (),
    tables: Sequence[str] = (),
    keep_blocks: bool,
) -> Choice:
    """The `Choice` for a model whose linear layers are `linears`, by the names of their matrices on disk.

    `heads`: modules that stay dense where the caller names none. `keep_blocks`: GGUF's 4- and 8-bit linear
    layers, and the embeddings `tables`, stay packed, where nothing else is asked for. Raises `RequestError`
    where a packed checkpoint is asked for in another format or nothing can be packed, and `ConfigError` or
    `CheckpointError` for a checkpoint's own quantization that is unknown or incomplete.
    """
    own = checkpoint.config.get("quantization_config")
    if own is not None:
        stored = BitsAndBytesConfig.of(own, f"{checkpoint.path}: quantization_config")
        return _own(checkpoint, stored, wanted, linears, dtype)
    if wanted is None:
        if not keep_blocks:
            return Choice(checkpoint.tensors)
        return _keep_blocks(checkpoint, [*linears, *tables])
    blocks = {getattr(checkpoint.tensors.get(name), "block_format", None) for name in linears} - {None}
    if blocks:
        raise RequestError(
            f"{checkpoint.path} is quantized already ({', '.join(sorted(blocks))}); quantizing it again to "
            f"{wanted.format} would only lose more: leave the option out, or start from the 16-bit model"
        )
    _known(checkpoint, wanted, heads)
    if wanted.llm_int8_skip_modules is None and heads:
        wanted = replace(wanted, llm_int8_skip_modules=list(heads))
    packed = [name for name in linears if not wanted.skips(name.removesuffix(".weight"))]
    if not packed:
        raise RequestError(
            f"{wanted.format} was asked for, but the model has no linear layer to pack"
            + (f": llm_int8_skip_modules leaves out all {len(linears)}" if linears else "")
        )
    return Choice(checkpoint.tensors, dict.fromkeys(packed, Quantize(wanted)), wanted)


def _known(checkpoint: Checkpoint, wanted: BitsAndBytesConfig, heads: Collection[str]) -> None:
    """Warn of what is to be left out and is nowhere: it would be packed without a word."""
    modules = {name.rpartition(".")[0] for name in checkpoint.tensors} | {*HEADS, *heads}
    for pattern in wanted.llm_int8_skip_modules or ():
        only = replace(wanted, llm_int8_skip_modules=[pattern])
        if not any(only.skips(module) for module in modules):
            warnings.warn(
                f"llm_int8_skip_modules: {pattern!r} is neither the name of a module of {checkpoint.path}, "
                f"nor the beginning or end of one: it leaves nothing out{nearest(pattern, _ends(modules))}",
                stacklevel=4,
            )


def _ends(modules: Collection[str]) -> list[str]:
    """The last words of names."""
    return sorted({module.rpartition(".")[2] for module in modules})


def _own(
    checkpoint: Checkpoint,
    own: BitsAndBytesConfig,
    wanted: BitsAndBytesConfig | None,
    linears: Sequence[str],
    dtype: torch.dtype,
) -> Choice:
    """A checkpoint that bitsandbytes' format holds already."""
    if wanted is not None and wanted.load_in_8bit != own.load_in_8bit:
        raise RequestError(
            f"{checkpoint.path} is quantized already, to {own.format}, and {wanted.format} is asked for; "
            "leave the option out, or start from the 16-bit model"
        )
    if wanted is not None:
        _compare(checkpoint, own, wanted)
    tensors = open_bitsandbytes(checkpoint.tensors, own, dtype)
    packed = [name for name in linears if isinstance(tensors.get(name), StoredMatrix)]
    dense = [n for n in linears if n not in packed and not own.skips(n.removesuffix(".weight"))]
    if not packed and own.format is not None:
        raise RequestError(
            f"{checkpoint.path}: config.json says the weights are {own.format}, but no linear layer is; "
            "remove 'quantization_config' from it, or download the files again"
        )
    if dense:
        warnings.warn(
            f"{checkpoint.path}: config.json says {own.format}, but {some(dense)} are not and stay dense",
            stacklevel=4,
        )
    return Choice(tensors, dict.fromkeys(packed, AsStored(own.compute)), own)


# What decides the bytes of a 4-bit checkpoint, so that it can't be had otherwise.
_BYTES = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_blocksize")


def _compare(checkpoint: Checkpoint, own: BitsAndBytesConfig, wanted: BitsAndBytesConfig) -> None:
    """Refuse what a packed checkpoint can't be, and warn of what its own config decides. What is asked for is
    what is not a default: nobody need know how a checkpoint was made to load it in 4 bit."""
    default = BitsAndBytesConfig()
    mine = ("load_in_4bit", "load_in_8bit", "llm_int8_enable_fp32_cpu_offload")  # compared, or without effect
    names = [f.name for f in fields(wanted) if f.name not in mine]
    values = {name: (getattr(wanted, name), getattr(own, name)) for name in names}
    unmet = {n: pair for n, pair in values.items() if pair[0] not in (pair[1], getattr(default, n))}
    if not own.load_in_4bit:
        unmet = {name: pair for name, pair in unmet.items() if name not in _BYTES}
    for name in unmet:
        if name in _BYTES:
            raise RequestError(
                f"{checkpoint.path} is quantized already, with {name}={unmet[name][1]!r}, and "
                f"{unmet[name][0]!r} is asked for; leave the option out, or start from the 16-bit model"
            )
    if unmet:
        listed = ", ".join(f"{name}={value!r} (it has {there!r})" for name, (value, there) in unmet.items())
        warnings.warn(
            f"{checkpoint.path} is quantized already, and its own config.json counts: without effect are "
            f"{listed}",
            stacklevel=5,
        )


def _keep_blocks(checkpoint: Checkpoint, names: Sequence[str]) -> Choice:
    tensors = dict(checkpoint.tensors)
    tensors.update(open_gguf_blocks({name: tensors[name] for name in names if name in tensors}))
    packed = [name for name in names if isinstance(tensors.get(name), StoredMatrix)]
    return Choice(tensors, dict.fromkeys(packed, AsStored()))
