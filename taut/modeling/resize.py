"""`resize`: a model with another number of token ids: its table, the head over them, and its config."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from taut.config import ModelConfig
from taut.errors import RequestError
from taut.layers.embedding import Embedding
from taut.modeling.embeddings import check_dense, put_configs, table_of

if TYPE_CHECKING:
    from taut.modeling.base import PreTrainedModel


@torch.no_grad()
def resize(model: PreTrainedModel, count: int | None, multiple: int | None, mean: bool) -> Embedding:
    """See `PreTrainedModel.resize_token_embeddings`."""
    table, head = _table(model), model.get_output_embeddings()
    old = table.shape[0]
    count = old if count is None else count
    if not isinstance(count, int) or count < 1:
        raise RequestError(f"new_num_tokens is {count!r}; expected an integer >= 1")
    if multiple is not None:
        if not isinstance(multiple, int) or multiple < 1:
            raise RequestError(f"pad_to_multiple_of is {multiple!r}; expected an integer >= 1")
        count = -(-count // multiple) * multiple
    if count == old:
        return table

    def resized(param: nn.Parameter | None, new: str, dim: int = 0) -> nn.Parameter | None:
        if param is None:
            return None
        return nn.Parameter(_of_size(param.detach(), count, new, dim), requires_grad=param.requires_grad)

    matrix, bias = ("mean", "mean") if mean else ("drawn", "zeros")
    table.weight, table.shape = resized(table.weight, matrix), torch.Size((count, table.shape[1]))
    if head is not None and head is not table:
        head.weight, head.bias, head.out_features = (
            resized(head.weight, matrix),
            resized(head.bias, bias),
            count,
        )
    masked = getattr(model, "lm_head", None)
    if masked is not None and masked is not head:
        masked.bias = resized(masked.bias, "zeros")
    if getattr(model, "final_logits_bias", None) is not None:
        model.final_logits_bias = resized(model.final_logits_bias, "zeros", dim=1)
    _rename(model, count)
    return table


def _table(model: PreTrainedModel) -> Embedding:
    """The one table of tokens, and nothing that keeps it or its head from being another size."""
    config, table = model.config, table_of(model)
    if config.contrast is not None:
        raise RequestError(f"a {model.architecture()} has no table of tokens that could be resized alone")
    apart = config.pairing is not None and config.encoder.mel_bins is None and not config.pairing.shared
    if apart:
        raise RequestError(
            "the encoder and the decoder have a table of tokens each, and one number can't be said of both; "
            "give the new rows to the checkpoint"
        )
    check_dense("table of tokens", table)
    check_dense("head", model.get_output_embeddings())
    return table


def _of_size(old: Tensor, count: int, new: str, dim: int) -> Tensor:
    """The first `count` entries along `dim`; those that are missing are the "mean" of the old, "drawn" from
    N(0, 0.02) or "zeros"."""
    have = old.shape[dim]
    if count <= have:
        return old.narrow(dim, 0, count).clone()
    more = old.new_zeros([count - have if i == dim else size for i, size in enumerate(old.shape)])
    if new == "mean":
        wide = torch.promote_types(old.dtype, torch.float32)
        more += old.mean(dim, keepdim=True, dtype=wide).to(old.dtype)
    elif new == "drawn":
        nn.init.normal_(more, std=0.02)
    return torch.cat((old, more), dim)


def _rename(model: PreTrainedModel, count: int) -> None:
    """Put the number into the model's config, wherever one of its modules has it."""

    def changed(config: ModelConfig) -> ModelConfig:
        keys = [config.names.get("vocab_size", "vocab_size"), "decoder_vocab_size"]
        source = config.source | {key: count for key in keys if key in config.source}
        return replace(config, vocab_size=count, source=source)

    new = {id(model.config): changed(model.config)}
    if (pairing := model.config.pairing) is not None:
        new[id(pairing.encoder)] = changed(pairing.encoder)
        whole = new[id(model.config)]
        new[id(model.config)] = replace(whole, pairing=replace(pairing, encoder=new[id(pairing.encoder)]))
    put_configs(model, new)
