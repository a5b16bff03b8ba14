"""GPT-Neo: GPT-2 with unscaled attention, and a window in every other layer."""

from __future__ import annotations

from taut.config import ModelConfig, Norm, Positions, Reader, activation, finish
from taut.errors import ConfigError
from taut.models.gpt2 import NAMES
from taut.models.llama import pre_norm_layers, tied
from taut.weights import Rename

ARCHITECTURE = "GPTNeoForCausalLM"

IGNORED = ("*.attn.attention.bias",)  # a mask

RULES = (
    *NAMES,
    Rename("transformer.h.{}.attn.attention", "transformer.h.{}.attn"),
    Rename("transformer.h.{}.attn.attention.out_proj", "transformer.h.{}.attn.attention.c_proj"),
)


def read(r: Reader) -> ModelConfig:
    r.rename(num_hidden_layers="num_layers", num_attention_heads="num_heads")
    r.ignore("attention_layers", "resid_dropout", "embed_dropout")
    norm = Norm(r.float("layer_norm_epsilon", 1e-5), kind="layer", bias=True)
    layers = pre_norm_layers(
        r,
        attn={"rope": None, "scale": 1.0, "out_bias": True},
        mlp={"hidden": r.int("intermediate_size", 4 * r.int("hidden_size")), "bias": True, "gated": False},
        windows=windows(r),
        act=activation(r, "activation_function", default="gelu_tanh"),
        pre=norm,
    )
    return finish(
        r,
        layers=layers,
        norm=norm,
        tied=tied(r, default=True),
        positions=Positions(r.int("max_position_embeddings")),
        padding=None,
    )


def windows(r: Reader) -> list[int | None]:
    """The window of each layer, from `attention_types`: pairs of a list of kinds and how often it is
    repeated."""
    count = r.int("num_hidden_layers")
    kinds: list[str] = []
    try:
        for names, times in r.list("attention_types", [[["global", "local"], (count + 1) // 2]]):
            kinds += [*names] * times
    except (TypeError, ValueError):
        raise ConfigError(
            f"{r.source}: 'attention_types' is {r.list('attention_types')!r}; expected pairs of a list of "
            'kinds and a count: [[["global", "local"], 12]]'
        ) from None
    kinds = kinds[:count] if not r.has("attention_types") else kinds
    if len(kinds) != count or not {*kinds} <= {"global", "local"}:
        raise ConfigError(
            f"{r.source}: 'attention_types' describes the layers {kinds}; expected {count}, each global "
            "or local"
        )
    size = r.int("window_size", 256)
    return [size if kind == "local" else None for kind in kinds]
