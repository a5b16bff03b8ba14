"""Questions to their answers in a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taut.errors import RequestError
from taut.pipelines.base import Piece, Settings
from taut.pipelines.text import TextPipeline, as_text


@dataclass(frozen=True)
class QuestionSettings(Settings):
    """`top_k` (or `topk`): how many answers, more than one as a list; `max_answer_len`: in tokens;
    `max_seq_len`, `doc_stride`: tokens of a window of the context, question included, and how many of them
    two windows share; `max_question_len`: tokens of the question, which is cut there;
    `handle_impossible_answer`: the empty answer is one of them; `align_to_words`: an answer begins and ends
    with words."""

    top_k: int = 1
    topk: int | None = None
    max_answer_len: int = 15
    max_seq_len: int | None = None
    doc_stride: int | None = None
    max_question_len: int = 64
    handle_impossible_answer: bool = False
    align_to_words: bool = True

    def __post_init__(self) -> None:
        if self.topk is not None:
            object.__setattr__(self, "top_k", self.topk)
        for name in ("top_k", "max_answer_len", "max_question_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise RequestError(f"{name} is {value!r}; expected an integer >= 1")


class QuestionAnswering(TextPipeline):
    """A question and the text that holds its answer to `{"score", "start", "end", "answer"}`; `start` and
    `end` are characters of the text. An item is a dict of `question` and `context`, or these two by name,
    each alone or as lists of the same length. A long context is read in windows that overlap."""

    task = "question-answering"
    settings = QuestionSettings

    def __call__(self, inputs: Any = None, question: Any = None, context: Any = None, **options: Any) -> Any:
        if inputs is None:
            inputs = _paired(question, context)
        elif isinstance(inputs, str):  # pipe("Who?", "I.")
            inputs = _paired(inputs, question if context is None else context)
        elif question is not None or context is not None:
            raise RequestError("give inputs, or question and context")
        return super().__call__(inputs, **options)

    def prepare_one(self, item: Any, settings: QuestionSettings) -> list[Piece]:
        if not isinstance(item, Mapping) or not {"question", "context"} <= set(item):
            raise RequestError(f"question-answering takes a dict of question and context, not {item!r}")
        question, context = (as_text(item[name], f"the {name}") for name in ("question", "context"))
        for name, text in (("question", question), ("context", context)):
            if not text.strip():
                raise RequestError(f"the {name} is empty")
        tokenizer = self.tokenizer
        cut = self.encode(
            [question], truncation=True, max_length=settings.max_question_len, add_special_tokens=False
        )
        if cut[0].overflowing:
            question = question[: cut[0].offsets[-1][1]]
        most = min(settings.max_seq_len or 384, tokenizer.model_max_length, self.model.config.context)
        beside = len(cut[0].ids) + tokenizer.num_special_tokens_to_add(pair=True)
        if (room := most - beside) < 1:
            raise RequestError(
                f"max_seq_len is {most}: the question, cut at max_question_len, and special tokens are "
                f"{beside} tokens, which leave no room for the context"
            )
        stride = settings.doc_stride
        stride = min(most // 2, 128, room - 1) if stride is None else stride
        if not 0 <= stride < room:
            raise RequestError(
                f"doc_stride is {stride}; expected 0 to {room - 1}, less than a window's context"
            )
        first = tokenizer.padding_side == "right"  # whether the question comes first
        rows = self.encode(
            [question if first else context],
            [context if first else question],
            truncation="only_second" if first else "only_first",
            max_length=most,
            stride=stride,
            return_overflowing_tokens=True,
        )
        return [self.piece(row, (row, int(first))) for row in rows]

    def compute(self, pieces: Sequence[Piece], settings: QuestionSettings) -> Sequence[tuple[Tensor, Tensor]]:
        output = self.run(pieces)
        starts, ends = self.rows(output.start_logits, pieces), self.rows(output.end_logits, pieces)
        return list(zip(starts, ends, strict=True))

    def finish(
        self,
        item: Any,
        pieces: Sequence[Piece],
        outputs: Sequence[tuple[Tensor, Tensor]],
        settings: QuestionSettings,
    ) -> Any:
        context, found, nothing = item["context"], [], 1.0
        for piece, logits in zip(pieces, outputs, strict=True):
            encoding, which = piece.note
            of_context = torch.tensor([sequence == which for sequence in encoding.sequence_ids])
            # The token of the class, by which some models say that there is no answer, has its share.
            shares = of_context | torch.tensor(
                [token == self.tokenizer.cls_token_id for token in encoding.ids]
            )
            start, end = (one.masked_fill(~shares, -torch.inf).softmax(-1) for one in logits)
            if settings.handle_impossible_answer:
                nothing = min(nothing, float(start[0] * end[0]))
            # Several spans of tokens may be one of words.
            start, end = start * of_context, end * of_context
            spans = _best(start, end, settings.max_answer_len, 8 * settings.top_k)
            for score, begin, last in spans:
                at = _characters(encoding, begin, last, which, settings.align_to_words)
                found.append({"score": score, "start": at[0], "end": at[1], "answer": context[slice(*at)]})
        if settings.handle_impossible_answer:
            found.append({"score": nothing, "start": 0, "end": 0, "answer": ""})
        answers: dict[tuple[int, int], dict[str, Any]] = {}
        for one in sorted(found, key=lambda answer: -answer["score"]):
            answers.setdefault((one["start"], one["end"]), one)  # windows share text
        best = list(answers.values())[: settings.top_k]
        return best[0] if settings.top_k == 1 else best


def _paired(question: Any, context: Any) -> Any:
    """Items of a question and a context, or of lists of them."""
    if question is None or context is None:
        raise RequestError("question-answering needs a question and a context")
    if isinstance(question, str) and isinstance(context, str):
        return {"question": question, "context": context}
    questions = [question] * len(context) if isinstance(question, str) else list(question)
    contexts = [context] * len(questions) if isinstance(context, str) else list(context)
    if len(questions) != len(contexts):
        raise RequestError(
            f"there are {len(questions)} questions and {len(contexts)} contexts; give one each"
        )
    return [{"question": q, "context": c} for q, c in zip(questions, contexts, strict=True)]


def _best(start: Tensor, end: Tensor, longest: int, count: int) -> list[tuple[float, int, int]]:
    """The `count` likeliest spans `(score, first, last)` of at most `longest` tokens, by the chances
    `[tokens]` of each token to be the first and the last."""
    scores = (start[:, None] * end[None, :]).triu().tril(longest - 1)
    best = scores.flatten().topk(min(count, scores.numel()))
    width = len(end)
    return [
        (score, at // width, at % width)
        for score, at in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        if score > 0
    ]


def _characters(encoding: Any, first: int, last: int, which: int, words: bool) -> tuple[int, int]:
    """Where tokens stand in the text: from the beginning of the first one, or of its word, to the end."""
    if words and encoding.word_ids[first] is not None and encoding.word_ids[last] is not None:
        begin = encoding.word_to_chars(encoding.word_ids[first], which)
        end = encoding.word_to_chars(encoding.word_ids[last], which)
        if begin is not None and end is not None:
            return begin[0], end[1]
    return encoding.offsets[first][0], encoding.offsets[last][1]
