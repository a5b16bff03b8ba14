"""ALBERT: BERT with a narrow embedding, projected, and layers that share their weights in groups."""

from __future__ import annotations

from taut.config import Heads, ModelConfig, Reader, Transform, activation
from taut.errors import ConfigError
from taut.models.bert import EMBEDDINGS, encoder, layer_norm, post_norm_layers
from taut.weights import Rename, Rule, renames

ARCHITECTURE = "AlbertForMaskedLM"

IGNORED = ("*.position_ids", "predictions.decoder.*", "sop_classifier.*")


def read(r: Reader) -> ModelConfig:
    r.ignore("classifier_dropout_prob", "down_scale_factor", "gap_size", "net_structure_type")
    r.ignore("num_memory_blocks", "layers_to_keep")
    act = activation(r, "hidden_act", default="gelu_tanh")
    firsts = first_layers(r)
    return encoder(
        r,
        layers=post_norm_layers(r, act, count=len(firsts)),
        weights_of=firsts,
        embed_dim=r.int("embedding_size", 128),
        heads=Heads(pooler=Transform("tanh"), masked=Transform(act, layer_norm(r))),
    )


def first_layers(r: Reader) -> tuple[int, ...]:
    """The first layer with the weights of each: a group has `inner_group_num` layers, which run one after the
    other, as often as its share of `num_hidden_layers`."""
    times, groups = r.int("num_hidden_layers", 12), r.int("num_hidden_groups", 1)
    inner = r.int("inner_group_num", 1)
    if groups > times:
        raise ConfigError(
            f"{r.source}: 'num_hidden_groups' is {groups}, more than 'num_hidden_layers', which is {times}"
        )
    group = [int(i / (times / groups)) for i in range(times)]
    return tuple(group.index(g) * inner + j for g in group for j in range(inner))


def rules(config: ModelConfig) -> tuple[Rule, ...]:
    inner = config.source.get("inner_group_num") or 1
    layer = "encoder.albert_layer_groups.{}.albert_layers.{}"
    places = enumerate(dict.fromkeys(config.weights_of))
    return (
        *EMBEDDINGS,
        *renames("model", {layer.format(*divmod(k, inner)): f"layers.{first}" for k, first in places}),
        *renames(
            f"model.{layer}",
            {
                "attention.query": "self_attn.q_proj",
                "attention.key": "self_attn.k_proj",
                "attention.value": "self_attn.v_proj",
                "attention.dense": "self_attn.o_proj",
                "attention.LayerNorm": "after_attention_layernorm",
                "ffn": "mlp.up_proj",
                "ffn_output": "mlp.down_proj",
                "full_layer_layer_norm": "after_feedforward_layernorm",
            },
        ),
        Rename("model.encoder.embedding_hidden_mapping_in", "model.project_in"),
        Rename("model.pooler", "model.pooler.dense"),
        Rename("albert", "model"),
        Rename("predictions.dense", "lm_head.dense"),
        Rename("predictions.LayerNorm", "lm_head.layer_norm"),
        Rename("predictions.bias", "lm_head.bias"),
    )
