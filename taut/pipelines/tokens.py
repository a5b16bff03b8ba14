"""Tokens to labels, and neighbours with one label to entities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Encoding
from torch import Tensor

from taut.errors import RequestError
from taut.pipelines.base import Piece, Settings
from taut.pipelines.text import TextPipeline, as_text

STRATEGIES = ("none", "simple", "first", "average", "max")


@dataclass(frozen=True)
class TokenSettings(Settings):
    """`aggregation_strategy`: "none" labels tokens; "simple" joins neighbours of one label; "first",
    "average" and "max" label whole words first, by their first token, the mean of their tokens' scores or the
    surest token. `ignore_labels`: left out of the result. `stride`: a text longer than the model takes is
    read in windows that share so many tokens; without it, what is too long is cut off. `is_split_into_words`:
    an item is a list of words, which `delimiter` joins to the text that positions count in."""

    aggregation_strategy: str = "none"
    ignore_labels: Sequence[str] = ("O",)
    stride: int | None = None
    is_split_into_words: bool = False
    delimiter: str = " "

    def __post_init__(self) -> None:
        strategy = str(self.aggregation_strategy).lower().rpartition(".")[2]
        if strategy not in STRATEGIES:
            raise RequestError(
                f"aggregation_strategy is {self.aggregation_strategy!r}; known: {', '.join(STRATEGIES)}"
            )
        object.__setattr__(self, "aggregation_strategy", strategy)
        if self.stride is not None and strategy == "none":
            raise RequestError(
                "stride reads a text in windows whose entities are joined, and aggregation_strategy is "
                "'none', which joins nothing; choose another: " + ", ".join(STRATEGIES[1:])
            )


@dataclass
class Token:
    """A token, or a word of several, of a text: its `scores` `[labels]`, where it stands among the tokens and
    in the text, and whether it goes on with the word before it."""

    word: str
    scores: Tensor
    index: int
    start: int
    end: int
    inside: bool


class TokenClassification(TextPipeline):
    """A text to the labels of its tokens, `{"entity", "score", "index", "word", "start", "end"}`, or with an
    `aggregation_strategy` to entities, `{"entity_group", "score", "word", "start", "end"}`; `start` and `end`
    are characters of the text."""

    task = "token-classification"
    settings = TokenSettings

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """As every pipeline; the words of one text give a list of one result, as in transformers."""
        split = options.get("is_split_into_words", self.defaults.is_split_into_words)
        words = isinstance(inputs, list) and bool(inputs) and all(isinstance(one, str) for one in inputs)
        return super().__call__([inputs] if split and words else inputs, **options)

    def prepare_one(self, item: Any, settings: TokenSettings) -> list[Piece]:
        options: dict[str, Any] = {"truncation": True}
        if settings.is_split_into_words:
            if not isinstance(item, list) or not all(isinstance(word, str) for word in item):
                raise RequestError(f"is_split_into_words takes a list of words, not {item!r}")
            options["is_split_into_words"] = True
        else:
            as_text(item, self.task)
        if settings.stride is not None:
            options |= {"stride": settings.stride, "return_overflowing_tokens": True}
        return [self.piece(encoding, encoding) for encoding in self.encode([item], **options)]

    def compute(self, pieces: Sequence[Piece], settings: TokenSettings) -> Sequence[Tensor]:
        return self.rows(self.run(pieces).logits, pieces)

    def finish(
        self, item: Any, pieces: Sequence[Piece], outputs: Sequence[Tensor], settings: TokenSettings
    ) -> list[dict[str, Any]]:
        text, found = item, []
        begins: list[int] | None = None
        if settings.is_split_into_words:
            text, begins, at = settings.delimiter.join(item), [], 0
            for word in item:
                begins.append(at)
                at += len(word) + len(settings.delimiter)
        for piece, logits in zip(pieces, outputs, strict=True):
            tokens = self._tokens(text, piece.note, logits.softmax(-1), begins)
            entities = self._joined(tokens, settings.aggregation_strategy)
            found += [
                one
                for one in entities
                if one.get("entity", one.get("entity_group")) not in settings.ignore_labels
            ]
        return found if len(pieces) == 1 else _apart(found)

    def _tokens(self, text: str, encoding: Encoding, scores: Tensor, begins: list[int] | None) -> list[Token]:
        """The tokens of a text that aren't special; `begins`: where each of its words does, if it came so."""
        prefix = getattr(self.tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None)
        found = []
        for index, (token, special) in enumerate(
            zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        ):
            if special:
                continue
            word, (start, end) = encoding.tokens[index], encoding.offsets[index]
            if begins is not None and (of := encoding.word_ids[index]) is not None:
                start, end = start + begins[of], end + begins[of]
            piece = text[start:end]
            # What a vocabulary marks as the inside of a word is longer by the mark.
            spaced = start == 0 or " " in text[start - 1 : start + 1]
            inside = len(word) != len(piece) if prefix else not spaced
            if token == self.tokenizer.unk_token_id:
                word, inside = piece, False
            found.append(Token(word, scores[index], index, start, end, inside))
        return found

    def _joined(self, tokens: list[Token], strategy: str) -> list[dict[str, Any]]:
        """The entities of tokens, in order."""
        if strategy in ("first", "average", "max"):
            tokens = [self._word(group, strategy) for group in _words(tokens)]
        names = self.model.config.id2label
        labels = [names[int(token.scores.argmax())] for token in tokens]
        if strategy == "none":
            return [
                {
                    "entity": label,
                    "score": token.scores.max().item(),
                    "index": token.index,
                    "word": token.word,
                    "start": token.start,
                    "end": token.end,
                }
                for label, token in zip(labels, tokens, strict=True)
            ]
        groups: list[list[int]] = []
        for index, label in enumerate(labels):
            # B- begins an entity even behind one of its kind; everything else goes on with its kind.
            if groups and not label.startswith("B-") and _kind(label) == _kind(labels[groups[-1][-1]]):
                groups[-1].append(index)
            else:
                groups.append([index])
        return [
            {
                # As in transformers, what follows the first hyphen names the group, whatever stands before.
                "entity_group": labels[group[0]].split("-", 1)[-1],
                "score": torch.stack([tokens[index].scores.max() for index in group]).mean().item(),
                "word": self.tokenizer.convert_tokens_to_string([tokens[index].word for index in group]),
                "start": tokens[group[0]].start,
                "end": tokens[group[-1]].end,
            }
            for group in groups
        ]

    def _word(self, tokens: list[Token], strategy: str) -> Token:
        """One word of its tokens."""
        if strategy == "average":
            scores = torch.stack([token.scores for token in tokens]).mean(0)
        else:
            surest = max(tokens, key=lambda token: float(token.scores.max()))
            scores = tokens[0].scores if strategy == "first" else surest.scores
        word = self.tokenizer.convert_tokens_to_string([token.word for token in tokens])
        return Token(word, scores, tokens[0].index, tokens[0].start, tokens[-1].end, False)


def _words(tokens: list[Token]) -> list[list[Token]]:
    """The tokens of each word."""
    words: list[list[Token]] = []
    for token in tokens:
        if token.inside and words:
            words[-1].append(token)
        else:
            words.append([token])
    return words


def _kind(label: str) -> str:
    return label[2:] if label[:2] in ("B-", "I-") else label


def _apart(entities: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entities of windows that overlap: of those that share text, the longest, then the surest."""
    kept: list[dict[str, Any]] = []
    for one in sorted(entities, key=lambda entity: entity["start"]):
        if not kept or not kept[-1]["start"] <= one["start"] < kept[-1]["end"]:
            kept.append(one)
            continue
        length, before = one["end"] - one["start"], kept[-1]["end"] - kept[-1]["start"]
        if (length, one["score"]) > (before, kept[-1]["score"]):
            kept[-1] = one
    return kept
