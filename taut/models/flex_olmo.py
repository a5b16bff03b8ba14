"""FlexOlmo: OLMo 2 with experts for its MLP."""

from __future__ import annotations

from dataclasses import replace

from taut.config import ModelConfig, Reader
from taut.models import olmo2
from taut.models.mixtral import experts, stacked
from taut.models.olmo2 import RULES

ARCHITECTURE = "FlexOlmoForCausalLM"

_EXPERTS = "model.layers.{}.mlp.experts"
MODULES = stacked(f"{_EXPERTS}.gate_up_proj", f"{_EXPERTS}.down_proj")

__all__ = ["MODULES", "RULES", "read"]


def read(r: Reader) -> ModelConfig:
    moe = experts(r, "intermediate_size", normalised=r.bool("norm_topk_prob", False))
    dense = olmo2.read(r, eps=1e-6, theta=500_000.0)
    return replace(dense, layers=tuple(replace(layer, mlp=moe) for layer in dense.layers))
