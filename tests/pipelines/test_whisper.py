"""Speech recognition by Whisper, beside transformers on the same tiny checkpoint."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from transformers.models.whisper import tokenization_whisper

import taut
from taut.errors import RequestError
from tests.pipelines.folders import write
from tests.pipelines.test_text import same
from tests.pipelines.test_transcript import LANGUAGES, tokenizers

RATE, HOP = 400, 4
WINDOW = 2  # seconds, of which the model writes 100 timestamps
CHUNKED = {"chunk_length_s": 2, "stride_length_s": 0.4, "ignore_warning": True}


def whisper() -> Path:
    """A tiny Whisper that hears two seconds at a time."""
    _, text = tokenizers(WINDOW)

    def token(name: str) -> int:
        return text.convert_tokens_to_ids(f"<|{name}|>")

    config = {
        "vocab_size": len(text), "num_mel_bins": 12, "max_source_positions": 100, "max_target_positions": 60,
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "init_std": 0.6,
        "decoder_start_token_id": token("startoftranscript"), "pad_token_id": text.eos_token_id,
        "bos_token_id": text.eos_token_id, "eos_token_id": text.eos_token_id,
        "suppress_tokens": None, "begin_suppress_tokens": None,
    }  # fmt: skip
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=12, sampling_rate=RATE, hop_length=HOP, chunk_length=WINDOW, n_fft=32
    )
    generation = transformers.GenerationConfig(
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": token(code) for code in LANGUAGES},
        task_to_id={name: token(name) for name in ("transcribe", "translate")},
        no_timestamps_token_id=token("notimestamps"),
        prev_sot_token_id=token("startofprev"),
        max_initial_timestamp_index=50,
        decoder_start_token_id=token("startoftranscript"),
        eos_token_id=text.eos_token_id,
        pad_token_id=text.eos_token_id,
        alignment_heads=[[0, 1], [1, 2]],
        max_length=24,
        return_timestamps=False,
    )
    return write("whisper", "WhisperForConditionalGeneration", config, text, extractor, generation)


@functools.cache
def pipes() -> tuple[Any, Any]:
    return tuple(
        make("automatic-speech-recognition", str(whisper()), device="cpu")
        for make in (taut.pipeline, transformers.pipeline)
    )


def clip(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=int(seconds * RATE)).astype(np.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"generate_kwargs": {"language": "fr", "task": "transcribe"}},
        {"generate_kwargs": {"language": "english", "num_beams": 1}, "return_language": True},
        {"return_timestamps": True, "num_beams": 2},
        CHUNKED | {"return_timestamps": "word", "num_beams": 1},
        CHUNKED | {"return_timestamps": True, "return_language": True, "num_beams": 1},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_results_are_those_of_transformers(options):
    pipe, reference = pipes()
    # Where a window begins behind the sound, transformers gives words other times.
    whole = options.get("return_timestamps") == "word"
    clips = [clip(2.0 if whole else 1.4), clip(3.2 if "chunk_length_s" in options else 2.0, 1)]
    want = [reference(one.copy(), **options) for one in clips]
    assert sum(len(one["text"]) for one in want) > 10
    same(pipe(clips, **options), want)


@pytest.mark.filterwarnings("ignore")
def test_long_speech_goes_on_from_window_to_window(monkeypatch):
    """Whose length transformers takes to be that of the published models."""
    of_30_seconds = tokenization_whisper._decode_asr
    monkeypatch.setattr(
        tokenization_whisper, "_decode_asr", functools.partial(of_30_seconds, segment_size=50 * WINDOW)
    )
    pipe, reference = pipes()
    clips = [clip(4.7), clip(1.1, 1), clip(3.3, 2)]
    want = [reference(one.copy(), num_beams=1, return_timestamps=True) for one in clips]
    same(pipe(clips, num_beams=1, return_timestamps=True), want)
    assert want[2]["chunks"][-1]["timestamp"][0] > WINDOW
    same(pipe(clips[::2], num_beams=1), [{"text": one["text"]} for one in want[::2]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"return_timestamps": "char"},
            "return_timestamps is 'char'; of Whisper there are times of",
        ),
        ({"chunk_length_s": 40}, "chunk_length_s is 40, and the model hears 2 seconds at a time"),
        ({"langauge": "fr"}, "'langauge'; nearest: language"),
        ({"language": "xx"}, "xx"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, message):
    pipe, _ = pipes()
    with pytest.raises(RequestError, match=message):
        pipe(clip(1), **options)
