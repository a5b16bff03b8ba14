"""`LanguageHead`: logits over the vocabulary, their loss and generation, for whatever has a `decoder`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from taut.batch import Batch
from taut.config import ModelConfig
from taut.engine.generation import GenerationConfig
from taut.kernels.linear_ce import linear_cross_entropy
from taut.layers.block import Decoder
from taut.layers.linear import Linear
from taut.modeling.generation import GenerationMixin
from taut.modeling.labels import token_loss


class LanguageHead(GenerationMixin):
    """What models share that predict the next token: a subclass, which is a `PreTrainedModel` too, has a
    `decoder` and calls `make_head` once that is there."""

    config: ModelConfig

    @property
    def decoder(self) -> Decoder:
        """`decoder(batch) -> hidden [tokens, dim]`."""
        raise NotImplementedError

    def make_head(self, config: ModelConfig, *, bias: bool = False, dtype: torch.dtype | None = None) -> None:
        """The head's matrix, unless it is the embedding's, and where generation starts from."""
        self.generation_config = GenerationConfig.from_dict(token_ids(config))
        self.lm_head = None
        self.final_logits_bias = None
        if not config.tied:
            self.lm_head = Linear(config.embed_dim or config.dim, config.vocab_size, bias=bias, dtype=dtype)

    def ignored(self) -> tuple[str, ...]:
        return ("lm_head.weight",) if self.config.tied else ()

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.embed_tokens if self.lm_head is None else self.lm_head

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits `[n, vocab]` (float64 for a float64 model) of hidden states `[n, dim]`."""
        scores = self.decoder.embed_tokens.project(hidden) if self.lm_head is None else self.lm_head(hidden)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.final_logits_bias is not None:
            scores = scores + self.final_logits_bias
        if self.config.logit_scale is not None:
            scores = scores * self.config.logit_scale
        if self.config.logit_softcap is not None:
            scores = self.config.logit_softcap * torch.tanh(scores / self.config.logit_softcap)
        return scores

    def loss(self, hidden: Tensor, targets: Tensor, items: int | Tensor | None) -> Tensor:
        """Cross-entropy of the logits of `hidden` `[tokens, dim]` against `targets` `[tokens]`, a mean or a
        sum over `items`; in chunks of tokens, so that not all logits are there at once."""
        c, head = self.config, self.get_output_embeddings()
        watched = head._forward_hooks or head._forward_pre_hooks
        if watched or head.weight is None:
            return token_loss(self.logits(hidden), targets, items)
        bias = getattr(head, "bias", None)
        if self.final_logits_bias is not None:
            bias = self.final_logits_bias[0]
        return linear_cross_entropy(
            hidden,
            head.weight,
            targets,
            bias,
            scale=1.0 if c.logit_scale is None else c.logit_scale,
            softcap=c.logit_softcap,
            divisor=items,
        )

    @torch.no_grad()
    def locate_nonfinite(self, batch: Batch) -> str:
        """The first module whose weights or output are not finite for this batch, in order of computation;
        runs the batch once more."""
        with self._first_nonfinite() as found:
            self.logits(self.decoder(batch))
        return found[0] if found else "the head's logits"


def token_ids(config: ModelConfig) -> dict[str, Any]:
    """The special tokens that a `config.json` names, as options of generation."""
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
        "decoder_start_token_id": config.decoder_start_token_id,
    }
    return {name: value for name, value in ids.items() if value is not None}
