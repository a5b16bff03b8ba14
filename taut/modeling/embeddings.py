"""Another table of tokens, or another head over them, for a model that there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from taut.config import ModelConfig
from taut.errors import RequestError
from taut.layers.embedding import Embedding
from taut.layers.linear import Linear

if TYPE_CHECKING:
    from taut.modeling.base import PreTrainedModel

# What `nn.Embedding` can do to its weight while it looks up or trains, and what it is without.
_OPTIONS = {"max_norm": None, "scale_grad_by_freq": False, "sparse": False}


def set_table(model: PreTrainedModel, value: Any) -> None:
    """See `PreTrainedModel.set_input_embeddings`."""
    table = table_of(model)
    if value is table:
        return
    check_dense("table of tokens", table)
    _check_plain("set_input_embeddings", value, Embedding, nn.Embedding)
    options = {name: getattr(value, name, usual) for name, usual in _OPTIONS.items()}
    if odd := [f"{name}={given}" for name, given in options.items() if given != _OPTIONS[name]]:
        raise RequestError(f"the nn.Embedding has {', '.join(odd)}, which a table here hasn't; leave it out")
    if isinstance(value, Embedding) and value.scale != table.scale:
        raise RequestError(
            f"the table given multiplies its vectors by {value.scale or 1}, and that of this model by "
            f"{table.scale or 1}; give its weight alone, as an nn.Embedding"
        )
    _check_fits("table of tokens", value.weight, table.shape, model)
    table.weight = value.weight
    table.padding = value.padding if isinstance(value, Embedding) else value.padding_idx


def set_head(model: PreTrainedModel, value: Any) -> None:
    """See `PreTrainedModel.set_output_embeddings`."""
    head = model.get_output_embeddings()
    if head is None:
        raise RequestError(f"a {model.architecture()} scores no tokens: it has no head that could be another")
    if value is head:
        return
    _check_plain("set_output_embeddings", value, Linear, nn.Linear)
    if tied := isinstance(head, Embedding):
        if value.weight is head.weight and value.bias is None:
            return
        if model.lm_head is not None:
            raise RequestError(
                f"a {model.architecture()} scores tokens by its table of them, behind a transform; "
                "set_input_embeddings gives both another matrix"
            )
    else:
        check_dense("head", head)
    biased = not tied and head.bias is not None
    if (value.bias is not None) != biased:
        has, should = ("a bias", "none") if value.bias is not None else ("no bias", "one")
        raise RequestError(
            f"the head given has {has}, and that of a {model.architecture()} has {should}, as its files say; "
            f"give one with bias={biased}"
        )
    _check_fits("head", value.weight, head.shape, model)
    if tied:
        with torch.device("meta"):
            model.lm_head = head = Linear(head.shape[1], head.shape[0]).train(model.training)
        _untie(model)
    head.weight, head.bias = value.weight, value.bias


def table_of(model: PreTrainedModel) -> Embedding:
    """A model's table of tokens."""
    table = model.get_input_embeddings()
    if not isinstance(table, Embedding):
        raise RequestError(f"a {model.architecture()} has no table of tokens")
    return table


def check_dense(name: str, module: Embedding | Linear | None) -> None:
    """Raises `RequestError` for a table or head that is held packed."""
    if module is not None and module.packed is not None:
        raise RequestError(
            f"the {name} is held packed ({module.packed.kind}), and packed rows can't be added or given; "
            "load the model dense (dtype=torch.bfloat16), or leave that module out (llm_int8_skip_modules)"
        )


def put_configs(model: PreTrainedModel, new: Mapping[int, ModelConfig]) -> None:
    """Give every module that has a config, by its `id`, in `new` the one that takes its place."""
    for module in model.modules():
        config = module.__dict__.get("config")
        if id(config) in new:
            module.config = new[id(config)]


def _untie(model: PreTrainedModel) -> None:
    """Say in the config that the head has a matrix of its own. Files of an encoder-decoder show it themselves
    (`seq2seq.tables`), and T5's key means how states are scaled, too."""
    old = model.config
    source = old.source if old.pairing is not None else {**old.source, "tie_word_embeddings": False}
    put_configs(model, {id(old): replace(old, tied=False, source=source)})


def _check_plain(method: str, value: Any, own: type, torchs: type) -> None:
    """Raises `RequestError` unless `value` is a module that does what its dense weight says, no more."""
    name = f"nn.{torchs.__name__}"
    if not isinstance(value, own | torchs) or type(value).forward not in (own.forward, torchs.forward):
        kind = type(value).__name__
        raise RequestError(
            f"{method} takes an {name}, or what another model has there, not {kind}; what computes something "
            "else can be a forward hook of the module that is there"
        )
    if value._forward_hooks or value._forward_pre_hooks:
        raise RequestError(
            f"the {name} has hooks, and its weight alone is taken; register them on the model's own module"
        )
    if isinstance(value, own):
        check_dense("module given", value)
    if getattr(value, "parts", None) or not isinstance(value.weight, nn.Parameter):
        raise RequestError(
            f"the {name} has no weight of its own, but what is computed; give it as one matrix"
        )


def _check_fits(name: str, weight: Tensor, shape: torch.Size, model: PreTrainedModel) -> None:
    """Raises `RequestError` for a weight that can't take the place of one of `shape`."""
    if weight.shape != shape:
        count = weight.shape[0]
        raise RequestError(
            f"the {name} given is {list(weight.shape)}, and that of this model {list(shape)} (tokens, "
            "and the size of their vectors)"
            + ("" if count == shape[0] else f"; first resize_token_embeddings({count})")
        )
    if weight.dtype is not model.dtype or weight.device != model.device:
        raise RequestError(
            f"the {name} given is {weight.dtype} on {weight.device}, and the model {model.dtype} on "
            f"{model.device}; give it module.to(model.device, model.dtype)"
        )
