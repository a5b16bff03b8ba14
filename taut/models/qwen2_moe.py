"""Qwen2-MoE: Qwen2 with experts and a shared one for the MLP of most layers."""

from __future__ import annotations

from dataclasses import replace

from taut.config import Layer, ModelConfig, Reader, finish, windows
from taut.models.llama import RULES, norm, pre_norm_layers, tied
from taut.models.mixtral import MODULES, experts

ARCHITECTURE = "Qwen2MoeForCausalLM"

__all__ = ["MODULES", "RULES", "read", "sparse"]


def sparse(r: Reader, layers: list[Layer], shared: int | None = None) -> list[Layer]:
    """Experts in every layer that isn't among `mlp_only_layers` and that `decoder_sparse_step` counts."""
    moe = experts(r, "moe_intermediate_size", normalised=r.bool("norm_topk_prob", False), shared=shared)
    plain, step = r.list("mlp_only_layers", []), r.int("decoder_sparse_step", 1)
    chosen = [i not in plain and (i + 1) % step == 0 for i in range(len(layers))]
    return [replace(layer, mlp=moe) if own else layer for own, layer in zip(chosen, layers, strict=True)]


def read(r: Reader) -> ModelConfig:
    count = r.int("num_hidden_layers")
    seen: list[int | None] = [None] * count
    upper = r.int("max_window_layers", 28, minimum=0)
    if r.bool("use_sliding_window", False):
        types = ["full_attention" if i % 2 or i >= upper else "sliding_attention" for i in range(count)]
        seen = windows(r, count, types)
    r.ignore("sliding_window", "layer_types")
    layers = pre_norm_layers(r, attn={"qkv_bias": r.bool("qkv_bias", True)}, windows=seen)
    return finish(
        r,
        layers=sparse(r, layers, r.int("shared_expert_intermediate_size", 5632)),
        norm=norm(r),
        tied=tied(r),
    )
