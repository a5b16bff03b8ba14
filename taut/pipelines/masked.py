"""Masked tokens filled in."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taut.errors import RequestError
from taut.pipelines.base import Piece, Settings
from taut.pipelines.text import TextPipeline, as_text


@dataclass(frozen=True)
class FillMaskSettings(Settings):
    """`top_k`: how many tokens for each mask; `targets`: the only ones to choose from; `tokenizer_kwargs`:
    options of the tokenizer, such as `{"truncation": True}`."""

    top_k: int = 5
    targets: str | Sequence[str] | None = None
    tokenizer_kwargs: dict[str, Any] | None = None


class FillMask(TextPipeline):
    """A text with a mask token to the likeliest tokens there, each as `{"score", "token", "token_str",
    "sequence"}`; a text with several masks to a list for each."""

    task = "fill-mask"
    settings = FillMaskSettings

    def __call__(self, inputs: Any, **options: Any) -> Any:
        results = super().__call__(inputs, **options)
        return results[0] if isinstance(inputs, list) and len(inputs) == 1 else results  # as in transformers

    def check(self, settings: FillMaskSettings) -> None:
        if self.tokenizer.mask_token_id is None:
            raise RequestError("fill-mask needs a tokenizer with a mask token, and this one has none")
        if settings.targets is not None:
            self._targets(settings.targets, told=False)

    def prepare_one(self, item: Any, settings: FillMaskSettings) -> list[Piece]:
        mask = self.tokenizer.mask_token_id
        encoding = self.encode([as_text(item, self.task)], **(settings.tokenizer_kwargs or {}))[0]
        places = [place for place, token in enumerate(encoding.ids) if token == mask]
        if not places:
            raise RequestError(f"no {self.tokenizer.mask_token} in the text {item[:60]!r}; write one to fill")
        return [self.piece(encoding, places)]

    def compute(self, pieces: Sequence[Piece], settings: FillMaskSettings) -> Sequence[Tensor]:
        """Logits `[masks, vocab]` of each text; those of other tokens are not computed."""
        found, counts = self.encoded(pieces), [len(piece.note) for piece in pieces]
        starts = found.batch.starts.tolist()
        at = [start + place for start, piece in zip(starts, pieces, strict=False) for place in piece.note]
        hidden = found.hidden.index_select(0, torch.tensor(at, device=self.device))
        return self.model.logits(hidden).to(torch.float32).cpu().split(counts)

    def finish(
        self, item: str, pieces: Sequence[Piece], outputs: Sequence[Tensor], settings: FillMaskSettings
    ) -> list[Any]:
        ids, places = pieces[0].inputs["input_ids"], pieces[0].note
        chances, allowed = outputs[0].softmax(-1), None
        if settings.targets is not None:
            allowed = self._targets(settings.targets)
            chances = chances[:, allowed]
        best = chances.topk(min(settings.top_k, chances.shape[-1]))
        found = []
        for place, scores, tokens in zip(places, best.values.tolist(), best.indices.tolist(), strict=True):
            tokens = tokens if allowed is None else [allowed[token] for token in tokens]
            found.append(
                [
                    {
                        "score": score,
                        "token": token,
                        "token_str": self.tokenizer.decode([token]),
                        # Where other masks are left, they stay to be seen.
                        "sequence": self.tokenizer.decode(
                            [*ids[:place], token, *ids[place + 1 :]], skip_special_tokens=len(places) == 1
                        ),
                    }
                    for score, token in zip(scores, tokens, strict=True)
                ]
            )
        return found[0] if len(places) == 1 else found

    def _targets(self, targets: str | Sequence[str], told: bool = True) -> list[int]:
        """The tokens of `targets`: the first one of a word that the vocabulary hasn't, with a warning where
        nobody was `told` yet."""
        vocabulary, found = self.tokenizer.get_vocab(), []
        for target in [targets] if isinstance(targets, str) else targets:
            token = vocabulary.get(target)
            if token is None and (ids := self.tokenizer.encode(target, add_special_tokens=False)):
                token = ids[0]
                if not told:
                    warnings.warn(
                        f"targets: {target!r} is not in the vocabulary; its first token, "
                        f"{self.tokenizer.convert_ids_to_tokens(token)!r}, stands for it",
                        stacklevel=2,
                    )
            if token is not None:
                found.append(token)
        if not found:
            raise RequestError(
                f"targets is {targets!r}, and none of them has a token; give at least one word"
            )
        return list(dict.fromkeys(found))
