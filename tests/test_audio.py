"""What every audio encoder must pass, from the table in `audio.py`, on the CPU and, marked `gpu`, on a GPU.

Speech of several lengths is compared with the oracle's of each clip alone, which is what a padded batch must
give: transformers' own batches let padding into the norm of the first convolution.
"""

from __future__ import annotations

import json
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import soundfile
import torch
import transformers
from safetensors.torch import load_file, save_file

import taut
from taut import weights
from taut.errors import ConfigError, RequestError
from taut.models import families, family, kind
from tests.audio import BANDS, CASES, FRAMES, SPEECH, VOCAB, with_processor
from tests.families import Case, checkpoint, oracle
from tests.test_encoders import distance, fields, luck
from tests.test_families import close, every_device

CTC, CLASSIFIER = "AutoModelForCTC", "AutoModelForAudioClassification"
BY_NAME = {case.name: case for case in CASES}
SPOKEN = [case for case in CASES if case.base is SPEECH]
MODELS = [
    (case, head)
    for case in CASES
    for head in ("AutoModel", CTC, CLASSIFIER)
    if head != CTC or case.base is SPEECH
]
LENGTHS = (301, 97, 214)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_spoken = pytest.mark.parametrize("case", SPOKEN, ids=str)
every_model = pytest.mark.parametrize(("case", "head"), MODELS, ids=str)
some = pytest.mark.parametrize("case", [BY_NAME[n] for n in ("wav2vec2", "wavlm", "ast")], ids=str)


def load(case: Case, head: str = "AutoModel", device: str = "cpu", dtype=torch.float32, **options):
    return getattr(taut, head).from_pretrained(checkpoint(case, head), dtype=dtype, device=device, **options)


def clips(*lengths: int, device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(length, generator=generator).to(device) for length in lengths]


def padded(sounds: list[torch.Tensor], left: bool = False) -> dict[str, torch.Tensor]:
    """Clips in one tensor; padding isn't silent."""
    longest = max(map(len, sounds))
    values = sounds[0].new_full((len(sounds), longest), 7.0)
    mask = values.new_zeros(values.shape, dtype=torch.long)
    for row, sound in enumerate(sounds):
        at = slice(longest - len(sound), None) if left else slice(len(sound))
        values[row, at], mask[row, at] = sound, 1
    return {"input_values": values, "attention_mask": mask}


def sounds(case: Case, device: str = "cpu") -> list[torch.Tensor]:
    """Three inputs of one clip each."""
    if case in SPOKEN:
        return [clip[None] for clip in clips(*LENGTHS, device=device)]
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, FRAMES, BANDS, generator=generator).to(device) for _ in range(3)]


def together(case: Case, given: list[torch.Tensor], left: bool = False) -> dict[str, torch.Tensor]:
    if case in SPOKEN:
        return padded([sound[0] for sound in given], left)
    return {"input_values": torch.cat(given)}


def own(name: str, batched: torch.Tensor, row: int, alone: torch.Tensor) -> torch.Tensor:
    """Of a batch's tensor, what belongs to a row that alone has the shape of `alone`."""
    return batched[row][tuple(slice(size) for size in alone.shape[1:])]


def labels_of(head: str, device: str = "cpu") -> torch.Tensor:
    found = torch.tensor([[4, 9, 9, 28, 5], [8, -100, -100, -100, -100], [1, 2, 6, -100, -100]])
    return (found if head == CTC else torch.tensor([1, 0, 1])).to(device)


def test_every_audio_encoder_is_in_the_table():
    kinds = ("spectrogram encoder", "speech encoder")
    found = {load(case).config.model_type.replace("-", "_") for case in CASES}
    assert found == {n for n in families() if kind(family(n)) in kinds}


