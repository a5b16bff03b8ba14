"""Encoder-decoders whose encoder hears sound, with a language-model head and without; and that encoder
alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from taut.checkpoint import LazyTensor
from taut.config import ModelConfig
from taut.engine.dynamic_cache import DynamicCache
from taut.errors import RequestError
from taut.modeling.output import ModelOutput
from taut.modeling.seq2seq import EncoderModel, Seq2SeqLM, Seq2SeqModel, tables
from taut.modeling.text import Encoded, run


class _Hears:
    """What models share whose `encoder` is a `MelEncoder`."""

    head_on_disk = "proj_out.weight"

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens

    def get_encoder(self) -> SpeechEncoderModel:
        """The encoder behind a door of its own, over the same weights: what it gives is what
        `encoder_outputs` takes."""
        return SpeechEncoderModel(self.config, encoder=self.encoder).train(self.training)

    @classmethod
    def adapt(
        cls, config: ModelConfig, tensors: Mapping[str, LazyTensor]
    ) -> tuple[ModelConfig, Mapping[str, LazyTensor]]:
        return tables(config, tensors, head=cls.head_on_disk)

    def ignored(self) -> tuple[str, ...]:
        head = (self.head_on_disk,) if self.config.tied or not self.whole else ()
        return (*super().ignored(), *head)

    def _encode(
        self,
        input_features: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        wanted: dict[str, bool | None],
    ) -> Encoded:
        if input_features is None:
            raise RequestError("give exactly one of input_features and encoder_outputs")
        batch, padding = self.encoder.pack(input_features)
        return run(self, self.encoder, batch, padding, **wanted)

    def _given(self, encoder_outputs: Any, attention_mask: Tensor | None) -> tuple[Encoded, Tensor]:
        return super()._given(encoder_outputs, None)  # the mask is about frames


class SpeechSeq2SeqModel(_Hears, Seq2SeqModel):
    """An encoder of spectrograms and a decoder, `model.encoder` and `model.decoder`, without a head."""

    def forward(
        self,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: DynamicCache | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """`last_hidden_state` `[rows, width, dim]` of the decoder, zeros at padding, and the fields of
        `SpeechSeq2SeqLM.forward` beside the logits; inputs as there."""
        return super().forward(
            input_features,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            past_key_values,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )


class SpeechSeq2SeqLM(_Hears, Seq2SeqLM):
    """An encoder of spectrograms and a decoder with a language-model head.

    `model.encoder.pack(features)` makes the batch that `model.encoder(batch)` takes, and
    `model.decoder(batch)` attends to what that gives; `model(input_features, labels=...)` and
    `model.generate(input_features, ...)` are the padded calls.
    """

    def forward(
        self,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: DynamicCache | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """Logits, and the loss where `labels` are given, in the padded shape.

        The encoder hears `input_features` `[clips, mel bins, frames]`, floats, at most two frames for each of
        its positions (30 seconds), or instead of them `encoder_outputs` with `last_hidden_state`
        `[clips, tokens, dim]` first. Fewer frames give fewer tokens to attend to; the model was trained on
        spectrograms filled up with silence, which a feature extractor gives. It hears that silence as well:
        `attention_mask` `[clips, frames]` changes nothing here. All else is as in `Seq2SeqLM.forward`.
        """
        return super().forward(
            input_features,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs,
            past_key_values,
            decoder_inputs_embeds=decoder_inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            num_items_in_batch=num_items_in_batch,
        )


class SpeechEncoderModel(_Hears, EncoderModel):
    """The encoder of spectrograms alone: hidden states."""

    def forward(
        self,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """`last_hidden_state` `[clips, tokens, dim]`; `hidden_states` and `attentions` if asked. Inputs are
        those of `SpeechSeq2SeqLM.forward`."""
        return super().forward(
            input_features, None, None, output_attentions, output_hidden_states, return_dict
        )
