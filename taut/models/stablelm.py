"""StableLM: Llama with LayerNorm, a rotation of a quarter of each head, and the two halves of a block in
parallel where asked."""

from __future__ import annotations

from dataclasses import replace

from taut.config import ModelConfig, Norm, Reader, finish
from taut.models.llama import RULES as LLAMA
from taut.models.llama import pre_norm_layers, rotary, tied
from taut.weights import Rule, Split

ARCHITECTURE = "StableLmForCausalLM"


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    """Llama's; a norm of each head is a module of its own on disk."""
    attn, at = config.layers[0].attn, "model.layers.{}.self_attn"
    counts = {"q": attn.heads, "k": attn.kv_heads}
    norms = [
        Split(f"{at}.{x}_layernorm.norms.{{}}.weight", f"{at}.{x}_norm.weight", count, attn.head_dim)
        for x, count in counts.items()
    ]
    return (*LLAMA, *norms)


def read(r: Reader) -> ModelConfig:
    eps = r.float("layer_norm_eps", 1e-5)
    norm = Norm(eps, kind="layer", bias=True)
    per_head = Norm(eps, kind="layer") if r.bool("qk_layernorm", False) else None
    layers = pre_norm_layers(
        r,
        attn={
            "qkv_bias": r.bool("use_qkv_bias", False),
            "rope": rotary(r, partial=0.25),
            "qk_norm": per_head,
            "qk_norm_of": "own head",
        },
        pre=norm,
    )
    parallel = r.bool("use_parallel_residual", False)
    pre_mlp = None if parallel else norm
    return finish(
        r,
        layers=[replace(layer, pre_mlp=pre_mlp, parallel=parallel) for layer in layers],
        norm=norm,
        tied=tied(r),
    )
