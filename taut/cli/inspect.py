"""`taut inspect`: what a checkpoint is and what memory it takes, from its headers alone."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from taut.checkpoint import Checkpoint, LazyTensor, open_checkpoint
from taut.checkpoint.gguf_quants import FORMATS
from taut.cli.facts import Facts, human_bytes, human_count
from taut.config import UNBOUNDED, ModelConfig, Moe
from taut.errors import TautError
from taut.hub import default_model, resolve
from taut.models import read_config
from taut.pipelines.tasks import tasks_of
from taut.placement import pick_device, pick_dtype
from taut.quant.choose import keeps_blocks, unpacked
from taut.quant.config import BitsAndBytesConfig
from taut.quant.stored import StoredMatrix, open_bitsandbytes, open_gguf_blocks
from taut.tokenizer import AutoTokenizer

# How many values of a GGUF block format take how many bytes, by the format's name.
_BLOCKS = {kind.name: kind for kind in FORMATS.values() if kind.block > 1}

PARTS = ("embedding", "attention", "mlp", "norms", "head", "other")


# What families call them, in small letters; the first part with a word of the name has it.
_WORDS = MappingProxyType(
    {
        "head": (
            "lm_head",
            "embed_out",
            "final_logits_bias",
            "cls.",
            "classifier",
            "projector",
            "qa_outputs",
        ),
        "norms": ("norm", ".ln_"),
        "embedding": ("embed", "wte", "wpe", "project_in", "project_out", "shared.weight", "feature_"),
        "attention": ("attn", "attention"),
        "mlp": (
            *("mlp", "ffn", ".fc1", ".fc2", "moe", "densereludense", ".intermediate.", ".output.dense"),
            "feed_forward",
        ),
    }
)


def part_of(name: str) -> str:
    """Which of `PARTS` a tensor belongs to, by its Hugging Face name."""
    small = name.lower()
    return next((part for part, words in _WORDS.items() if any(word in small for word in words)), "other")


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token adds to the cache, all layers together: a token of a decoder,
    and as many a token that its cross-attention attends to. 0 for what caches nothing."""
    if config.kind not in ("decoder", "encoder-decoder", "speech encoder-decoder"):
        return 0
    return sum(2 * layer.attn.kv_heads * layer.attn.head_dim for layer in config.layers) * dtype.itemsize


@dataclass(frozen=True)
class Part:
    tensors: int
    parameters: int
    bytes: int


def held(
    checkpoint: Checkpoint, dtype: torch.dtype, keep_blocks: bool
) -> tuple[Mapping[str, LazyTensor], Mapping[str, int]]:
    """The tensors of a model that is loaded in `dtype`, packed ones under their own shapes; and the bytes of
    each, also of what lies beside packed ones in the file (their scales), by its name there."""
    tensors, own = dict(checkpoint.tensors), checkpoint.config.get("quantization_config")
    if own is not None:
        config = BitsAndBytesConfig.of(own, f"{checkpoint.path}: quantization_config")
        tensors = open_bitsandbytes(checkpoint.tensors, config, dtype)
    elif keep_blocks:
        tensors = open_gguf_blocks(checkpoint.tensors)
    sizes: dict[str, int] = {}
    for name in {**checkpoint.tensors, **tensors}:
        if name in tensors and not isinstance(tensors[name], StoredMatrix):
            sizes[name] = prod(tensors[name].shape) * dtype.itemsize
        else:
            sizes[name] = _stored(checkpoint.tensors[name])
    return tensors, sizes


def _stored(tensor: LazyTensor) -> int:
    """Bytes of a tensor in its file."""
    kind = _BLOCKS.get(getattr(tensor, "block_format", None))
    count = prod(tensor.shape)
    return count * tensor.dtype.itemsize if kind is None else count // kind.block * kind.size


def parts(tensors: Mapping[str, LazyTensor], sizes: Mapping[str, int]) -> dict[str, Part]:
    """Tensors, parameters and bytes of each part that has any, in the order of `PARTS`; see `held`."""
    found: dict[str, Part] = {}
    for name, size in sizes.items():
        count = (1, prod(tensors[name].shape)) if name in tensors else (0, 0)
        old = found.get(part_of(name), Part(0, 0, 0))
        found[part_of(name)] = Part(old.tensors + count[0], old.parameters + count[1], old.bytes + size)
    return {name: found[name] for name in PARTS if name in found}


