"""Feature extractors against transformers', on sounds of every kind that programs pass."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from transformers.audio_utils import load_audio

from taut import AutoFeatureExtractor, processor
from taut.errors import ConfigError, MediaError
from tests.processor.media import sound, sound_bytes

KINDS = {
    "wave": ("Wav2Vec2FeatureExtractor", {}),
    "wave-as-it-is": ("Wav2Vec2FeatureExtractor", {"do_normalize": False, "return_attention_mask": True}),
    # Its normalisation takes padding to be on the right.
    "wave-left": (
        "Wav2Vec2FeatureExtractor",
        {"padding_side": "left", "return_attention_mask": True, "do_normalize": False},
    ),
    "whisper": ("WhisperFeatureExtractor", {"chunk_length": 2}),
    "whisper-large": ("WhisperFeatureExtractor", {"feature_size": 128, "chunk_length": 1, "n_fft": 512}),
    "spectrogram": ("ASTFeatureExtractor", {"max_length": 90, "num_mel_bins": 64}),
    "spectrogram-small": (
        "ASTFeatureExtractor",
        {"num_mel_bins": 40, "max_length": 200, "mean": -3.0, "std": 2.0},
    ),
}
CLIPS = [sound(n, seed=n) for n in (16000, 4321, 20000)]


def pair(kind: str, settings: dict, tmp_path):
    theirs = getattr(transformers, kind)(**settings)
    theirs.save_pretrained(tmp_path)
    return theirs, AutoFeatureExtractor.from_pretrained(tmp_path)


def same(got, want, bound: float = 2e-5) -> None:
    assert got.keys() == want.keys()
    for name, values in want.items():
        assert len(got[name]) == len(values)
        for one, other in zip(got[name], values, strict=True):
            assert np.asarray(one).dtype == np.asarray(other).dtype
            assert np.abs(np.asarray(one) - np.asarray(other)).max() <= bound


@pytest.mark.parametrize(("kind", "settings"), KINDS.values(), ids=KINDS)
def test_features_equal_the_oracles(kind, settings, tmp_path):
    theirs, ours = pair(kind, settings, tmp_path)
    assert ours.unused == ()
    for clip in (
        *CLIPS,
        CLIPS[0].tolist(),
        CLIPS[1].astype(np.float64),
        [CLIPS[2]],
        np.stack([CLIPS[0]] * 2),
    ):
        same(ours(clip, sampling_rate=16000), theirs(clip, sampling_rate=16000, return_tensors="np"))
    tensor = torch.from_numpy(CLIPS[0])
    same(ours(tensor, sampling_rate=16000), theirs(CLIPS[0], sampling_rate=16000))


@pytest.mark.parametrize(
    "options",
    [
        {"padding": True},
        {"padding": "max_length", "max_length": 9000, "truncation": True},
        {"padding": True, "pad_to_multiple_of": 1000, "truncation": True, "max_length": 10100},
        {"padding": True, "return_attention_mask": True, "truncation": False},
    ],
    ids=["longest", "cut", "multiple", "mask"],
)
@pytest.mark.parametrize("name", ["wave-as-it-is", "wave-left", "whisper", "whisper-large"])
def test_padding_equals_the_oracles(name, options, tmp_path):
    theirs, ours = pair(*KINDS[name], tmp_path)
    options = options | {"sampling_rate": 16000, "return_tensors": "np"}
    same(ours(CLIPS, **options), theirs(CLIPS, **options))
    if name.startswith("whisper"):
        want = theirs(CLIPS, do_normalize=True, **options)["input_features"]  # beside a mask in samples
        got = ours(CLIPS, do_normalize=True, **options)["input_features"]
        same({"input_features": got}, {"input_features": want})


def test_a_padded_clip_is_what_it_is_alone(tmp_path):
    """Without a mask transformers normalises clips together with their padding; here none touches them."""
    _, ours = pair("Wav2Vec2FeatureExtractor", {}, tmp_path)
    alone = [ours(clip, sampling_rate=16000)["input_values"][0] for clip in CLIPS]
    batch = ours(CLIPS, sampling_rate=16000, padding=True, return_tensors="pt")
    for row, mask, want in zip(batch.input_values, batch.attention_mask.bool(), alone, strict=True):
        assert torch.equal(row[mask], torch.from_numpy(want)) and (row[~mask] == 0).all()
    assert "attention_mask" not in ours(CLIPS[0], sampling_rate=16000, padding=True)
    assert "attention_mask" not in ours(CLIPS, sampling_rate=16000, padding=True, return_attention_mask=False)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_files_equal_the_oracles_reading(kind, tmp_path):
    _, ours = pair("Wav2Vec2FeatureExtractor", {"do_normalize": False}, tmp_path)
    for rate in (16000, 8000, 44100):
        stereo = np.stack([sound(rate // 2, rate), sound(rate // 2, rate, seed=1)], 1)
        path = tmp_path / f"sound.{kind.lower()}"
        path.write_bytes(content := sound_bytes(stereo, rate, kind))
        want = load_audio(str(path), 16000, backend="soundfile")
        for source in (path, str(path), content):
            assert np.array_equal(ours(source)["input_values"][0], want)
        loaded = {"array": load_audio(str(path), rate, backend="soundfile"), "sampling_rate": rate}
        assert np.allclose(ours([loaded])["input_values"][0], want, atol=1e-6)


def test_resampling_keeps_a_tone_and_drops_what_the_rate_can_not_hold():
    at = np.arange(48000) / 48000
    tone, hiss = np.sin(2 * np.pi * 1000 * at), np.sin(2 * np.pi * 15000 * at)
    got = processor.resample((tone + hiss).astype(np.float32), 48000, 16000)
    assert len(got) == 16000
    assert np.abs(got - tone[::3])[500:-500].max() < 1e-3


def test_older_files_and_saving(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "hubert"}')
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}))
    ours = AutoFeatureExtractor.from_pretrained(tmp_path)
    ours.changed({"do_normalize": False}).save_pretrained(tmp_path / "saved")
    for reader in (transformers.AutoFeatureExtractor, AutoFeatureExtractor):
        again = reader.from_pretrained(tmp_path / "saved")
        got = again(CLIPS[0], sampling_rate=16000, return_tensors="np")["input_values"]
        assert np.array_equal(got[0], CLIPS[0])


WAV = sound_bytes(CLIPS[1], 16000)
BAD = {
    "not-a-sound": (b"hello", r"5 bytes is not a sound that soundfile can read \(wav, flac, ogg or mp3\)"),
    "no-file": ("nowhere/a.wav", "nowhere/a.wav: no such file"),
    "no-samples": (sound_bytes(CLIPS[1][:0], 16000), "no samples"),
    "nothing": (np.zeros(0), "no samples"),
    "nan": (np.array([0.0, np.nan, 1.0]), "sample 1 of the sound is nan"),
    "stereo": (np.zeros((2, 3, 4)), r"one channel, \[samples\], and this array is \[2, 3, 4\]"),
    "folder": (".", r"\.: a folder, not a file"),
    "address": ("http://127.0.0.1:1/a.wav", "http://127.0.0.1:1/a.wav can't be downloaded"),
    "dict": ({"array": CLIPS[0], "raw": None}, "this one has array$"),
    "rate": ({"array": CLIPS[0], "sampling_rate": 0}, "sampling_rate is 0; expected samples a second"),
    "kind": (object(), "not object"),
    "number": (3, "a sound is a path, an address, bytes, .* not int"),
}


@pytest.mark.parametrize(
    "extractor", ["Wav2Vec2FeatureExtractor", "WhisperFeatureExtractor", "ASTFeatureExtractor"]
)
@pytest.mark.parametrize(("bad", "message"), BAD.values(), ids=BAD)
def test_a_bad_sound_is_named_and_the_others_can_go_on(bad, message, extractor):
    ours = getattr(processor, extractor)()
    with pytest.raises(MediaError, match=message):
        ours(bad, sampling_rate=16000)
    with pytest.raises(MediaError, match=r"sounds\[1\]: ") as among:
        ours([WAV, bad, WAV], sampling_rate=16000)
    assert among.value.index == 1


def test_what_can_not_be_asked_for_is_named():
    wave = processor.Wav2Vec2FeatureExtractor()
    with pytest.raises(
        MediaError, match=r"sampling_rate is 44100, and the model was trained at 16000 Hz.*resample"
    ):
        wave(CLIPS[0], sampling_rate=44100)
    with pytest.raises(MediaError, match="the items of input_values have different shapes"):
        wave(CLIPS, sampling_rate=16000, return_tensors="pt")
    with pytest.raises(MediaError, match="padding is 'left'; known: True, False"):
        wave(CLIPS, sampling_rate=16000, padding="left")
    with pytest.raises(MediaError, match="truncation=True needs max_length="):
        wave(CLIPS, sampling_rate=16000, truncation=True)
    with pytest.raises(MediaError, match="too few for a frame of 400"):
        processor.ASTFeatureExtractor()(CLIPS[0][:300], sampling_rate=16000)
    with pytest.raises(ConfigError, match="'feature_size' is 2, which is not supported"):
        processor.Wav2Vec2FeatureExtractor(feature_size=2)
    with pytest.warns(UserWarning, match="taken to be sounds at 16000 Hz"):
        wave(CLIPS[0])


def test_no_damage_does_anything_but_an_error_of_ours():
    ours, generator = processor.Wav2Vec2FeatureExtractor(), np.random.default_rng(0)
    for kind in ("WAV", "FLAC", "OGG", "MP3"):
        whole = np.frombuffer(sound_bytes(CLIPS[1], 16000, kind), np.uint8)
        for _ in range(25):
            damaged = whole[: generator.integers(1, len(whole) + 1)].copy()
            places = generator.integers(0, min(len(damaged), 60), 3)  # in the header
            damaged[places] = generator.integers(0, 256, 3)
            try:
                assert np.isfinite(ours(damaged.tobytes())["input_values"][0]).all()
            except MediaError:
                continue
