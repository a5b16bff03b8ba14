"""Encoder-decoders whose encoder hears sound, with a language-model head and without; and that encoder
alone, also with a head that classifies clips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taut.checkpoint import LazyTensor
from taut.config import ModelConfig
from taut.engine.dynamic_cache import DynamicCache
from taut.engine.generation import GenerationConfig
from taut.engine.output import GenerateOutput
from taut.engine.sources import encoder_states
from taut.engine.transcribe import detect_language, transcribe
from taut.errors import RequestError
from taut.modeling.labels import row_loss
from taut.modeling.output import ModelOutput
from taut.modeling.seq2seq import EncoderModel, Seq2SeqLM, Seq2SeqModel, tables
from taut.modeling.speech import ClipHead
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

    def generate(
        self,
        input_features: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        inputs: Tensor | None = None,
        **options: Any,
    ) -> Tensor | GenerateOutput | dict[str, Any]:
        """Write what is said in `input_features` `[clips, mel bins, frames]`.

        A clip of at most one window (30 seconds) is filled up with zeros; longer ones are transcribed window
        by window, each from the last timestamp of the one before: several of these need an `attention_mask`
        `[clips, frames]`, which says where each ends. `encoder_outputs` may take the place of one window.

        | option | meaning |
        |---|---|
        | `language` | of the sound: a code ("en"), token or name, or one for each clip; None: it is found |
        | `task` | "transcribe", or "translate", to English |
        | `return_timestamps` | write timestamps, under the rules of Whisper; always where clips are long |
        | `return_segments` | return a dict of `sequences` and `segments` |
        | `return_token_timestamps` | the dict, and each segment, has `token_timestamps` (seconds) |
        | `prompt_ids` | tokens that the decoder reads first, as `processor.get_prompt_ids` makes them |
        | `prompt_condition_type` | "first-segment"; or "all-segments", with `condition_on_prev_tokens` |
        | `condition_on_prev_tokens` | the decoder reads what was said in the windows before |
        | `temperature` | 0 or None: the likeliest tokens; more: drawn; several: the next where one fails |
        | `compression_ratio_threshold` | what repeats itself more than so much fails |
        | `logprob_threshold` | what has a mean log-probability below this fails |
        | `no_speech_threshold` | what fails by that, and is likelier silence than this, is skipped |
        | `forced_decoder_ids` | pairs of a place and a token behind the start, as older files have them |
        | `is_multilingual` | what the model is, where generation_config.json doesn't say it or is wrong |
        | `monitor_progress` | called before each window with frames done and frames in all, `[clips, 2]` |

        All others are those of `taut.engine.generate.generate`, beams and streamer (of one clip) included. As
        `temperature` alone says whether tokens are drawn, `do_sample=True` means a temperature of 1.

        Returns `[clips, tokens]` int64: the new tokens alone, without the end of a row, filled up with the
        pad token. With `return_segments`, or `return_timestamps` and `return_dict_in_generate`, a dict: its
        `segments` are a list for each clip, of dicts with `start` and `end` (seconds, float64), `tokens`,
        `result` (the row of the engine's call, with the tokens that it began with) and `idxs` (where `tokens`
        are in that row). With `return_dict_in_generate` alone and one call of the engine, what that gave.

        Raises `RequestError` for a language or task that the model hasn't, and for what can't be served.
        """
        if input_features is not None and inputs is not None:
            raise RequestError("input_features and inputs are both given; they mean the same: pass one")
        heard = inputs if input_features is None else input_features
        return transcribe(self, heard, generation_config, **options)

    def stream(self, *_: Any, **__: Any) -> Any:
        """Not of models that hear: `RequestError`."""
        raise RequestError(
            "stream continues a text. Next step: call generate with streamer=taut.TextIteratorStreamer(...)"
        )

    def generate_batch(self, *_: Any, **__: Any) -> Any:
        """Not of models that hear: `RequestError`."""
        raise RequestError(
            "generate_batch answers texts. Next step: call generate with all clips, or taut.pipeline, which "
            "takes any number"
        )

    def detect_language(
        self,
        input_features: Tensor | None = None,
        encoder_outputs: Any = None,
        generation_config: GenerationConfig | None = None,
    ) -> Tensor:
        """The token `[clips]` of the likeliest language of the first window of each clip."""
        return detect_language(self, input_features, encoder_outputs, generation_config)


class SpeechEncoderModel(_Hears, EncoderModel):
    """The encoder of spectrograms alone: hidden states."""

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.conv1

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


class SpeechEncoderClassifier(ClipHead, SpeechEncoderModel):
    """The encoder of spectrograms with scores of each clip, of the mean of what its tokens are projected
    to."""

    suffix = "ForAudioClassification"

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config, dtype=dtype)
        self.make_head(config, config.encoder, dtype)

    def freeze_encoder(self) -> None:
        """Give nothing but the head a gradient."""
        self.encoder.requires_grad_(False)

    def forward(
        self,
        input_features: Tensor | None = None,
        encoder_outputs: Any = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple[Any, ...]:
        """`logits` `[clips, labels]`, and `loss` where `labels` are given, as `labels.row_loss` takes them;
        `hidden_states` and `attentions` if asked.

        `input_features` are those of `SpeechSeq2SeqLM.forward`, or instead of them `encoder_outputs`, what
        `get_encoder()` gave: `last_hidden_state` `[clips, tokens, dim]`, with `hidden_states` where the
        config says `use_weighted_layer_sum`.
        """
        if (input_features is None) == (encoder_outputs is None):
            raise RequestError("give exactly one of input_features and encoder_outputs")
        extras = dict.fromkeys(("hidden_states", "attentions"))
        if encoder_outputs is None:
            asked = output_hidden_states or self.layer_weights is not None
            wanted = {"output_attentions": output_attentions, "output_hidden_states": asked}
            found = self._encode(input_features, None, None, wanted)
            hidden, states, extras = found.padding.unpack(found.hidden), found.hidden_states, found.extras()
        else:
            hidden = encoder_states(encoder_outputs, self.config.encoder.dim).to(self.device, self.dtype)
            states = getattr(encoder_outputs, "hidden_states", None)
        if self.layer_weights is not None and len(states or ()) != len(self.layer_weights):
            raise RequestError(
                "the model classifies by all hidden states ('use_weighted_layer_sum'), and "
                f"encoder_outputs has {len(states or ())} of {len(self.layer_weights)}; ask the encoder "
                "for them with output_hidden_states=True"
            )
        logits = self.classifier(self.projected(hidden, states).mean(1))
        loss = None if labels is None else row_loss(logits, labels, self.config)
        if not output_hidden_states:
            extras["hidden_states"] = None
        output = ModelOutput(loss=loss, logits=logits, **extras)
        return output.to_tuple() if return_dict is False else output
