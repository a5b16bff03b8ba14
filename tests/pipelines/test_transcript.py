"""Transcripts put together of chunks, beside those of transformers' tokenizer for the same tokens."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import pytest
import transformers
from tokenizers import pre_tokenizers

import taut
from taut.pipelines.transcript import Transcript
from tests.pipelines.folders import folder

LANGUAGES = {"en": "english", "fr": "french", "ja": "japanese"}
TEXT = " so the cat said: «bonjour» (or nearly), twice! それから 猫 -- and it's gone."
SECONDS = 30


@functools.cache
def tokenizers(seconds: int = SECONDS) -> tuple[Any, Any]:
    """Taut's and transformers', with timestamps of so many seconds."""
    path = folder() / f"whisper-tokenizer-{seconds}"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("a", "t"), ("Ġ", "c")]
    known = [*letters, *("".join(pair) for pair in merges)]
    made = transformers.WhisperTokenizer({token: index for index, token in enumerate(known)}, merges)
    special = [
        "<|startoftranscript|>",
        *(f"<|{code}|>" for code in LANGUAGES),
        "<|translate|>",
        "<|transcribe|>",
    ]
    special += ["<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    made.add_special_tokens({"additional_special_tokens": special})
    made.add_tokens([f"<|{0.02 * index:.2f}|>" for index in range(50 * seconds + 1)])
    made.save_pretrained(path)
    return taut.AutoTokenizer.from_pretrained(path), transformers.AutoTokenizer.from_pretrained(path)


def spoken(rng: random.Random, text: list[int], first: int, overlap: int) -> list[list[int]]:
    """Tokens of chunks that share some: timestamps in pairs, mistakes, and without an end now and then."""
    chunks, at = [], 0
    while at < len(text):
        size = rng.randint(8, 30)
        words, seconds, out = text[max(at - overlap, 0) : at + size], rng.uniform(0, 2), []
        while words:
            take = rng.randint(2, 12)
            out.append(first + int(seconds / 0.02))
            out += [word if rng.random() > 0.1 else rng.choice(text) for word in words[:take]]
            words, seconds = words[take:], min(seconds + rng.uniform(0.5, 6), SECONDS)
            if words or rng.random() < 0.8:
                out.append(first + int(seconds / 0.02))
        chunks.append(out)
        at += size
    return chunks


@pytest.mark.parametrize("times", [False, True, "word"])
@pytest.mark.parametrize("overlap", [0, 6])
@pytest.mark.filterwarnings("ignore")
def test_chunks_become_the_text_and_times_of_transformers(times, overlap):
    ours, theirs = tokenizers()
    first = ours.convert_tokens_to_ids("<|notimestamps|>") + 1
    codes = [ours.convert_tokens_to_ids(f"<|{code}|>") for code in LANGUAGES]
    for seed in range(60):
        rng = random.Random(seed)
        text = ours.encode(TEXT * rng.randint(1, 3), add_special_tokens=False)
        chunks = spoken(rng, text, first, overlap)
        if not times:
            chunks = [[token for token in chunk if token < first] for chunk in chunks]
        if rng.random() < 0.5:
            chunks = [[rng.choice(codes[: 1 + seed % 3]), *chunk] for chunk in chunks]
        if rng.random() < 0.2:
            prompt = [
                ours.convert_tokens_to_ids(f"<|{name}|>") for name in ("startofprev", "startoftranscript")
            ]
            chunks[0] = [prompt[0], 5, 6, prompt[1], *chunks[0]]
        if rng.random() < 0.2:
            chunks.insert(1, [])
        made = Transcript(ours, LANGUAGES, times=times)
        given = []
        for index, chunk in enumerate(chunks):
            ends = sorted(rng.uniform(0, SECONDS) for _ in chunk)
            left, right = 3.0 * bool(index and overlap), 4.0 * bool(overlap and index + 1 < len(chunks))
            one = {"tokens": np.array([chunk], dtype=np.int64), "token_timestamps": np.array([ends])}
            if overlap:
                one["stride"] = (float(SECONDS), left, right)
            given.append(one)
            made.add(chunk, one.get("stride"), ends if times == "word" else None)
        asked = bool(seed % 2)
        want, more = theirs._decode_asr(
            given, return_timestamps=times, return_language=asked, time_precision=0.02
        )
        assert made.result(language=asked) == {"text": want, **more}, (seed, chunks)


def test_timestamps_that_begin_anew_are_those_of_the_next_window():
    ours, theirs = tokenizers()
    first = ours.convert_tokens_to_ids("<|notimestamps|>") + 1

    def at(seconds: float) -> int:
        return first + round(seconds / 0.02)

    a, b = ours.encode(" the cat", add_special_tokens=False), ours.encode(" gone", add_special_tokens=False)
    for tokens in (
        [at(0), *a, at(4), at(4), *b, at(9), at(9), at(0), *a, at(3)],  # the window ends at a pair
        [at(0), *a, at(4), at(4), *b, at(28), at(1), *a, at(3)],  # and at a single one, with all of it heard
    ):
        made = Transcript(ours, LANGUAGES, times=True)
        made.add(tokens)
        want, more = theirs._decode_asr(
            [{"tokens": np.array([tokens])}],
            return_timestamps=True,
            return_language=None,
            time_precision=0.02,
        )
        assert made.result() == {"text": want, **more}
        assert more["chunks"][-1]["timestamp"][0] >= 9


def test_a_missing_end_is_said():
    ours, _ = tokenizers()
    made = Transcript(ours, LANGUAGES, times=True)
    first = ours.convert_tokens_to_ids("<|notimestamps|>") + 1
    made.add([first, 5, 6])
    with pytest.warns(UserWarning, match="the last timestamp is missing"):
        assert made.result()["chunks"][0]["timestamp"] == (0.0, None)
