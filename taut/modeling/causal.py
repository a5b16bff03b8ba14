"""`CausalLM`: the Hugging Face-shaped door around a packed decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from taut.batch import Batch
from taut.config import ModelConfig
from taut.engine.dynamic_cache import DynamicCache
from taut.errors import RequestError
from taut.layers.block import Decoder
from taut.modeling.labels import warn_at_padding
from taut.modeling.language import LanguageHead
from taut.modeling.output import Later, ModelOutput
from taut.modeling.text import TextModel, token_labels
from taut.models import family

CAUSAL = ("ForCausalLM", "LMHeadModel")  # how classes with this head are called


class CausalLM(LanguageHead, TextModel):
    """A decoder with a language-model head.

    `model.decoder(batch)` is the packed call that everything goes through; `model(input_ids, ...)` and
    `model.generate(...)` are the padded ones. Weights are empty until `from_pretrained` or `init_weights`.
    """

    suffix = "ForCausalLM"

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config, dtype=dtype)
        self.make_head(config, bias=config.head_bias, dtype=dtype)
        self.eval()

    # ------------------------------------------------------------------------------------ what it is

    @property
    def decoder(self) -> Decoder:
        """`decoder(batch) -> hidden [tokens, dim]`."""
        return self.model

    def architecture(self) -> str:
        own = self.config.architecture
        return own if own.endswith(CAUSAL) else family(self.config.model_type).ARCHITECTURE

    # ------------------------------------------------------------------------------------ computing

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
        logits_to_keep: int = 0,
        num_items_in_batch: int | Tensor | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """Logits, and the loss where `labels` are given, in the padded shape.

        `input_ids` `[rows, width]` int64 (or `inputs_embeds` `[rows, width, dim]`), `attention_mask`
        `[rows, width]` with padding anywhere, `position_ids` `[rows, width]` that may restart to mark
        packed sequences, `labels` `[rows, width]` with -100 where there is nothing to predict. Each row is
        computed as if it were alone, and so is its loss: its first token, padded on the left or not, is
        nothing to predict (transformers has the last pad on the left predict it), and neither is a pad,
        whatever its label (a warning says so). Gives `loss` (mean over predicted tokens, or their sum divided
        by `num_items_in_batch`), `logits` `[rows, width, vocab]` float32, zeros at padding (the last
        `logits_to_keep` positions alone, if positive; beside a loss they are computed when somebody looks at
        them), and `hidden_states` and `attentions` if asked.

        With `use_cache`, or with rows to go on from in `past_key_values` (as such a call gave them), it also
        gives `past_key_values`: these rows and the new tokens. `attention_mask` then has a column for each
        token so far, or for each new one. Nothing of it has gradients. Without, `past_key_values` of the
        output are rows whose keys are computed once a call goes on from them.

        Raises `RequestError` for shapes that don't match, ids out of range and options of later releases.
        """
        past = DynamicCache.asked(past_key_values, use_cache, labels)
        if labels is not None:
            warn_at_padding(labels, attention_mask)
        if past is not None:
            width = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            attention_mask = past.new_columns(attention_mask, width)
        found = self.encode(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            past=past,
        )
        hidden, padding = found.hidden, found.padding
        kept, grid = (hidden, padding) if not logits_to_keep else padding.last(hidden, logits_to_keep)
        loss = logits = None
        if labels is not None:
            if logits_to_keep:
                raise RequestError("labels need every position's logits; leave logits_to_keep at 0")
            targets = next_tokens(token_labels(labels, found), found.batch)
            loss = self.loss(hidden, targets, num_items_in_batch)
            # A long batch's logits are large, and who trains seldom looks at them.
            logits = Later(lambda: grid.unpack(self.logits(kept)))
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and past is None):
                logits = grid.unpack(self.logits(kept))
        aside = {}
        if past is None and use_cache is None and labels is None and input_ids is not None:
            # Programs go on from a plain call too: its rows, whose keys are computed if it comes to that.
            aside["past_key_values"] = Later(lambda: DynamicCache.of(*padding.rows_of(input_ids)))
        output = ModelOutput(
            loss=loss,
            logits=logits,
            past_key_values=past,
            **found.extras(),
            aside=aside,
        )
        return output if return_dict else output.to_tuple()


def next_tokens(labels: Tensor, batch: Batch) -> Tensor:
    """What each token is to predict, `[tokens]`: the label of its row's next one; -100 for a row's last."""
    targets = torch.full_like(labels, -100)
    if len(labels):
        targets[:-1] = labels[1:]
        # Where a row without tokens ends, another does too.
        targets.index_fill_(0, (batch.starts[1:].long() - 1) % len(labels), -100)
    return targets
