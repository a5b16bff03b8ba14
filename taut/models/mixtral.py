"""Mixtral: Mistral with experts for its MLP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from taut.config import ModelConfig, Moe, Reader, activation, finish
from taut.errors import ConfigError
from taut.models.llama import RULES as LLAMA
from taut.models.llama import norm, pre_norm_layers, tied
from taut.weights import Rename, Stacked, renames

ARCHITECTURE = "MixtralForCausalLM"

RULES = (
    *LLAMA,
    Rename("model.layers.{}.block_sparse_moe", "model.layers.{}.mlp"),
    *renames(
        "model.layers.{}.block_sparse_moe.experts.{}",
        {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"},
    ),
)


def stacked(gate_up: str, down: str) -> tuple[Stacked, Stacked]:
    """The experts of a layer in two tensors of these names."""
    ours = "model.layers.{}.mlp.experts.{}"
    parts = Stacked(gate_up, f"{ours}.{{}}.weight", ("gate_proj", "up_proj"))
    return parts, Stacked(down, f"{ours}.down_proj.weight")


# Files have these names too, where transformers was asked for them (`save_original_format=False`).
_EXPERTS = "model.layers.{}.mlp.experts"
MODULES = (*LLAMA, *stacked(f"{_EXPERTS}.gate_up_proj", f"{_EXPERTS}.down_proj"))


def experts(r: Reader, hidden: str, **fields: Any) -> Moe:
    """The experts of a layer, whose size is under the key `hidden`."""
    r.rename(num_experts="num_local_experts")
    r.ignore("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")  # training
    count, chosen = r.int("num_experts"), r.int("num_experts_per_tok")
    if chosen > count:
        raise ConfigError(
            f"{r.source}: 'num_experts_per_tok' is {chosen}; expected at most {count}, all there are"
        )
    return Moe(count, chosen, r.int(hidden), activation(r, "hidden_act", default="silu"), **fields)


def read(r: Reader) -> ModelConfig:
    own = norm(r, default=1e-5)
    layers = pre_norm_layers(r, attn={"window": r.int("sliding_window", None)}, pre=own)
    moe = experts(r, "intermediate_size", normalised=True)
    return finish(
        r,
        layers=[replace(layer, mlp=moe) for layer in layers],
        norm=own,
        tied=tied(r),
    )
