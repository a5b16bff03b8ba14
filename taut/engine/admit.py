"""`check_request`: what a model can't take of a request, whatever engine it is given to."""

from __future__ import annotations

from torch import Tensor

from taut.config import ModelConfig
from taut.engine.request import Request
from taut.errors import RequestError


def check_request(request: Request, config: ModelConfig) -> None:
    """Raise `RequestError` for one that was submitted before, for parts that don't go together, and for token
    ids and sources that the model doesn't know."""
    if request.id >= 0:
        raise RequestError(f"request {request.id} was submitted before; make a new one to run it again")
    if request.drafter is not None and request.group is not None:
        raise RequestError("guesses are made for single rows, not for beams or guidance; leave one out")
    _check_source(request, config)
    vocab = config.vocab_size
    for name, ids in (
        *(("prompt" if row is request else "negative prompt", row.prompt) for row in request.rows),
        ("logit_bias", request.params.logit_bias),
        *(("sequence_bias", ids) for ids in request.params.sequence_bias),
        *(("bad_words", ids) for ids in request.params.bad_words),
        ("suppress_tokens", request.params.suppress_tokens),
        ("begin_suppress_tokens", request.params.begin_suppress_tokens),
        ("eos_token_ids", request.params.eos_token_ids if request.params.min_new_tokens else ()),
    ):
        if ids and not (min(ids) >= 0 and max(ids) < vocab):
            at, bad = next((at, token) for at, token in enumerate(ids) if not 0 <= token < vocab)
            raise RequestError(
                f"{name} has token id {bad} at index {at}, but the model's ids are 0 to {vocab - 1}; "
                "was it made by another model's tokenizer?"
            )


def _check_source(request: Request, config: ModelConfig) -> None:
    encoder, source = config.encoder, request.source
    if (encoder is None) != (source is None):
        raise RequestError(
            "the model has no encoder, and the request a source for one; leave it out"
            if encoder is None
            else "the request has no source, what the encoder is to read; give its token ids"
        )
    if source is None:
        return
    if not len(source):
        raise RequestError("the source is empty; give the encoder at least one token")
    if isinstance(source, Tensor):
        if source.dim() != 2 or source.shape[1] != encoder.dim:
            raise RequestError(f"the source has shape {list(source.shape)}; expected [length, {encoder.dim}]")
        return
    if len(source) > encoder.context:
        raise RequestError(
            f"the source has {len(source)} tokens, and the encoder's context is {encoder.context}; "
            "shorten it (truncation=True, max_length=...)"
        )
    if min(source) < 0 or max(source) >= encoder.vocab_size:
        bad = next(token for token in source if not 0 <= token < encoder.vocab_size)
        raise RequestError(
            f"the source has token id {bad}, but the encoder's ids are 0 to {encoder.vocab_size - 1}; "
            "was it made by another model's tokenizer?"
        )
