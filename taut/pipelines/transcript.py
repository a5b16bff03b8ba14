"""What Whisper wrote of a sound, chunk by chunk, as one text with its times (Radford et al. 2022)."""

from __future__ import annotations

import string
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Languages whose words no space divides.
UNSPACED = ("chinese", "japanese", "thai", "lao", "myanmar", "cantonese")
# Marks that belong to the word behind them, and to the word before.
OPENING = "\"'“¡¿([{-"
CLOSING = "\"'.。,\uff0c!\uff01?\uff1f:\uff1a”)]}、"


@dataclass
class Part:
    """Tokens of a text and, where words have times, the seconds `(begin, end)` of each."""

    tokens: list[int] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)


class Transcript:
    """Puts together what a model wrote of the chunks of a sound.

    `times`: False for the text alone, True for those of its segments, which the model writes between
    timestamp tokens of `precision` seconds, or "word". `languages`: the name of each language by its code.
    Where chunks overlap, what both wrote is found by the tokens that they share; the first half of it is
    taken from the one before, the second from the one behind.
    """

    def __init__(
        self,
        tokenizer: Any,
        languages: Mapping[str, str],
        *,
        times: bool | str = False,
        precision: float = 0.02,
        window: int = 1500,
    ):
        self.tokenizer, self.times, self.precision = tokenizer, times, precision
        self.window = window * precision  # seconds that the model hears at a time
        self.first = tokenizer.convert_tokens_to_ids("<|notimestamps|>") + 1
        self.special = set(tokenizer.all_special_ids)
        codes = {tokenizer.convert_tokens_to_ids(f"<|{code}|>"): name for code, name in languages.items()}
        self.languages = {i: name for i, name in codes.items() if i not in (None, tokenizer.unk_token_id)}
        self.segments: list[dict[str, Any]] = []
        self.language: str | None = None  # of what comes next
        self.said: str | None = None  # of the segment under way
        self.bounds: list[float | None] = [None, None]
        self.pending: list[Part] = []  # what chunks wrote of the segment under way
        self.offset, self.skipping = 0.0, False

    def add(
        self,
        tokens: Sequence[int],
        cut: tuple[float, float, float] | None = None,
        ends: Sequence[float] | None = None,
        language: int | None = None,
    ) -> None:
        """What the model wrote of the next chunk. `cut`: its seconds, and how many of them at its left and
        right end are those of other chunks too; `ends`: the second in which each token ends; `language`: the
        token of its language, where it isn't among them."""
        tokens, current, clock = self._answer(tokens), Part(), _Clock(self.window)
        if language is not None:
            current = self._speaks(self.languages[language], current)
        least, most = float(self.first), None
        if cut is not None:
            length, left, right = cut
            self.offset -= left
            least = left / self.precision + self.first if left else least
            most = self._in_overlap(tokens, length - right) if right else None
        for index, token in enumerate(tokens):
            if token >= self.first:
                seconds = float((token - self.first) * self.precision)
                before = [one >= self.first for one in tokens[max(index - 2, 0) : index]]
                clock.turn(seconds, single=len(before) == 2 and not all(before))
                at = round(seconds + self.offset + clock.passed, 2)
                if most and token >= most:
                    self.skipping = (
                        True  # it comes with another, which begins what the next chunk knows better
                    )
                elif self.skipping or (self.pending and token < least):
                    self.skipping = False
                elif self.bounds[0] is None:
                    self.bounds[0] = at
                elif at != self.bounds[0]:
                    self.bounds[1] = at
                    self.pending.append(current)
                    self._end()
                    current = Part()
            elif token in self.languages:
                current = self._speaks(self.languages[token], current)
            elif token not in self.special:
                if ends is not None:
                    begin = ends[index - 1] if index else 0.0
                    current.spans.append((round(begin + self.offset, 2), round(ends[index] + self.offset, 2)))
                current.tokens.append(token)
        if cut is not None:
            self.offset += cut[0] - cut[2]
        if current.tokens:
            self.pending.append(current)
        elif not any(part.tokens for part in self.pending):
            self._begin()

    def result(self, *, language: bool = False) -> dict[str, Any]:
        """`{"text"}`, and where there are times or `language` is to be said `chunks`, `[{"text", "timestamp",
        "language"}]`."""
        if self.pending:
            if self.times:
                warnings.warn(
                    "the last timestamp is missing, as where a sound is cut off; its chunk has no end",
                    stacklevel=3,
                )
            self._end()
        text = "".join(segment["text"] for segment in self.segments)
        if not self.times and not language:
            return {"text": text}
        chunks = []
        for segment in self.segments:
            named = {"language": segment["language"]} if language else {}
            if self.times == "word":
                chunks += [{**word, **named} for word in segment["words"]]
            else:
                timed = {"timestamp": segment["timestamp"]} if self.times else {}
                chunks.append({"text": segment["text"], **timed, **named})
        return {"text": text, "chunks": chunks}

    def _answer(self, tokens: Sequence[int]) -> list[int]:
        """Tokens without the text that the model was prompted with."""
        tokens = list(tokens)
        start, prompt = (
            self.tokenizer.convert_tokens_to_ids(f"<|{name}|>")
            for name in ("startoftranscript", "startofprev")
        )
        if not tokens or tokens[0] != prompt:
            return tokens
        return tokens[tokens.index(start) :] if start in tokens else []

    def _in_overlap(self, tokens: Sequence[int], begin: float) -> int | None:
        """The first of the timestamps at the end that lie in what the next chunk hears too, from `begin` on;
        the last timestamp of all is taken to."""
        found = None
        for token in reversed(tokens):
            if token >= self.first:
                if found is not None and (token - self.first) * self.precision < begin:
                    break
                found = token
        return found

    def _speaks(self, language: str, current: Part) -> Part:
        """Goes on in a language; without times, another one begins a segment."""
        if self.language and language != self.language and not self.times:
            self.pending.append(current)
            self._end()
            current = Part()
        self.language = self.said = language
        return current

    def _begin(self) -> None:
        self.bounds, self.pending, self.said = [None, None], [], self.language

    def _end(self) -> None:
        """Ends the segment under way."""
        whole = joined(self.pending)
        segment = {
            "text": self.tokenizer.decode(whole.tokens),
            "timestamp": tuple(self.bounds),
            "language": self.said,
        }
        if self.times == "word":
            segment["words"] = [
                {"text": text, "timestamp": (whole.spans[places[0]][0], whole.spans[places[-1]][1])}
                for text, places in words(self.tokenizer, whole.tokens, self.language)
            ]
        self.segments.append(segment)
        self._begin()


