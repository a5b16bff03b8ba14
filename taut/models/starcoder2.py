"""StarCoder2: Llama with LayerNorm, biases and a plain MLP, and a window where asked."""

from __future__ import annotations

from taut.config import Attn, Layer, Mlp, ModelConfig, Norm, Reader, activation, finish
from taut.models.llama import RULES as LLAMA
from taut.models.llama import heads, rotary, tied
from taut.weights import Rename

ARCHITECTURE = "Starcoder2ForCausalLM"

RULES = (
    *LLAMA,
    Rename("model.layers.{}.mlp.c_fc", "model.layers.{}.mlp.up_proj"),
    Rename("model.layers.{}.mlp.c_proj", "model.layers.{}.mlp.down_proj"),
)


def read(r: Reader) -> ModelConfig:
    bias = r.bool("use_bias", True)
    norm = Norm(r.float("norm_epsilon", 1e-5), kind="layer", bias=True)
    attn = Attn(
        **heads(r), rope=rotary(r), qkv_bias=bias, out_bias=bias, window=r.int("sliding_window", None)
    )
    act = activation(r, "hidden_act", default="gelu_tanh")
    layer = Layer(attn, Mlp(r.int("intermediate_size"), act, bias, gated=False), norm, norm)
    r.ignore("residual_dropout", "embedding_dropout", "mlp_type", "norm_type")
    return finish(
        r,
        layers=[layer] * r.int("num_hidden_layers"),
        norm=norm,
        tied=tied(r, default=True),
    )
