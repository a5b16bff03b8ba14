"""Whisper's tokenizer: texts that begin with a language and a task, and tokens that are times."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import processors

from taut.errors import TokenizerError
from taut.tokenizer.checks import one_of, to_python
from taut.tokenizer.languages import code_of
from taut.tokenizer.tokenizer import Tokenizer

CLASSES = ("WhisperTokenizer",)
SETTINGS = ("language", "task", "predict_timestamps")
TASKS = ("transcribe", "translate")
START, END = "<|startoftranscript|>", "<|endoftext|>"
BEFORE, SILENT = "<|startofprev|>", "<|notimestamps|>"
_TIME = re.compile(r"<\|\d+\.\d+\|>")
_WINDOW = 1500  # times of a window


class WhisperTokenizer(Tokenizer):
    """A tokenizer whose texts begin with a start token and, if set, the `language` and the `task`
    ("transcribe" or "translate"), then, unless `predict_timestamps`, the token that says that there are no
    times; they end with the end token. Tokens from `timestamp_begin` on are times, of 0.02 seconds each."""

    _fixed_template = "its texts begin with a language and a task"

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        language: str | None = None,
        task: str | None = None,
        predict_timestamps: bool = False,
        **settings: Any,
    ):
        super().__init__(backend, **settings)
        self.language, self.task, self.predict_timestamps = language, task, bool(predict_timestamps)
        self.set_prefix_tokens()

    def set_prefix_tokens(
        self, language: str | None = None, task: str | None = None, predict_timestamps: bool | None = None
    ) -> None:
        """Change what texts begin with; None: as it is. Raises `RequestError` or `TokenizerError` for what
        the vocabulary hasn't."""
        self.language = self.language if language is None else language.lower()
        self.task = self.task if task is None else task
        if predict_timestamps is not None:
            self.predict_timestamps = predict_timestamps
        names = [self.convert_ids_to_tokens(token) for token in self.prefix_tokens]
        end = self.eos_token or END
        around, pair = [*names, "$A", end], [*names, "$A", "$B:1", f"{end}:1"]
        known = [(name, self._id(name)) for name in dict.fromkeys((*names, end))]
        with self._lock:
            self._backend.post_processor = processors.TemplateProcessing(
                single=around, pair=pair, special_tokens=known
            )

    @property
    def prefix_tokens(self) -> list[int]:
        """What texts begin with."""
        names = [START]
        if self.language is not None:
            names.append(f"<|{code_of(self.language)}|>")
        if self.task is not None:
            names.append(f"<|{one_of('task', self.task, TASKS)}|>")
        if not self.predict_timestamps:
            names.append(SILENT)
        return [self._id(name) for name in names]

    @property
    def timestamp_begin(self) -> int:
        """The token of 0 seconds."""
        return self._id(SILENT) + 1

    def _id(self, token: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None:
            raise TokenizerError(f"{self.name_or_path}: the vocabulary has no {token}, which Whisper's has")
        return found

    def get_decoder_prompt_ids(
        self, task: str | None = None, language: str | None = None, no_timestamps: bool = True
    ) -> list[tuple[int, int]]:
        """`forced_decoder_ids` for `generate`, and the prefix of texts from now on."""
        self.set_prefix_tokens(language=language, task=task, predict_timestamps=not no_timestamps)
        return list(enumerate(self.prefix_tokens))[1:]

    def get_prompt_ids(self, text: str, return_tensors: str | None = "np") -> Any:
        """`prompt_ids` for `generate`: a text that stands before what is said. "np": an array, "pt": a
        tensor, None: a list. Raises `TokenizerError` for a text with special tokens in it."""
        ids = self.encode(" " + text.strip(), add_special_tokens=False)
        special, times = {*self.all_special_ids}, self.timestamp_begin
        bad = next((token for token in ids if token in special or token >= times), None)
        if bad is not None:
            raise TokenizerError(f"a prompt can't have {self.convert_ids_to_tokens(bad)} in it: {text!r}")
        ids = [self._id(BEFORE), *ids]
        one_of("return_tensors", return_tensors, ("np", "pt", None))
        return {"np": np.array, "pt": torch.tensor, None: list}[return_tensors](ids)

    # ---- decoding

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        output_offsets: bool = False,
        time_precision: float = 0.02,
        decode_with_timestamps: bool = False,
    ) -> Any:
        """The text of a row of ids, or of each of several; times are left out, with `decode_with_timestamps`
        they stand in it (`<|1.08|>`), counted on from window to window. With `skip_special_tokens` a prompt
        is left out as well. `output_offsets` gives a dict of `text` and `offsets`: for each piece between two
        times its `text` and its `timestamp`, (start, end) in seconds of `time_precision` a time."""
        ids = to_python(token_ids)
        if isinstance(ids, Mapping):
            ids = to_python(ids.get("input_ids"))
        options = (clean_up_tokenization_spaces, output_offsets, time_precision, decode_with_timestamps)
        if isinstance(ids, (list, tuple)) and ids and isinstance(to_python(ids[0]), (list, tuple)):
            return [self.decode(row, skip_special_tokens, *options) for row in ids]
        ids = list(ids) if isinstance(ids, (list, tuple)) else [ids]
        kept = self._unprompted(ids) if skip_special_tokens else ids
        if decode_with_timestamps:
            text = self._with_times(kept, skip_special_tokens, time_precision)
        else:
            text = self._without_times(kept, skip_special_tokens, clean_up_tokenization_spaces)
        return {"text": text, "offsets": self._offsets(ids, time_precision)} if output_offsets else text

    def batch_decode(self, sequences: Any, *args: Any, **options: Any) -> list[Any]:
        """What `decode` gives of several rows of ids; always a list."""
        found = self.decode(sequences, *args, **options)
        return found if isinstance(found, list) else [found]

    def _without_times(self, ids: Sequence[int], skip: bool = False, clean: bool | None = None) -> str:
        # Older vocabularies end before the times.
        text = super().decode([token for token in ids if token < len(self)], skip, clean)
        return _TIME.sub("", text)

    def _unprompted(self, ids: list[int]) -> list[int]:
        if not ids or ids[0] != self._id(BEFORE):
            return ids
        start = self._id(START)
        return ids[ids.index(start) :] if start in ids else []

    def _with_times(self, ids: Sequence[int], skip: bool, precision: float) -> str:
        """A window begins where a time is less than the one before: behind a whole window if that ended in a
        single time, and otherwise at the end before, from which what follows was said again."""
        begin = self.timestamp_begin
        parts: list[str] = []
        words: list[int] = []
        latest = before = ahead = 0.0

        def close() -> None:
            parts.append(super(WhisperTokenizer, self).decode(words, skip) if words else "")
            words.clear()

        for at, token in enumerate(ids):
            if token < begin:
                words.append(token)
                continue
            close()
            time = float((token - begin) * precision)
            if time < latest:
                if at >= 2 and not (ids[at - 1] >= begin and ids[at - 2] >= begin):
                    ahead += precision * _WINDOW
                else:
                    latest = before
                    ahead += before
                    del parts[-2:]
            before, latest = latest, time
            parts.append(f"<|{time + ahead:.2f}|>")
        close()
        return "".join(parts)

    def _offsets(self, ids: Sequence[int], precision: float) -> list[dict[str, Any]]:
        begin = self.timestamp_begin
        times = [at for at, token in enumerate(ids) if token >= begin]
        ends = [at for at in times if at - 1 in {*times}]
        if len(times) < 2 and not ends:
            return []
        if times[-1] + 1 not in ends:
            ends.append(times[-1] + 1)
        found, first, latest, ahead = [], times[0], 0, 0
        for end in ends:
            piece = ids[first:end]
            if len(piece) > 1:
                start, stop = piece[0] - begin, piece[-1] - begin
                if start < latest:  # another window
                    single = first >= 2 and not (ids[first - 2] >= begin and ids[first - 1] >= begin)
                    ahead += _WINDOW if single else latest
                latest = stop
                seconds = tuple(time * precision + ahead * precision for time in (start, stop))
                found.append({"text": self._without_times(piece), "timestamp": seconds})
            first = end
        return found

    def _saved_settings(self) -> dict[str, Any]:
        return {"tokenizer_class": CLASSES[0], **{name: getattr(self, name) for name in SETTINGS}}
