"""Pipelines of sounds, beside those of transformers on the same tiny checkpoints."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers

import taut
from taut.errors import MediaError, RequestError
from taut.pipelines import ItemError
from taut.processor import resample
from tests.audio import BANDS, FRAMES, LARGE, SPECTROGRAM, SPEECH
from tests.pipelines.folders import folder, write
from tests.pipelines.test_text import same
from tests.speech_seq2seq import BINS, WHISPER

RATE = 800
LABELS = {0: "speech", 1: "music", 2: "noise"}
CALLED = {"id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}
CHARACTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxy"]


@functools.cache
def characters() -> Any:
    path = folder() / "vocab.json"
    path.write_text(json.dumps({token: index for index, token in enumerate(CHARACTERS)}))
    return transformers.Wav2Vec2CTCTokenizer(str(path))


def ctc() -> Path:
    config = {**SPEECH, "initializer_range": 0.5, "pad_token_id": 0}
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE)
    return write("ctc", "Wav2Vec2ForCTC", config, characters(), extractor, seed=3)


def classifier(**options: Any) -> Path:
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE)
    config = {**SPEECH, **CALLED, "initializer_range": 0.3, **options}
    return write(f"sounds-{len(options)}", "HubertForSequenceClassification", config, extractor)


def spectrogram() -> Path:
    config = {**SPECTROGRAM, **CALLED, "initializer_range": 0.3}
    extractor = transformers.ASTFeatureExtractor(num_mel_bins=BANDS, max_length=FRAMES)
    return write("ast", "ASTForAudioClassification", config, extractor)


def whisper() -> Path:
    config = {**WHISPER, **CALLED, "init_std": 0.3, "max_source_positions": 40}
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=BINS, sampling_rate=RATE, chunk_length=4, hop_length=40, n_fft=100
    )
    return write("whisper-labels", "WhisperForAudioClassification", config, extractor)


@functools.cache
def clips(rate: int = RATE) -> list[np.ndarray]:
    """Noise that swells and falls, of several lengths."""
    found = []
    for index, seconds in enumerate((2.0, 0.7, 1.3)):
        at = np.arange(int(seconds * rate)) / rate
        noise = np.random.default_rng(index).normal(size=len(at))
        found.append((0.3 * noise * (1 + np.sin(5 * (index + 1) * at))).astype(np.float32))
    return found


@functools.cache
def files() -> list[str]:
    """`clips` as files."""
    paths = [str(folder() / f"{index}.wav") for index in range(len(clips()))]
    for path, clip in zip(paths, clips(), strict=True):
        soundfile.write(path, clip, RATE, subtype="FLOAT")
    return paths


@pytest.mark.parametrize(
    ("task", "source", "options"),
    [
        ("audio-classification", classifier, {}),
        ("audio-classification", functools.partial(classifier, **LARGE), {"top_k": 2}),
        ("audio-classification", spectrogram, {"function_to_apply": "sigmoid"}),
        ("audio-classification", whisper, {}),
        ("automatic-speech-recognition", ctc, {}),
        ("automatic-speech-recognition", ctc, {"return_timestamps": "char"}),
        ("automatic-speech-recognition", ctc, {"return_timestamps": "word"}),
        ("automatic-speech-recognition", ctc, {"chunk_length_s": 0.5}),
        (
            "automatic-speech-recognition",
            ctc,
            {"chunk_length_s": 0.6, "stride_length_s": (0.2, 0.1), "return_timestamps": "word"},
        ),
    ],
    ids=lambda value: getattr(value, "__name__", str(value))[:40],
)
def test_results_are_those_of_transformers(task, source, options, tmp_path):
    pipe, reference = (
        make(task, str(source()), device="cpu") for make in (taut.pipeline, transformers.pipeline)
    )
    rate = pipe.feature_extractor.sampling_rate
    sounds = clips(rate)
    want = [reference(clip.copy(), **options) for clip in sounds]
    assert task == "audio-classification" or len(want[0]["text"]) > 5
    same(pipe(sounds, **options), want)
    same(pipe(sounds[1], **options), want[1])
    same(list(pipe(iter(sounds), batch_size=2, **options)), want)
    same(pipe(torch.from_numpy(sounds[1]), **options), want[1])
    same(pipe(np.stack([sounds[1]] * 2), **options), want[1])
    same(pipe({"raw": sounds[2], "sampling_rate": rate}, **options), want[2])
    soundfile.write(tmp_path / "sound.wav", sounds[0], rate, subtype="FLOAT")
    same(pipe(tmp_path / "sound.wav", **options), want[0])
    same(pipe((tmp_path / "sound.wav").read_bytes(), **options), want[0])


def test_a_dict_may_have_a_stride_and_more_and_another_rate():
    pipe, reference = (
        make("automatic-speech-recognition", str(ctc()), device="cpu")
        for make in (taut.pipeline, transformers.pipeline)
    )
    item = {"raw": clips()[0], "sampling_rate": RATE, "stride": (200, 120), "partial": False}
    want = reference(dict(item))
    same(pipe(item), want)
    assert want["partial"] == [False] and item["stride"] == (200, 120)
    twice = np.repeat(clips()[0], 2)
    got = pipe({"array": twice, "sampling_rate": 2 * RATE, "stride": (400, 240), "path": None})
    same(got, {"text": pipe({**item, "raw": resample(twice, 2 * RATE, RATE)})["text"]})
    with pytest.raises(RequestError, match=r"stride is \(1500, 1500\), and the sound has 1600 samples"):
        pipe({**item, "stride": (1500, 1500)})


def test_a_damaged_sound_among_several_is_an_error_in_its_place(tmp_path):
    pipe = taut.pipeline(model=ctc(), device="cpu")
    assert pipe.task == "automatic-speech-recognition" and pipe.tokenizer and pipe.feature_extractor
    (tmp_path / "cut.wav").write_bytes(b"RIFF....WAVE")
    sounds = [
        clips()[0],
        tmp_path / "cut.wav",
        clips()[1],
        np.zeros(3, np.float32),
        "missing.wav",
        clips()[2],
    ]
    with pytest.warns(UserWarning) as caught:
        got = pipe(sounds)
    assert [index for index, one in enumerate(got) if isinstance(one, ItemError)] == [1, 3, 4]
    same([got[0], got[2], got[5]], pipe(clips()))
    said = " ".join(str(one.message) for one in caught)
    assert "cut.wav is not a sound" in said and "missing.wav: no such file" in said and "3 samples" in said
    with pytest.raises(MediaError, match="no such file"):
        pipe("missing.wav")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_timestamps": True}, "return_timestamps is True; .* 'char' and 'word'"),
        ({"chunk_length_s": 1, "stride_length_s": 0.6}, "a chunk has to be longer"),
        ({"chunk_length": 1}, "no option 'chunk_length'; nearest: chunk_length_s"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, message):
    with pytest.raises(RequestError, match=message):
        taut.pipeline(model=ctc(), device="cpu")(clips()[0], **options)
    with pytest.raises(MediaError, match=r"two channels at most, and this array is \[3, 4\]"):
        taut.pipeline(model=classifier(), device="cpu")(np.zeros((3, 4), np.float32))


def test_heads_of_sounds_and_of_texts_are_not_mistaken():
    assert taut.pipeline(model=whisper(), device="cpu").task == "audio-classification"
    assert taut.pipeline(model=classifier(), device="cpu").task == "audio-classification"
    with pytest.raises(
        RequestError, match="no head for automatic-speech-recognition; its tasks: audio-class"
    ):
        taut.pipeline("automatic-speech-recognition", classifier())
    with pytest.raises(RequestError, match=r"no head for automatic-speech-rec.*; its tasks: audio-class"):
        taut.pipeline("automatic-speech-recognition", whisper())
    with pytest.raises(RequestError, match="no head for text-classification; its tasks: audio-class"):
        taut.pipeline("text-classification", classifier())
