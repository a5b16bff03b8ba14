"""Writes docs/families.md from the code: `python docs/make_families.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from taut.auto import class_names
from taut.checkpoint.gguf_model import model_types
from taut.config import Attn, LayerScale, Mlp, ModelConfig, Moe, Norm, Rope
from taut.models import families, family, kind, read_config

FILE = Path(__file__).with_name("families.md")

INTRODUCTION = """# Families

Written by `docs/make_families.py` from the code. Each family is a file, `taut/models/<model_type>.py`;
[adding one](adding-a-family.md) takes 15 to 60 lines.

All of them read and write safetensors under the names of transformers, and load in 16 bit, NF4, FP4 and int8
([quantization](quantization.md)); GGUF files are read where the last column says so. The classes have
transformers' own names, beside the `Auto...` classes that take every family; mechanisms are those of a config
that says only how large the model is.
"""

# A config.json that says only how large a model is, in the words of every family: the rest is its defaults.
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size"), 512),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 8),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "moe_intermediate_size"), 1024),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 2048),
    **dict.fromkeys(("num_experts", "num_local_experts"), 8),
    "num_experts_per_tok": 2,
    "vocab_size": 1000,
    "sliding_window": 128,
    "layer_norm_eps": 1e-5,
}


def example(model_type: str) -> ModelConfig:
    """A model of the family as it usually is."""
    return read_config({"model_type": model_type, **SIZES}, f"docs/make_families.py: {model_type}")


def mechanisms(config: ModelConfig) -> Iterator[str]:
    """What the family does where others do otherwise, in words."""
    layers = config.layers
    attns, first = [layer.attn for layer in layers], layers[0]
    yield from _norms(config)
    if first.parallel:
        yield "attention and MLP in parallel"
    yield from _positions(config, attns)
    yield from _attention(attns)
    yield from _feed_forward([layer.mlp for layer in layers])
    if isinstance(first.post_attn, LayerScale):
        yield "learned factors behind each half"
    if config.weights_of is not None:
        yield "layers with shared weights"
    scales = (config.embed_scale, config.input_scale, config.logit_scale, first.scale)
    if any(scale is not None for scale in scales):
        yield "multipliers"
    if config.logit_softcap is not None:
        yield "soft-cap on logits"
    if config.tied and config.kind != "encoder":
        yield "tied head"


def _norms(config: ModelConfig) -> Iterator[str]:
    layer = config.layers[0]
    found = [n for n in vars(layer).values() if isinstance(n, Norm)]
    kinds = {"rms": "RMSNorm", "layer": "LayerNorm"}
    places = {
        "before": layer.pre_attn,
        "behind": next((n for n in (layer.post_attn, layer.post_mlp) if isinstance(n, Norm)), None),
        "after the sum": layer.after_attn,
    }
    where = " and ".join(place for place, norm in places.items() if norm is not None)
    yield f"{kinds[found[0].kind]} {where}" if found else "no norms"


def _positions(config: ModelConfig, attns: list[Attn]) -> Iterator[str]:
    ropes: list[Rope] = [a.rope for a in attns if a.rope is not None]
    if ropes:
        rope = ropes[0]
        partial = " of a part of each head" if rope.dim < attns[0].head_dim else ""
        pairs = " of neighbours" if rope.interleaved else ""
        scaling = f" ({type(rope.scaling).__name__.lower()})" if rope.scaling is not None else ""
        yield f"rotation{pairs}{partial}{scaling}" + (" in some layers" if len(ropes) < len(attns) else "")
        if len(set(ropes)) > 1:
            yield "another rotation for some layers"
    if config.positions is not None:
        yield "sinusoidal positions" if config.positions.sinusoidal else "learned positions"
    if attns[0].slopes is not None:
        yield "ALiBi"
    if config.waves is not None:
        yield "positions by a convolution"
    if attns[0].relative is not None:
        yield "a learned bias of distances" + (", gated by each query" if attns[0].gated else "")


def _attention(attns: list[Attn]) -> Iterator[str]:
    attn = attns[0]
    if attn.kv_heads == 1:
        yield "one key head"
    windows = sum(a.window is not None for a in attns)
    if windows:
        yield "windows" if windows == len(attns) else "windows in some layers"
    if attn.qk_norm is not None:
        of = {"head": "each head", "own head": "each head", "all": "all heads at once"}
        yield f"norms of queries and keys, {of[attn.qk_norm_of]}"
    if attn.softcap is not None:
        yield "soft-cap on scores"
    if attn.sinks:
        yield "sinks"
    if attn.grid is not None:
        yield "a bias of the distance between patches"
    if attn.clip is not None:
        yield "clipped projections"


def _feed_forward(mlps: list[Mlp | Moe]) -> Iterator[str]:
    moe = next((m for m in mlps if isinstance(m, Moe)), None)
    mlp = moe or mlps[0]
    gated = "gated " if getattr(mlp, "gated", True) else ""
    yield f"{gated}{mlp.act.replace('_', ' ')} MLP" + (" as experts" if moe else "")
    if moe is not None and moe.shared:
        yield "a shared expert"


def row(model_type: str) -> str:
    module = family(model_type)
    names = [f"`{name}`" for name, (own, _) in class_names().items() if own == model_type]
    what = " ".join(module.__doc__.split("\n\n")[0].split())
    what = what.split(": ", 1)[-1].split(". ")[0].rstrip(".")
    gguf = "yes" if model_type in model_types() else ""
    how = "; ".join(mechanisms(example(model_type)))
    return f"| `{model_type}` | {', '.join(names)} | {what[0].upper()}{what[1:]} | {how} | {gguf} |"


def text() -> str:
    """The whole document."""
    groups: dict[str, list[str]] = {}
    for model_type in families():
        groups.setdefault(kind(family(model_type)), []).append(model_type)
    lines = [INTRODUCTION.rstrip()]
    for name, members in sorted(groups.items()):
        lines += ["", f"## {name.capitalize()}s ({len(members)})"]
        lines += ["| model_type | classes | what it is | mechanisms | GGUF |", "|---|---|---|---|---|"]
        lines += [row(model_type) for model_type in members]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), "utf-8")