class _Clock:
    """The seconds before the window that timestamps of one output are in: they begin anew with each."""

    def __init__(self, window: float):
        self.window, self.passed, self.latest, self.before = window, 0.0, 0.0, 0.0

    def turn(self, seconds: float, *, single: bool) -> None:
        """The next timestamp; `single`: the one before it ended its window alone, of which all was heard."""
        if seconds < self.latest:
            if single:
                self.passed += self.window
            else:
                self.latest = self.before
                self.passed += self.before
        self.before, self.latest = self.latest, seconds


def joined(parts: Sequence[Part]) -> Part:
    """What parts that overlap say together."""
    whole, left = Part(), parts[0]
    for right in parts[1:]:
        end, begin = _middle(left, right)
        whole.tokens += left.tokens[:end]
        whole.spans += left.spans[:end]
        left = Part(right.tokens[begin:], right.spans[begin:])
    return Part(whole.tokens + left.tokens, whole.spans + left.spans)


def _middle(left: Part, right: Part) -> tuple[int, int]:
    """Where to leave a part for the next one: in the middle of where they agree best, of all ways to lay the
    end of the one over the beginning of the other; in at least two tokens, and the longer the better."""
    a, b = np.array(left.tokens), np.array(right.tokens)
    best, found = 0.0, (len(a), 0)
    for shift in range(1, len(a) + len(b)):
        of_a = slice(max(0, len(a) - shift), min(len(a), len(a) + len(b) - shift))
        of_b = slice(max(0, shift - len(a)), min(len(b), shift))
        same = a[of_a] == b[of_b]
        if left.spans:
            pairs = zip(left.spans[of_a], right.spans[of_b], strict=True)
            same &= np.array([early <= late for early, late in pairs], dtype=bool)
        count = int(same.sum())
        score = count / shift + shift / 10000.0
        if count > 1 and score > best:
            best, found = score, ((of_a.start + of_a.stop) // 2, (of_b.start + of_b.stop) // 2)
    return found


def words(tokenizer: Any, tokens: Sequence[int], language: str | None) -> list[tuple[str, list[int]]]:
    """The words of tokens, each with the places of its tokens, and with the marks that belong to it."""
    found: list[tuple[str, list[int]]] = []
    spaced = (language or getattr(tokenizer, "language", None)) not in UNSPACED
    for text, places in _characters(tokenizer, tokens):
        apart = text.startswith(" ") or text.strip() in string.punctuation
        apart = apart or tokens[places[0]] >= tokenizer.eos_token_id
        if spaced and found and not apart:
            found[-1] = found[-1][0] + text, found[-1][1] + places
        else:
            found.append((text, places))
    kept: list[tuple[str, list[int]]] = []
    for text, places in reversed(found):
        if kept and text.startswith(" ") and text.strip() in OPENING:
            kept[-1] = text + kept[-1][0], places + kept[-1][1]
        else:
            kept.append((text, places))
    found = []
    for text, places in reversed(kept):
        if found and not found[-1][0].endswith(" ") and text in CLOSING:
            found[-1] = found[-1][0] + text, found[-1][1] + places
        else:
            found.append((text, places))
    return found


def _characters(tokenizer: Any, tokens: Sequence[int]) -> Iterator[tuple[str, list[int]]]:
    """The smallest runs of tokens that are whole characters."""
    whole, places, read = tokenizer.decode(tokens), [], 0
    for place in range(len(tokens)):
        places.append(place)
        text = tokenizer.decode([tokens[one] for one in places])
        broken = read + text.index("\ufffd") if "\ufffd" in text else None
        if broken is None or broken >= len(whole) or whole[broken] == "\ufffd":
            yield text, places
            read += len(text)
            places = []
