"""Granite MoE: Granite with experts for its MLP, which files hold as two tensors a layer."""

from __future__ import annotations

from dataclasses import replace

from taut.config import ModelConfig, Reader
from taut.models import granite
from taut.models.llama import RULES as LLAMA
from taut.models.mixtral import experts, stacked
from taut.weights import Rename

ARCHITECTURE = "GraniteMoeForCausalLM"

_MOE = "model.layers.{}.block_sparse_moe"
_GATE = "model.layers.{}.mlp.gate"
RULES = (
    *LLAMA,
    Rename(f"{_MOE}.router.layer", _GATE),
    *stacked(f"{_MOE}.input_linear.weight", f"{_MOE}.output_linear.weight"),
)
MODULES = (
    *LLAMA,
    Rename(f"{_MOE}.router", _GATE),
    *stacked(f"{_MOE}.experts.gate_up_proj", f"{_MOE}.experts.down_proj"),
)


def read(r: Reader) -> ModelConfig:
    moe = experts(r, "intermediate_size", normalised=True)
    dense = granite.read(r)
    return replace(dense, layers=tuple(replace(layer, mlp=moe) for layer in dense.layers))