@every_device
@every_model
@torch.no_grad()
def test_every_output_equals_the_oracles_alone_and_together(case, head, device):
    model, reference = load(case, head, device), oracle(case, device=device, auto=head)
    given, asked = sounds(case, device), {"output_hidden_states": True, "output_attentions": True}
    batches = [fields(model(**together(case, given, left), **asked)) for left in (False, True)]
    fused = fields(model(**together(case, given)))
    for row, sound in enumerate(given):
        want, got = fields(reference(sound, **asked)), fields(model(sound, **asked))
        assert list(got) == list(want) == list(batches[0])
        for name, expected in want.items():
            if case.family == "WavLM" and "attentions" in name:  # there the mean of all heads
                close(got[name].mean(1).cpu(), expected[:, 0].cpu())
                continue
            close(got[name].cpu(), expected.cpu())
            for batch in batches if "attentions" not in name else batches[:1]:
                close(own(name, batch[name], row, expected).cpu(), expected[0].cpu())
            if name in fused:
                close(own(name, fused[name], row, expected).cpu(), expected[0].cpu())


@every_spoken
@torch.no_grad()
def test_padding_is_empty_and_read_as_nothing(case):
    given = padded(clips(*LENGTHS))
    frames = load(case).model.feature_extractor.frames
    hidden = load(case)(**given).last_hidden_state
    scores = load(case, CTC)(**given).logits
    blank = load(case, CTC).config.pad_token_id
    assert hidden.shape[1] == scores.shape[1] == frames(LENGTHS[0])
    ratio = oracle(case, auto="AutoModel").config.inputs_to_logits_ratio
    assert load(case).config.inputs_to_logits_ratio == ratio == 12
    for row, length in enumerate(LENGTHS):
        assert not hidden[row, frames(length) :].any()
        assert (scores[row, frames(length) :].argmax(-1) == blank).all()
        assert frames(length) == oracle(case, auto="AutoModel")._get_feat_extract_output_lengths(length)


@every_device
@pytest.mark.parametrize(
    ("case", "head"), [m for m in MODELS if m[1] != "AutoModel" or m[0] in SPOKEN], ids=str
)
def test_loss_and_gradients_equal_the_oracles(case, head, device, tmp_path):
    model, reference = load(case, head, device), oracle(case, device=device, auto=head)
    given, labels = sounds(case, device), labels_of(head, device)
    if head == "AutoModel":
        ours = model(**together(case, given)).last_hidden_state.square().sum()
        theirs = sum(reference(sound).last_hidden_state.square().sum() for sound in given)
    else:
        ours = model(**together(case, given), labels=labels).loss
        losses = [reference(s, labels=labels[i : i + 1]).loss for i, s in enumerate(given)]
        summed = head == CTC and model.config.heads.ctc.reduction == "sum"
        theirs = sum(losses) / (1 if summed else 3)
    close(ours.detach(), theirs.detach(), 1e-4)
    ours.backward()
    theirs.backward()
    with torch.no_grad():
        for param in (*model.parameters(), *reference.parameters()):
            param.copy_(torch.zeros_like(param) if param.grad is None else param.grad)
    reference.save_pretrained(tmp_path)  # so that saving gives gradients under the files' names
    got = {tensor.name: tensor.read().cpu() for tensor in weights.store(model, model.rules())}
    want = load_file(tmp_path / "model.safetensors")
    floor = 1e-2 * max(grad.abs().max() for grad in want.values())
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        assert (got[name] - gradient).abs().max() <= 5e-4 * max(gradient.abs().max(), floor), name


@some
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_every_attention_implementation_agrees(case, implementation):
    given = together(case, sounds(case))
    want = load(case, CLASSIFIER)(**given).logits
    close(load(case, CLASSIFIER, attn_implementation=implementation)(**given).logits, want)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cpu", torch.bfloat16)]
    + [pytest.param("cuda", kind, marks=pytest.mark.gpu) for kind in (torch.bfloat16, torch.float16)],
    ids=str,
)
@every_model
@torch.no_grad()
def test_half_precision_rounds_no_worse_than_twice_the_oracle(case, head, device, dtype):
    name = "last_hidden_state" if head == "AutoModel" else "logits"
    exact, errors = oracle(case, device=device, auto=head), []
    for model in (load(case, head, device, dtype), oracle(case, dtype, device, auto=head)):
        given = sounds(case, device)
        errors.append(distance([(model(s.to(dtype))[name], exact(s)[name]) for s in given]))
    assert errors[0] <= 2 * errors[1] + luck(head)


