"""Encoder-decoders behind a padded door, with a language-model head and without; and their encoder alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from taut import weights
from taut.batch import Padding, Source, pack
from taut.checkpoint import LazyTensor
from taut.config import ModelConfig
from taut.engine.dynamic_cache import DynamicCache
from taut.engine.sources import encoder_states
from taut.errors import RequestError
from taut.layers.block import Decoder
from taut.layers.encoder import Encoder
from taut.layers.encoder_decoder import EncoderDecoder, encoder_of
from taut.modeling.base import PreTrainedModel
from taut.modeling.labels import warn_at_padding
from taut.modeling.language import LanguageHead
from taut.modeling.output import Later, ModelOutput
from taut.modeling.text import Encoded, check_ids, run, token_labels
from taut.models import family
from taut.weights import Rule, Without


@dataclass
class Pair:
    """What both stacks made of one call. `source` is that of the encoder, whose states are all there is of it
    where the caller brought them."""

    source: Encoded
    states: Tensor  # [rows, width, dim]
    target: Encoded

    def extras(self) -> dict[str, Any]:
        """The fields of an output beside what a head makes."""
        target, source = self.target, self.source.extras()
        own, crossed = target.weights[0::2], target.weights[1::2]
        return {
            "decoder_hidden_states": target.hidden_states,
            "decoder_attentions": tuple(target.grid(rows, target) for rows in own) or None,
            "cross_attentions": tuple(target.grid(rows, self.source) for rows in crossed) or None,
            "encoder_last_hidden_state": self.states,
            "encoder_hidden_states": source["hidden_states"],
            "encoder_attentions": source["attentions"],
        }


class Seq2SeqModel(PreTrainedModel):
    """An encoder and a decoder, `model.encoder` and `model.decoder`, without a head: hidden states."""

    suffix = "Model"
    whole = False
    computed = ("model.encoder.embed_positions", "model.decoder.embed_positions")

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config)
        self.model = EncoderDecoder(config, dtype=dtype)

    @property
    def encoder(self) -> Encoder:
        """`encoder(batch) -> hidden [tokens, dim]`."""
        return self.model.encoder

    @property
    def decoder(self) -> Decoder:
        """`decoder(batch) -> hidden [tokens, dim]`, of a batch with a source."""
        return self.model.decoder

    def store(self, *states: Any) -> None:
        """Cache what the decoder attends to; see `EncoderDecoder.store`."""
        self.model.store(*states)

    def get_encoder(self) -> EncoderModel:
        """The encoder behind a padded door of its own, over the same weights: what it gives is what
        `encoder_outputs` takes."""
        return EncoderModel(self.config, encoder=self.encoder).train(self.training)

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def rules(self) -> tuple[Rule, ...]:
        found = super().rules()
        prefix = weights.prefix_of(weights.layout(self, found))
        return found if prefix is None else (*found, Without(prefix))

    def ignored(self) -> tuple[str, ...]:
        return ("lm_head.weight", "final_logits_bias")

    @classmethod
    def adapt(
        cls, config: ModelConfig, tensors: Mapping[str, LazyTensor]
    ) -> tuple[ModelConfig, Mapping[str, LazyTensor]]:
        """A head that is the embedding by the config, and in the files another matrix, is a head of its own;
        the one table that two stacks share may be there under the name of either."""
        return tables(config, tensors)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """`last_hidden_state` `[rows, width, dim]` of the decoder, zeros at padding, and the fields of
        `Seq2SeqLM.forward` beside the logits; inputs as there."""
        past = DynamicCache.asked(past_key_values, use_cache)
        found = self.run(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            inputs_embeds,
            decoder_inputs_embeds,
            past=past,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        hidden = found.target.padding.unpack(found.target.hidden)
        output = ModelOutput(last_hidden_state=hidden, past_key_values=past, **found.extras())
        return output.to_tuple() if return_dict is False else output

    def run(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        decoder_input_ids: Tensor | None,
        decoder_attention_mask: Tensor | None,
        encoder_outputs: Any,
        inputs_embeds: Tensor | None,
        decoder_inputs_embeds: Tensor | None,
        *,
        past: DynamicCache | None,
        **wanted: bool | None,
    ) -> Pair:
        """Both stacks over padded batches; `past`: rows that the decoder's go on from; `wanted`:
        `output_hidden_states`, `output_attentions`."""
        if encoder_outputs is None:
            source = self._encode(input_ids, attention_mask, inputs_embeds, wanted)
            states = source.padding.unpack(source.hidden)
        else:
            source, states = self._given(encoder_outputs, attention_mask)
        if decoder_input_ids is None and decoder_inputs_embeds is None and input_ids is not None:
            decoder_input_ids = self._shifted(input_ids) if self.config.pairing.repeats else None
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise RequestError("give exactly one of decoder_input_ids and decoder_inputs_embeds, or labels")
        if decoder_input_ids is not None:
            check_ids(decoder_input_ids, self.config.vocab_size, "decoder_input_ids")
        elif self.config.pairing.embeds_scale is not None:
            decoder_inputs_embeds = decoder_inputs_embeds * self.config.pairing.embeds_scale
        if past is not None:
            width = (decoder_input_ids if decoder_inputs_embeds is None else decoder_inputs_embeds).shape[1]
            decoder_attention_mask = past.new_columns(decoder_attention_mask, width)
        batch, padding = pack(decoder_input_ids, decoder_attention_mask, None, decoder_inputs_embeds)
        if padding.rows != source.padding.rows:
            raise RequestError(
                f"the decoder's inputs have {padding.rows} rows and the encoder's {source.padding.rows}; "
                "give one for each"
            )
        crossed = Source(source.hidden, source.batch.starts, source.batch.longest)
        if past is not None:
            with torch.no_grad():
                batch = past.extend(self, batch, crossed)
        batch = replace(batch, source=crossed)
        return Pair(source, states, run(self, self.decoder, batch, padding, past=past, **wanted))

    def _encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        wanted: dict[str, bool | None],
    ) -> Encoded:
        if (input_ids is None) == (inputs_embeds is None):
            raise RequestError("give exactly one of input_ids, inputs_embeds and encoder_outputs")
        if input_ids is not None:
            check_ids(input_ids, self.config.encoder.vocab_size)
        batch, padding = pack(input_ids, attention_mask, None, inputs_embeds)
        return run(self, self.encoder, batch, padding, **wanted)

    def _given(self, encoder_outputs: Any, attention_mask: Tensor | None) -> tuple[Encoded, Tensor]:
        """What the caller's encoder made, packed, and in the padded shape."""
        states = encoder_states(encoder_outputs, self.config.encoder.dim).to(self.device, self.dtype)
        batch, padding = pack(None, attention_mask, None, states)
        return Encoded(batch, padding, batch.embeds), states

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """What the decoder is to read for `labels` `[rows, width]`: each one's predecessor, and first of all
        the start token (of a family without one, the last token of the row)."""
        return self._shifted(labels)

    def _shifted(self, ids: Tensor) -> Tensor:
        c = self.config
        if c.pad_token_id is None:
            raise RequestError("config.json has no pad_token_id, which stands for labels of -100")
        ids = ids.masked_fill(ids == -100, c.pad_token_id)
        if c.pairing.start_is_last:  # mBART: a row's last token names its language, and comes first
            last = (ids != c.pad_token_id).sum(1, keepdim=True) - 1
            first = ids.gather(1, last.clamp(min=0))
        elif c.decoder_start_token_id is None:
            raise RequestError("config.json has no decoder_start_token_id; give decoder_input_ids")
        else:
            first = torch.full_like(ids[:, :1], c.decoder_start_token_id)
        return torch.cat((first, ids[:, :-1]), 1)


