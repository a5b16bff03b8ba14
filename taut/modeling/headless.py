"""`HeadlessModel`: hidden states of a decoder or encoder, without a head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from taut import weights
from taut.layers.encoder import pool
from taut.modeling.output import ModelOutput
from taut.modeling.text import TextModel
from taut.weights import Rule, Without


class HeadlessModel(TextModel):
    """A decoder or encoder without a head; its files leave out the first word that those with a head have."""

    suffix = "Model"
    head = ("model.pooler",)
    whole = False

    def rules(self) -> tuple[Rule, ...]:
        found = super().rules()
        prefix = weights.prefix_of(weights.layout(self, found))
        return found if prefix is None else (*found, Without(prefix))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        bbox: Tensor | None = None,
        task_type_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """`last_hidden_state` `[rows, width, dim]`, zeros at padding; `pooler_output` `[rows, dim]`, of an
        encoder with a pooler, from each row's first token (zeros for a row without any); `hidden_states` and
        `attentions` if asked. Inputs are those of `TextModel.encode`; `token_type_ids`, `bbox` and
        `task_type_ids` are for the families that have them."""
        features = {"token_type_ids": token_type_ids, "bbox": bbox, "task_type_ids": task_type_ids}
        found = self.encode(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            features=features,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        pooler, pooled = getattr(self.model, "pooler", None), None
        if pooler is not None:
            pooled = pooler(pool(found.hidden, found.batch, "first"))
        output = ModelOutput(
            last_hidden_state=found.padding.unpack(found.hidden),
            pooler_output=pooled,
            **found.extras(),
        )
        return output.to_tuple() if return_dict is False else output