@every_model
def test_save_is_byte_identical_and_transformers_reads_it(case, head, tmp_path):
    model = load(case, head)
    assert model.config.unused == () and not model.load_report.fresh
    model.save_pretrained(tmp_path / "once")
    class_ = getattr(taut, model.architecture())  # the family's own class loads it as well
    class_.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    saved, original = (
        load_file(f / "model.safetensors") for f in (tmp_path / "once", checkpoint(case, head))
    )
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)
    theirs, info = getattr(transformers, head).from_pretrained(tmp_path / "once", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(theirs).__name__ == model.architecture()


@every_case
def test_a_new_head_for_other_labels_is_initialised_and_nothing_else_is_missing(case):
    whole = checkpoint(case, "AutoModel")
    with pytest.warns(UserWarning, match="classifier"):
        model = taut.AutoModelForAudioClassification.from_pretrained(whole, num_labels=5)
    found = model(**together(case, sounds(case))).logits
    assert found.shape == (3, 5) and found.isfinite().all()
    assert all(name.startswith(model.head) for name in model.load_report.fresh)
    # And back: a classifier's checkpoint without its head.
    headless = taut.AutoModel.from_pretrained(checkpoint(case, CLASSIFIER))
    for sound in sounds(case):
        want = oracle(case, auto=CLASSIFIER)(sound, output_hidden_states=True).hidden_states
        got = headless(sound, output_hidden_states=True).hidden_states
        for state, expected in zip(got, want, strict=True):
            close(state.detach(), expected.detach())


@every_case
def test_a_new_model_computes_as_well_as_one_of_the_oracles(case, tmp_path):
    config = json.loads((checkpoint(case, "AutoModel") / "config.json").read_text())
    model = taut.AutoModelForAudioClassification.from_config(config)
    assert model(**together(case, sounds(case))).logits.isfinite().all()
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForAudioClassification.from_pretrained(tmp_path)
    for sound in sounds(case):
        close(model(sound).logits.detach(), theirs(sound).logits.detach())


@some
@torch.no_grad()
@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True}], ids=["int8", "4bit"])
def test_quantized_models_compute_with_the_values_they_hold(case, options, tmp_path):
    pytest.importorskip("bitsandbytes")
    from taut.layers.linear import Linear

    model, dense = load(case, CLASSIFIER, **options), load(case, CLASSIFIER)
    packed = {n: m for n, m in model.named_modules() if isinstance(m, Linear) and m.packed is not None}
    assert len(packed) >= 3 * 4 and "classifier" not in packed
    for name, module in packed.items():
        dense.get_submodule(name).weight.copy_(module.packed.dequantize(torch.float32))
    given = together(case, sounds(case))
    want = dense(**given).logits
    error = (model(**given).logits - want).norm() / want.norm()
    assert error <= (0.05 if "load_in_8bit" in options else 1e-4)  # int8 rounds its inputs too
    model.save_pretrained(tmp_path)
    assert torch.equal(
        taut.AutoModelForAudioClassification.from_pretrained(tmp_path)(**given).logits, model(**given).logits
    )