class Seq2SeqLM(LanguageHead, Seq2SeqModel):
    """An encoder and a decoder with a language-model head.

    `model.encoder(batch)` and `model.decoder(batch)` are the packed calls that everything goes through;
    `model(input_ids, labels=...)` and `model.generate(...)` are the padded ones.
    """

    suffix = ""
    whole = True
    computed = (*Seq2SeqModel.computed, "final_logits_bias")

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config, dtype=dtype)
        self.make_head(config, dtype=dtype)
        if config.head_bias:
            bias = torch.empty(1, config.vocab_size, dtype=dtype)
            self.final_logits_bias = nn.Parameter(bias, requires_grad=False)
        self.eval()

    @property
    def decoder(self) -> Decoder:
        return self.model.decoder

    def rules(self) -> tuple[Rule, ...]:
        return PreTrainedModel.rules(self)

    def architecture(self) -> str:
        return family(self.config.model_type).ARCHITECTURE

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """Logits, and the loss where `labels` are given, in the padded shape.

        The encoder reads `input_ids` `[rows, width]` (or `inputs_embeds` `[rows, width, dim]`, or instead of
        all that `encoder_outputs`, with `last_hidden_state` `[rows, width, dim]` first), padded anywhere as
        `attention_mask` says; the decoder `decoder_input_ids` (or `decoder_inputs_embeds`), likewise with
        `decoder_attention_mask`. `labels` `[rows, width of the decoder]` are what each of its tokens is to
        predict, -100 where nothing (padding by `decoder_attention_mask` is left out of the loss, with a
        warning where its labels are others); without inputs of its own the decoder reads them shifted right,
        as far as there is anything to predict. Each row is computed as if it were alone.

        Gives `loss` (mean over predicted tokens, or their sum divided by `num_items_in_batch`), `logits`
        `[rows, width, vocab]` float32, zeros at padding (beside a loss they are computed when somebody looks
        at them), `encoder_last_hidden_state`, and if asked the hidden states and attentions of both stacks.

        Raises `RequestError` for shapes that don't match, ids out of range and options of later releases.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self._shifted(labels)
            if decoder_attention_mask is None:
                decoder_attention_mask = needed(labels)
        past = DynamicCache.asked(past_key_values, use_cache, labels)
        if labels is not None:
            warn_at_padding(labels, decoder_attention_mask)
        found = self.run(
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            inputs_embeds,
            decoder_inputs_embeds,
            past=past,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        hidden, padding, loss = found.target.hidden, found.target.padding, None
        if labels is not None:
            loss = self.loss(hidden, token_labels(labels, found.target), num_items_in_batch)
        output = ModelOutput(
            loss=loss,
            logits=self._logits(hidden, padding, later=loss is not None),
            past_key_values=past,
            **found.extras(),
        )
        return output.to_tuple() if return_dict is False else output

    def _logits(self, hidden: Tensor, padding: Padding, later: bool) -> Tensor | Later:
        def make() -> Tensor:
            return padding.unpack(self.logits(hidden))

        return Later(make) if later else make()


class EncoderModel(Seq2SeqModel):
    """The encoder of an encoder-decoder alone: hidden states."""

    suffix = "EncoderModel"
    computed = ("model.encoder.embed_positions",)

    def __init__(
        self, config: ModelConfig, *, encoder: Encoder | None = None, dtype: torch.dtype | None = None
    ):
        PreTrainedModel.__init__(self, config)
        encoder = encoder_of(config, dtype) if encoder is None else encoder
        self.model = nn.ModuleDict({"encoder": encoder})

    @property
    def encoder(self) -> Encoder:
        return self.model["encoder"]

    def ignored(self) -> tuple[str, ...]:
        return (*super().ignored(), "decoder.*", "*.decoder.*")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """`last_hidden_state` `[rows, width, dim]`, zeros at padding; `hidden_states` and `attentions` if
        asked."""
        wanted = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        found = self._encode(input_ids, attention_mask, inputs_embeds, wanted)
        output = ModelOutput(last_hidden_state=found.padding.unpack(found.hidden), **found.extras())
        return output.to_tuple() if return_dict is False else output


def needed(labels: Tensor) -> Tensor:
    """Where the decoder has something to do for `labels` `[rows, width]`, as a mask: up to each row's last
    one that isn't -100."""
    return (labels != -100).flip(1).cumsum(1).flip(1) > 0