def kinds_of_layers(config: ModelConfig) -> list[dict[str, Any]]:
    """The distinct layer descriptions and how many layers each has, most common first."""
    kinds = []
    for layer, count in Counter(config.layers).most_common():
        attn, mlp = layer.attn, layer.mlp
        rope = None
        if attn.rope is not None:
            scaling = attn.rope.scaling
            rope = {
                "theta": attn.rope.theta,
                "dim": attn.rope.dim,
                "scaling": None if scaling is None else type(scaling).__name__.lower(),
            }
        kinds.append(
            {
                "count": count,
                "heads": attn.heads,
                "kv_heads": attn.kv_heads,
                "head_dim": attn.head_dim,
                "window": attn.window,
                "rope": rope,
                "alibi": attn.slopes is not None,
                "relative_bias": attn.relative is not None or attn.grid is not None,
                "gated_bias": attn.gated,
                "cross_attention": layer.cross is not None,
                "mlp_hidden": mlp.hidden,
                "activation": mlp.act,
                "gated": getattr(mlp, "gated", True),
                "experts": [mlp.chosen, mlp.experts] if isinstance(mlp, Moe) else None,
                "parallel": layer.parallel,
            }
        )
    return kinds


def tokenizer_facts(path: Path) -> dict[str, Any]:
    """Vocabulary size, special tokens and whether there is a chat template; `{"error": ...}` where the
    tokenizer's files are missing or corrupt, which says nothing about the weights."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path))
    except TautError as error:
        return {"error": str(error)}
    return {
        "vocabulary": len(tokenizer),
        "bos": tokenizer.bos_token,
        "eos": tokenizer.eos_token,
        "pad": tokenizer.pad_token,
        "unk": tokenizer.unk_token,
        "chat_template": tokenizer.chat_template is not None,
    }


def describe(path: Path, dtype: str) -> dict[str, Any]:
    """Everything `taut inspect` says of the checkpoint at `path`, as JSON-ready values. `RequestError`
    for an unknown `dtype`."""
    checkpoint = open_checkpoint(path)
    config = read_config(checkpoint.config, f"{path}: config")
    stored = Counter(tensor.dtype for tensor in checkpoint.tensors.values()).most_common()
    checkpoint = unpacked(checkpoint)
    device = pick_device("auto")
    loaded = pick_dtype(dtype, config, checkpoint, device)
    tensors, held_bytes = held(checkpoint, loaded, keeps_blocks(checkpoint, dtype, loaded, device))
    sizes = parts(tensors, held_bytes)
    per_token = kv_bytes_per_token(config, loaded)
    context = None if config.context == UNBOUNDED else config.context
    encoder = None if config.pairing is None else config.pairing.encoder
    return {
        "path": str(path),
        "model_type": config.model_type,
        "architecture": config.architecture,
        "tasks": tasks_of(config),
        "parameters": sum(part.parameters for part in sizes.values()),
        "dtype": str(loaded).removeprefix("torch."),
        "packed_tensors": sum(isinstance(tensor, StoredMatrix) for tensor in tensors.values()),
        "tensor_dtypes": {str(kind).removeprefix("torch."): count for kind, count in stored},
        "file_bytes": _file_bytes(path),
        "memory_bytes": {
            "weights": sum(part.bytes for part in sizes.values()),
            "parts": {name: part.bytes for name, part in sizes.items()},
            "kv_cache_per_token": per_token,
            "kv_cache_per_source_token": 0 if encoder is None else per_token,
            "kv_cache_full_context": None if context is None else per_token * context,
        },
        "parts": {n: {"tensors": p.tensors, "parameters": p.parameters} for n, p in sizes.items()},
        "config": {
            "kind": config.kind,
            "vocab_size": _vocabulary(config),
            "dim": config.dim,
            "layers": len(config.layers),
            "context": context,
            "tied_embeddings": config.tied,
            "learned_positions": _learned_positions(config),
            "bos_token_id": config.bos_token_id,
            "eos_token_ids": list(config.eos_token_ids),
            "pad_token_id": config.pad_token_id,
            "layer_kinds": kinds_of_layers(config),
            "encoder_layer_kinds": None if encoder is None else kinds_of_layers(encoder),
            "image": _image(config),
            "spectrogram": _spectrogram(encoder),
            "sound": _sound(config),
        },
        "unused_config_keys": list(config.unused),
        "tokenizer": tokenizer_facts(path),
    }


def _spectrogram(encoder: ModelConfig | None) -> dict[str, Any] | None:
    """The spectrograms that an encoder hears; None for one that hears nothing."""
    if encoder is None or encoder.mel_bins is None:
        return None
    return {"mel_bins": encoder.mel_bins, "frames": 2 * encoder.context}


def _vocabulary(config: ModelConfig) -> int:
    """How many words a model has; 0 for one without any, as a speech encoder is unless it has a head of
    them."""
    return config.vocab_size if config.waves is None or config.architecture.endswith("ForCTC") else 0


def _image(config: ModelConfig) -> dict[str, Any] | None:
    """What a model makes of images; None for one that takes none."""
    vision = config if config.contrast is None else config.contrast.vision
    patches = vision.patches
    if patches is None:
        return None
    kinds = None if vision is config else kinds_of_layers(vision)
    return {
        "size": patches.image,
        "patch": patches.size,
        "stride": patches.stride or patches.size,
        "tokens": patches.tokens,
        "layer_kinds": kinds,
    }


def _sound(config: ModelConfig) -> dict[str, Any] | None:
    """How a model makes tokens of waveforms; None for one that takes none."""
    waves = config.waves
    return None if waves is None else {"samples_per_token": waves.step, "kernels": waves.kernels}


def _learned_positions(config: ModelConfig) -> int | None:
    positions = config.positions
    return None if positions is None or positions.sinusoidal else positions.count


def _file_bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def _layer_text(kind: dict[str, Any]) -> str:
    rope = kind["rope"]
    turned = "no rotary embedding"
    if kind["alibi"] or kind["relative_bias"]:
        gated = ", gated by each query" if kind["gated_bias"] else ""
        turned = "ALiBi" if kind["alibi"] else f"a learned bias of distances{gated}"
    if rope is not None:
        scaled = f", {rope['scaling']} scaling" if rope["scaling"] else ""
        partial = "" if rope["dim"] == kind["head_dim"] else f" of {rope['dim']} features"
        turned = f"rotary{partial}, theta {rope['theta']:g}{scaled}"
    seen = "full attention" if kind["window"] is None else f"window of {kind['window']} tokens"
    heads = f"{kind['heads']} heads of {kind['head_dim']}, {kind['kv_heads']} for keys"
    mlp = f"{'' if kind['gated'] else 'plain '}MLP {kind['mlp_hidden']}, {kind['activation']}"
    if kind["experts"]:
        chosen, count = kind["experts"]
        mlp = f"{chosen} of {count} experts, each an {mlp}"
    beside = ", beside attention" if kind["parallel"] else ""
    cross = "attention to the encoder; " if kind["cross_attention"] else ""
    return f"{kind['count']} x [{heads}; {seen}; {turned}; {cross}{mlp}{beside}]"


def _show_words(
    row: Callable[[str, object], None], config: dict[str, Any], tokenizer: dict[str, Any]
) -> None:
    """What there is to say of a model that reads or writes words."""
    if not config["vocab_size"]:
        return
    row("head", "tied to the embedding" if config["tied_embeddings"] else "its own weight")
    eos = ", ".join(str(token) for token in config["eos_token_ids"]) or "none"
    row("token ids", f"bos {config['bos_token_id']}, eos {eos}, pad {config['pad_token_id']}")
    if "error" in tokenizer:
        row("tokenizer", tokenizer["error"])
    else:
        special = ", ".join(f"{kind} {tokenizer[kind]!r}" for kind in ("bos", "eos", "pad", "unk"))
        template = "a chat template" if tokenizer["chat_template"] else "no chat template"
        row("tokenizer", f"{tokenizer['vocabulary']} tokens; {special}; {template}")


def show(facts: dict[str, Any]) -> None:
    """Prints `describe`'s result as tables."""
    console = Console(highlight=False)
    config, memory, tokenizer = facts["config"], facts["memory_bytes"], facts["tokenizer"]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: object) -> None:
        table.add_row(name, Text(str(value)))  # Text: a name with [brackets] is no markup

    row("path", facts["path"])
    row("family", f"{facts['model_type']} ({facts['architecture']})")
    row("tasks", ", ".join(facts["tasks"]) or "none that taut run does")
    row("parameters", f"{facts['parameters']:,} ({human_count(facts['parameters'])})")
    row("files", human_bytes(facts["file_bytes"]))
    packed = facts["packed_tensors"]
    row("dtype", f"{facts['dtype']} once loaded" + (f"; {packed} matrices stay packed" if packed else ""))
    row("tensors", f"{sum(part['tensors'] for part in facts['parts'].values())}")
    encoder = config["encoder_layer_kinds"]
    deep = f"{config['layers']} layers"
    if encoder is not None:
        deep = f"{sum(kind['count'] for kind in encoder)} encoder and {config['layers']} decoder layers"
    words = f", vocabulary {config['vocab_size']}" if config["vocab_size"] else ""
    row("size", f"{deep}, dim {config['dim']}{words}")
    if config["image"] is not None:
        pixels, patch, apart = (
            " x ".join(map(str, config["image"][key])) for key in ("size", "patch", "stride")
        )
        patch = patch if apart == patch else f"{patch}, {apart} apart"
        name, unit = ("images", "pixels")
        if config["kind"] == "spectrogram encoder":
            name, unit = "spectrograms", "bands and frames"
        row(name, f"{pixels} {unit} in patches of {patch}: {config['image']['tokens']} tokens")
        if config["image"]["layer_kinds"] is not None:
            row("image layers", "\n".join(map(_layer_text, config["image"]["layer_kinds"])))
    if config["spectrogram"] is not None:
        heard = config["spectrogram"]
        row("spectrograms", f"{heard['mel_bins']} mel bins, {heard['frames']} frames at a time")
    if config["sound"] is not None:
        each, count = config["sound"]["samples_per_token"], len(config["sound"]["kernels"])
        row("sound", f"a token for {each} samples, by {count} convolutions")
    if encoder is not None:
        row("encoder", "\n".join(map(_layer_text, encoder)))
    row("layers" if encoder is None else "decoder", "\n".join(map(_layer_text, config["layer_kinds"])))
    learned = ", a learned embedding of each position" if config["learned_positions"] else ""
    tokens = "without a limit" if config["context"] is None else f"{config['context']} tokens"
    row("context", f"{tokens}{learned}")
    _show_words(row, config, tokenizer)
    row("unused keys", ", ".join(facts["unused_config_keys"]) or "none: every key is accounted for")
    console.print(table)

    sizes = Table(box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    sizes.add_column("memory")
    for column in ("tensors", "parameters", "size"):
        sizes.add_column(column, justify="right")
    for name, part in facts["parts"].items():
        cells = f"{part['tensors']}", f"{part['parameters']:,}", human_bytes(memory["parts"][name])
        sizes.add_row(name, *cells)
    sizes.add_section()
    sizes.add_row("weights", "", f"{facts['parameters']:,}", human_bytes(memory["weights"]), style="bold")
    cached = {
        "one token": memory["kv_cache_per_token"],
        "one token of the source": memory["kv_cache_per_source_token"],
        f"{config['context']} tokens": memory["kv_cache_full_context"],
    }
    for what, size in cached.items():
        if size:
            sizes.add_row(f"KV cache, {what}", "", "", human_bytes(size))
    console.print(sizes)


def run(
    model: str | None, *, dtype: str, revision: str | None, local_files_only: bool, as_json: bool
) -> None:
    """Prints what `model` is: tables, or one JSON object."""
    path = resolve(model or default_model(), revision=revision, local_files_only=local_files_only)
    started = time.perf_counter()
    found = describe(path, dtype)
    facts = Facts.of(time.perf_counter() - started, "cpu")
    if as_json:
        print(json.dumps(found | {"facts": asdict(facts)}, indent=2))
        return
    show(found)
    sys.stdout.flush()
    print(facts.line(), file=sys.stderr)