@some
@torch.no_grad()
def test_reversed_models_compute_and_save_the_same(case, tmp_path):
    model, given = load(case), together(case, sounds(case))
    want = model(**given).last_hidden_state
    model.save_pretrained(tmp_path / "converted")
    model.reverse_bettertransformer().save_pretrained(tmp_path / "reversed")
    close(model(**given).last_hidden_state, want, 1e-5)
    files = [tmp_path / folder / "model.safetensors" for folder in ("converted", "reversed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert torch.equal(model.to_bettertransformer()(**given).last_hidden_state, want)


@pytest.mark.parametrize("name", ["wav2vec2", "hubert-large", "wavlm"])
@torch.no_grad()
def test_frames_that_are_left_out_equal_the_oracles(name):
    case = BY_NAME[name]
    model, given = load(case), padded(clips(*LENGTHS))
    width = model.model.feature_extractor.frames(LENGTHS[0])
    hidden = torch.rand(3, width, generator=torch.Generator().manual_seed(2)) < 0.4
    got = model(**given, mask_time_indices=hidden).last_hidden_state
    for row, clip in enumerate(clips(*LENGTHS)):
        frames = model.model.feature_extractor.frames(len(clip))
        reference = oracle(case, auto="AutoModel")
        want = reference(clip[None], mask_time_indices=hidden[row : row + 1, :frames]).last_hidden_state
        close(got[row, :frames], want[0])
    with pytest.raises(RequestError, match=rf"mask_time_indices has shape \[3, 9\]; expected \[3, {width}\]"):
        model(**given, mask_time_indices=torch.ones(3, 9))
    with pytest.raises(RequestError, match="this model has no token for frames that are left out"):
        load(BY_NAME["wav2vec2-large"])(**given, mask_time_indices=hidden)


@pytest.mark.parametrize("head", ["AutoModel", CTC])
@torch.no_grad()
def test_older_files_name_the_position_convolution_otherwise(head, tmp_path):
    case, clip = BY_NAME["wav2vec2"], clips(200)[0][None]
    folder = checkpoint(case, head)
    older = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    assert sum(name.endswith(("weight_g", "weight_v")) for name in older) == 2
    save_file(older, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    want = fields(load(case, head)(clip))
    model = getattr(taut, head).from_pretrained(tmp_path)
    assert not model.load_report.fresh
    assert all(torch.equal(value, want[name]) for name, value in fields(model(clip)).items())


@torch.no_grad()
def test_files_decide_whether_there_is_a_token_for_frames_left_out(tmp_path):
    """The config speaks of training: files of wav2vec2-base-960h have no such token, and it asks for one."""
    given = padded(clips(*LENGTHS))
    for name in ("wav2vec2", "wav2vec2-large"):
        case, folder = BY_NAME[name], tmp_path / name
        tensors = load_file(checkpoint(case, CTC) / "model.safetensors")
        had = tensors.pop("wav2vec2.masked_spec_embed", None) is not None
        if not had:
            tensors["wav2vec2.masked_spec_embed"] = torch.ones(SPEECH["hidden_size"])
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text((checkpoint(case, CTC) / "config.json").read_text())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = taut.AutoModelForCTC.from_pretrained(folder)
        assert torch.equal(model(**given).logits, load(case, CTC)(**given).logits)
        assert (model.model.hidden_token is None) == had
        model.save_pretrained(folder / "again")
        assert load_file(folder / "again" / "model.safetensors").keys() == tensors.keys()


@torch.no_grad()
@pytest.mark.parametrize("head", ["AutoModel", CTC])
def test_files_of_pre_training(head, tmp_path):
    config = transformers.Wav2Vec2Config(**SPEECH, codevector_dim=8, proj_codevector_dim=8)
    theirs = transformers.Wav2Vec2ForPreTraining(config).eval()
    theirs.save_pretrained(tmp_path)
    new = pytest.warns(UserWarning, match="lm_head") if head == CTC else nullcontext()
    with new:
        model = getattr(taut, head).from_pretrained(tmp_path)
    clip = clips(200)[0][None]
    want = theirs.wav2vec2(clip, output_hidden_states=True).hidden_states
    for got, expected in zip(model(clip, output_hidden_states=True).hidden_states, want, strict=True):
        close(got, expected)


@pytest.mark.parametrize("name", ["hubert", "hubert-large"])
def test_a_clip_with_more_characters_than_frames_counts_nothing_where_the_config_says_so(name):
    case, given = BY_NAME[name], {"input_values": torch.stack(clips(41, 41))}
    labels = torch.tensor([[7, 7, 7, 7, 7], [8, -100, -100, -100, -100]])
    model, reference = load(case, CTC), oracle(case, auto=CTC)
    assert model.model.feature_extractor.frames(41) < 5
    losses = [m(**given, labels=labels).loss.detach() for m in (model, reference)]
    assert losses[0].isfinite() == losses[1].isfinite() == model.config.heads.ctc.zero_infinity
    if losses[1].isfinite():
        close(*losses)


def test_the_usual_program_tunes_an_encoder_for_other_characters(tmp_path):
    given, labels = padded(clips(*LENGTHS)), labels_of(CTC)
    with pytest.warns(UserWarning, match="lm_head"):
        model = taut.AutoModelForCTC.from_pretrained(
            checkpoint(BY_NAME["wav2vec2"], "AutoModel"),
            ctc_loss_reduction="mean",
            pad_token_id=VOCAB + 1,
            vocab_size=VOCAB + 2,
            attention_dropout=0.1,
            mask_time_prob=0.05,
        )
    model.freeze_feature_encoder()
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3), []
    for _ in range(4):
        losses.append(model(**given, labels=labels).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCTC.from_pretrained(tmp_path)
    clip, said = clips(214)[0][None], torch.tensor([[1, 2, VOCAB]])
    close(model(clip, labels=said).loss.detach(), theirs(clip, labels=said).loss.detach())


@pytest.mark.parametrize("name", ["wav2vec2", "wav2vec2-large"])
@torch.no_grad()
def test_a_batch_equals_the_oracles_where_no_padding_reaches_its_norms(name):
    """Without a mask padding is sound, in both; with one, transformers' batch is right where frames are
    normed one by one."""
    case, given = BY_NAME[name], padded(clips(*LENGTHS))
    model, reference = load(case, CTC), oracle(case, auto=CTC)
    labels, values = labels_of(CTC), {"input_values": given["input_values"]}
    masks = [{}] if name == "wav2vec2" else [{}, {"attention_mask": given["attention_mask"]}]
    for mask in masks:
        got, want = (m(**values, **mask, labels=labels) for m in (model, reference))
        close(got.loss, want.loss)
        for row, length in enumerate(LENGTHS):
            frames = model.model.feature_extractor.frames(length if mask else LENGTHS[0])
            close(got.logits[row, :frames], want.logits[row, :frames])


@pytest.mark.parametrize("name", ["wav2vec2", "wav2vec2-large"])
def test_clips_convolved_apart_and_together_are_the_same(name, monkeypatch):
    """Many clips go through the convolutions in groups."""
    from taut.layers import speech

    case, given = BY_NAME[name], padded(clips(*LENGTHS, 150, 149, 400))
    want = load(case)(**given).last_hidden_state
    for limit in (1, 320):
        monkeypatch.setattr(speech, "_TOGETHER", limit)
        close(load(case)(**given).last_hidden_state.detach(), want.detach(), 1e-5)


@torch.no_grad()
@pytest.mark.parametrize("extractor", ["Wav2Vec2FeatureExtractor", "ASTFeatureExtractor"])
@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_from_files_of_sound_to_labels(extractor, suffix, tmp_path):
    """The whole way: a feature extractor reads what the test wrote, and the scores are transformers'."""
    case = BY_NAME["wav2vec2" if extractor.startswith("Wav2Vec2") else "ast"]
    options = {} if case in SPOKEN else {"max_length": FRAMES, "num_mel_bins": BANDS}
    getattr(transformers, extractor)(**options).save_pretrained(tmp_path)
    noise = np.random.default_rng(5).uniform(-0.6, 0.6, 5000)
    paths = [str(tmp_path / f"{index}.{suffix}") for index in range(2)]
    for path, length in zip(paths, (5000, 3100), strict=True):
        soundfile.write(path, noise[:length], 16000)
    padding = {"padding": True} if case in SPOKEN else {}
    given = taut.AutoFeatureExtractor.from_pretrained(tmp_path)(paths, return_tensors="pt", **padding)
    got = load(case, CLASSIFIER)(**given).logits
    theirs = getattr(transformers, extractor).from_pretrained(tmp_path)
    for row, path in enumerate(paths):
        wave, rate = soundfile.read(path, dtype="float32")
        want = oracle(case, auto=CLASSIFIER)(**theirs(wave, sampling_rate=rate, return_tensors="pt")).logits
        close(got[row], want[0])


@torch.no_grad()
def test_from_a_file_of_speech_to_its_text(tmp_path):
    case = BY_NAME["wav2vec2"]
    folder = tmp_path / "model"
    with_processor(case, CTC, folder)
    theirs = transformers.AutoProcessor.from_pretrained(folder)
    tones = np.sin(np.arange(4000) ** 1.4 / 90) * 0.5
    for name, wave in (("long.flac", tones), ("short.wav", tones[:1500])):
        soundfile.write(tmp_path / name, wave, 16000)
    paths = [str(tmp_path / name) for name in ("long.flac", "short.wav")]
    processor = taut.AutoProcessor.from_pretrained(folder)
    given = processor(paths, padding=True, return_tensors="pt")
    texts = processor.batch_decode(taut.AutoModelForCTC.from_pretrained(folder)(**given).logits.argmax(-1))
    reference = oracle(case, auto=CTC)
    for path, text in zip(paths, texts, strict=True):
        wave, rate = soundfile.read(path, dtype="float32")
        scores = reference(**theirs(wave, sampling_rate=rate, return_tensors="pt")).logits
        assert text and text == theirs.batch_decode(scores.argmax(-1))[0]


def test_frozen_parts_have_no_gradient():
    case = BY_NAME["wav2vec2"]
    model = load(case, CTC)
    model.freeze_feature_encoder()
    model(**padded(clips(*LENGTHS)), labels=labels_of(CTC)).loss.backward()
    without = {name for name, param in model.named_parameters() if param.grad is None}
    assert (
        without == {n for n in without if "feature_extractor" in n or "hidden_token" in n}
        and len(without) > 3
    )
    model.freeze_base_model()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"lm_head.weight", "lm_head.bias"}


def test_what_is_wrong_is_named():
    model = load(BY_NAME["wav2vec2"], CTC)
    for given, problem in (
        (torch.zeros(200), r"input_values is torch.float32 \[200\]; expected floats \[clips, samples\]"),
        (torch.zeros(1, 200, dtype=torch.long), r"input_values is torch.int64 \[1, 200\]; expected floats"),
        (torch.zeros(2, 13), r"input_values\[0\] is a clip of 13 samples, and one frame takes 17"),
    ):
        with pytest.raises(RequestError, match=problem):
            model(given)
    given = padded(clips(200, 13))
    with pytest.raises(RequestError, match=r"input_values\[1\] is a clip of 13 samples"):
        model(**given)
    given = padded(clips(200, 150))
    with pytest.raises(RequestError, match=r"attention_mask has shape \[2, 16\]; expected \[2, 200\]"):
        model(given["input_values"], torch.ones(2, 16))
    for labels, problem in (
        ([[1, VOCAB], [2, 3]], rf"labels has the id {VOCAB}; the vocabulary has ids 0 to {VOCAB - 1}"),
        ([[1, 2], [-3, 3]], "labels has the id -3; the vocabulary has ids 0 to"),
        ([1, 2], r"labels is torch.int64 \[2\]; expected int64 \[2, length\]"),
    ):
        with pytest.raises(RequestError, match=problem):
            model(**given, labels=torch.tensor(labels))
    loss = model(**given, labels=torch.full((2, 3), -100)).loss  # nothing was said
    assert loss.isfinite()
    assert model(torch.zeros(0, 200)).logits.shape == (0, model.model.feature_extractor.frames(200), VOCAB)
    ast = load(BY_NAME["ast"])
    with pytest.raises(RequestError, match=rf"\[1, 9, {BANDS}\]; expected \[clips, {FRAMES}, {BANDS}\]"):
        ast(torch.zeros(1, 9, BANDS))


@pytest.mark.parametrize(
    ("model_type", "options", "problem"),
    [
        ("wav2vec2", {"add_adapter": True}, "'add_adapter' is True"),
        ("wav2vec2", {"adapter_attn_dim": 16}, "'adapter_attn_dim' is 16"),
        ("wav2vec2", {"conv_dim": [12, 20]}, "have 2, 3 and 3 entries; expected one a convolution"),
        ("wav2vec2", {"conv_kernel": [5, 0, 2]}, r"'conv_kernel' is \[5, 0, 2\]; expected integers >= 1"),
        ("wav2vec2", {"num_conv_pos_embedding_groups": 7}, "is 7, which does not divide 48"),
        ("hubert", {"conv_pos_batch_norm": True}, "'conv_pos_batch_norm' is True"),
        ("audio-spectrogram-transformer", {"patch_size": 60}, "'patch_size' is 60, larger than"),
    ],
)
def test_configs_that_taut_has_no_model_for_are_refused(model_type, options, problem):
    base = SPEECH if model_type in ("wav2vec2", "hubert") else BY_NAME["ast"].base
    with pytest.raises(ConfigError, match=problem):
        taut.AutoModel.from_config({"model_type": model_type, **base, **options})