def tables(
    config: ModelConfig, tensors: Mapping[str, LazyTensor], head: str = "lm_head.weight"
) -> tuple[ModelConfig, Mapping[str, LazyTensor]]:
    """The config, and a checkpoint's tensors with one name for each table of tokens. Whether the stacks share
    theirs, and whether `head` is the decoder's, tensors know best: where there are two, they are two."""
    prefix = "model." if any(name.startswith("model.") for name in tensors) else ""
    one, ours, theirs = (
        f"{prefix}{name}.weight" for name in ("shared", "decoder.embed_tokens", "encoder.embed_tokens")
    )

    def differ(first: str, second: str) -> bool:
        return first in tensors and second in tensors and not _equal(tensors[first], tensors[second])

    if config.pairing.shared and differ(ours, theirs):
        config = replace(config, pairing=replace(config.pairing, shared=False))
    table = one if config.pairing.shared else ours
    names = [table, *((theirs, ours) if config.pairing.shared else ())]
    there = next((name for name in names if name in tensors), None)
    if config.tied and there is not None and differ(head, there):
        config = replace(config, tied=False)
    there = head if there is None and config.tied and head in tensors else there
    return config, tensors if there is None else {**tensors, table: tensors[there]}


def _equal(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two tensors hold the same numbers; stops at the first slice that differs."""
    if one.shape != other.shape:
        return False
    step = max(1, (8 << 20) // max(1, one.shape[1] * one.dtype.itemsize))
    bounds = ((begin, min(begin + step, one.shape[0])) for begin in range(0, one.shape[0], step))
    return all(torch.equal(one.read(a, b), other.read(a, b)) for a, b in bounds)
