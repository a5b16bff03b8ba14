"""GPT-OSS: Mixtral with a sink for each head, windows in every other layer, biases throughout, and a gated
product whose halves are bounded. Its files hold the experts of a layer as one tensor, or in MXFP4 blocks."""

from __future__ import annotations

from dataclasses import replace

from taut.config import ModelConfig, Reader, finish, rope, windows
from taut.models.llama import RULES as LLAMA
from taut.models.llama import norm, pre_norm_layers, tied
from taut.models.mixtral import experts
from taut.weights import Rename, Stacked

ARCHITECTURE = "GptOssForCausalLM"

_EXPERTS = "model.layers.{}.mlp.experts"
_BOTH = ("gate_proj", "up_proj")
RULES = (
    *LLAMA,
    Rename("model.layers.{}.mlp.router", "model.layers.{}.mlp.gate"),
    Stacked(f"{_EXPERTS}.gate_up_proj", f"{_EXPERTS}.{{}}.{{}}.weight", _BOTH, turns=True, transposed=True),
    Stacked(f"{_EXPERTS}.gate_up_proj_bias", f"{_EXPERTS}.{{}}.{{}}.bias", _BOTH, turns=True),
    Stacked(f"{_EXPERTS}.down_proj", f"{_EXPERTS}.{{}}.down_proj.weight", transposed=True),
    Stacked(f"{_EXPERTS}.down_proj_bias", f"{_EXPERTS}.{{}}.down_proj.bias"),
)
# What the angles are where a config says nothing of them.
_YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}


def read(r: Reader) -> ModelConfig:
    r.ignore("experts_per_token", "initial_context_length")  # said again under the usual names
    r.only("swiglu_alpha", 1.702)
    count, head_dim = r.int("num_hidden_layers"), r.int("head_dim", 64)
    types = ["full_attention" if i % 2 else "sliding_attention" for i in range(count)]
    bias = r.bool("attention_bias", True)
    said = r.has("rope_parameters") or r.has("rope_scaling")
    angles = rope(
        r,
        head_dim,
        r.int("max_position_embeddings"),
        theta=150_000.0,
        section=None if said else Reader(_YARN, r.source),
    )
    own = norm(r, default=1e-5)
    layers = pre_norm_layers(
        r,
        attn={
            "head_dim": head_dim,
            "scale": head_dim**-0.5,
            "rope": angles,
            "qkv_bias": bias,
            "out_bias": bias,
            "sinks": True,
        },
        windows=windows(r, count, types),
        pre=own,
    )
    limit = r.float("swiglu_limit", 7.0)
    moe = experts(r, "intermediate_size", normalised=True, bias=True, limit=limit)
    moe = replace(moe, act="gelu_quick")  # x * sigmoid(1.702 x); its config says "silu"
    return finish(r, layers=[replace(layer, mlp=moe) for layer in layers], norm=own, tied=tied(r))
