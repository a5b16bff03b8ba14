"""What every encoder-decoder that hears must pass, from the table in `speech_seq2seq.py`; marked `gpu`, on a
GPU too."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file

import taut
from taut import weights
from taut.cli.inspect import describe
from taut.errors import ConfigError, RequestError
from taut.models import families, family, kind
from tests.families import Case, checkpoint, oracle
from tests.quant.test_models import config as packing
from tests.quant.test_models import linears, off
from tests.speech_seq2seq import BINS, CASES, CLASSIFIERS, FRAMES, features
from tests.test_encoders import fields
from tests.test_families import close, every_device, padded, rows

AUTO, CLASSIFIER = "AutoModelForSpeechSeq2Seq", "AutoModelForAudioClassification"
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_classifier = pytest.mark.parametrize("case", CLASSIFIERS, ids=str)
TARGETS = (5, 17, 1)


def load(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32, auto: str = AUTO, **options):
    path = checkpoint(case, AUTO)
    return getattr(taut, auto).from_pretrained(path, dtype=dtype, device=device, **options)


def reference(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    return oracle(case, dtype, device, auto=AUTO)


def inputs(case: Case, device: str = "cpu", side: str = "right") -> dict[str, torch.Tensor]:
    """A batch of clips, and what their decoder reads, padded on a side."""
    heard = features(len(TARGETS), bins=case.options.get("num_mel_bins", BINS)).to(device)
    decoder = {f"decoder_{name}": value for name, value in padded(rows(*TARGETS), side, device).items()}
    return {"input_features": heard, **decoder}


def alone(model, given: dict[str, torch.Tensor], row: int, **options):
    real = given["decoder_attention_mask"][row].bool()
    with torch.no_grad():
        return model(
            given["input_features"][row : row + 1].to(model.dtype),
            decoder_input_ids=given["decoder_input_ids"][row : row + 1, real],
            **options,
        )


def test_every_family_that_hears_and_writes_is_in_the_table():
    known = {name for name in families() if kind(family(name)) == "speech encoder-decoder"}
    assert {load(case).config.model_type for case in CASES} == known


@every_device
@every_case
def test_every_output_equals_the_oracles_alone_and_padded(case, device):
    model, theirs = load(case, device), reference(case, device=device)
    assert model.config.unused == ()
    options = {"output_hidden_states": True, "output_attentions": True}
    for side in ("left", "right"):
        given = inputs(case, device, side)
        with torch.no_grad():
            got, fused = fields(model(**given, **options)), fields(model(**given))
        for row in range(len(TARGETS)):
            expected = fields(alone(theirs, given, row, **options))
            real = given["decoder_attention_mask"][row].bool()
            # theirs always has a cache
            assert got.keys() == {name for name in expected if not name.startswith("past")}
            for name, values in got.items():
                values, wanted = values[row], expected[name][0]
                if name.startswith(("decoder_attentions", "cross")):
                    values = values[:, real][:, :, real if name.startswith("decoder") else slice(None)]
                elif not name.startswith("encoder"):
                    assert (values[~real] == 0).all()
                    values = values[real]
                    if name in fused:
                        close(fused[name][row][real].cpu(), wanted.cpu())
                close(values.cpu(), wanted.cpu())


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
    ],
    ids=str,
)
@every_case
def test_half_precision_rounds_no_worse_than_twice_the_oracle(case, device, dtype):
    given, exact, errors = inputs(case), reference(case), []
    for made in (load(case, device, dtype), reference(case, dtype, device)):
        there = {name: value.to(device) for name, value in given.items()}
        error = 0.0
        for row in range(len(TARGETS)):
            want, got = alone(exact, given, row).logits, alone(made, there, row).logits
            error += (got.float().cpu() - want).square().mean()
        errors.append(error)
    assert errors[0] ** 0.5 <= 2 * errors[1] ** 0.5


@every_device
@every_case
def test_loss_and_gradients_equal_the_oracle(case, device, tmp_path):
    model, theirs, given = load(case, device), reference(case, device=device), inputs(case, device)
    labels = given["decoder_input_ids"].masked_fill(given["decoder_attention_mask"] == 0, -100)
    labels[1, 4:9] = -100
    heard = {"input_features": given["input_features"], "labels": labels}
    ours, wanted = model(**heard), theirs(**heard)
    close(ours.loss.detach(), wanted.loss.detach(), 1e-5)
    real = (labels != -100).cpu()
    close(ours.logits.detach().cpu()[real], wanted.logits.detach().cpu()[real])
    ours.loss.backward()
    wanted.loss.backward()
    with torch.no_grad():
        for made in (model, theirs):
            for param in made.parameters():  # so that saving gives gradients under the files' names
                param.copy_(torch.zeros_like(param) if param.grad is None else param.grad)
    theirs.save_pretrained(tmp_path)
    want = load_file(tmp_path / "model.safetensors")
    got = {tensor.name: tensor.read().cpu() for tensor in weights.store(model, model.rules())}
    floor = 1e-3 * max(grad.abs().max() for grad in want.values())
    assert got.keys() == want.keys()
    del want["model.encoder.embed_positions.weight"]  # theirs has one after it was loaded, and means none
    for name, expected in want.items():
        assert (got[name] - expected).abs().max() <= 2e-4 * max(expected.abs().max(), floor), name


@every_case
def test_save_is_byte_identical_and_transformers_reads_it(case, tmp_path):
    auto, given = getattr(taut, AUTO), inputs(case)
    load(case).save_pretrained(tmp_path / "once")
    auto.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice", max_shard_size="40KB")
    auto.from_pretrained(tmp_path / "twice").save_pretrained(tmp_path / "third")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "third" / name).read_bytes()
    theirs, info = getattr(transformers, AUTO).from_pretrained(tmp_path / "twice", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    close(alone(load(case), given, 1).logits, alone(theirs, given, 1).logits)


@every_case
def test_both_stacks_without_a_head_and_the_encoder_by_itself(case, tmp_path):
    given, whole = inputs(case), load(case)
    theirs = transformers.AutoModel.from_pretrained(checkpoint(case, AUTO))
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        want = whole(**given, output_hidden_states=True)
        states = whole.get_encoder()(given["input_features"])
        assert torch.equal(states.last_hidden_state, want.encoder_last_hidden_state)
        rest = {name: value for name, value in given.items() if name != "input_features"}
        for form in (states, (states.last_hidden_state,), states.last_hidden_state):
            assert torch.equal(whole(**rest, encoder_outputs=form).logits, want.logits)
        for path in (checkpoint(case, AUTO), tmp_path / "theirs"):
            model = taut.AutoModel.from_pretrained(path)
            got = model(**given)
            assert torch.equal(got.last_hidden_state, want.decoder_hidden_states[-1])
    model.save_pretrained(tmp_path / "ours")
    theirs, info = transformers.AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(theirs).__name__ == model.architecture() == f"{case.family}Model"


@every_case
def test_what_the_encoder_computes_of_positions_needs_no_file(case):
    made = taut.WhisperForConditionalGeneration.from_config(load(case).config)
    theirs = type(reference(case))(reference(case).config)
    close(made.encoder.embed_positions.weight, theirs.model.encoder.embed_positions.weight, 1e-5)


@pytest.mark.parametrize("name", ["nf4-double", "int8"])
def test_packed_weights_compute_in_both_stacks_and_keep_every_byte(name, tmp_path):
    model, dense, given = load(CASES[0], quantization_config=packing(name)), load(CASES[0]), inputs(CASES[0])
    assert all(module.packed is not None for module in linears(model).values())
    with torch.no_grad():
        for path, module in linears(model).items():
            dense.get_submodule(path).weight.copy_(module.packed.dequantize(torch.float32))
        got, want = model(**given).logits, dense(**given).logits
    if name == "int8":  # activations are in 8 bits too
        assert off(got, want) < 0.1
    else:
        close(got, want)
    model.save_pretrained(tmp_path / "once")
    again = getattr(taut, AUTO).from_pretrained(tmp_path / "once")
    with torch.no_grad():
        assert torch.equal(again(**given).logits, got)
    again.save_pretrained(tmp_path / "twice")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()


def test_inspect_says_what_the_encoder_hears():
    facts = describe(checkpoint(CASES[0], AUTO), "auto")
    assert facts["config"]["spectrogram"] == {"mel_bins": BINS, "frames": FRAMES}
    assert facts["memory_bytes"]["kv_cache_per_source_token"] == 2 * 2 * 48 * 4
    plan = load(CASES[0]).plan()
    cross = {(c.stack, c.first, c.last) for c in plan.choices if c.op == "attention to a cached source"}
    assert cross == {("decoder", 0, 1)}


def classifiers(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """A classifier and its oracle."""
    path = checkpoint(case, CLASSIFIER)
    ours = taut.AutoModelForAudioClassification.from_pretrained(path, dtype=dtype, device=device)
    return ours, oracle(case, dtype, device, auto=CLASSIFIER)


@every_device
@every_classifier
def test_classifiers_equal_the_oracle(case, device):
    (model, theirs), heard = classifiers(case, device), features(5).to(device)
    assert model.config.unused == () and not model.load_report.fresh
    options = {"labels": torch.tensor([0, 2, 1, 1, 2], device=device), "output_attentions": True}
    # theirs gives hidden states unasked where it needs them
    got, want = (fields(made(heard, output_hidden_states=True, **options)) for made in (model, theirs))
    assert got.keys() == want.keys() and "hidden_states.0" in got
    for name, value in got.items():
        close(value.detach().cpu(), want[name].detach().cpu())
    assert model(heard, **options).hidden_states is None
    for made in (model, theirs):
        made(heard, **options).loss.backward()
    for name in ("projector.weight", "classifier.bias", "encoder.conv1.weight", "layer_weights"):
        if name == "layer_weights" and model.layer_weights is None:
            continue
        ours, wanted = (
            m.get_parameter(name.replace(*prefix)).grad
            for m, prefix in ((model, ("encoder.", "model.encoder.")), (theirs, ("", "")))
        )
        close(ours.cpu(), wanted.cpu())
    states = model.get_encoder()(heard, output_hidden_states=True)
    close(model(encoder_outputs=states).logits.detach(), got["logits"].detach(), 1e-5)


@every_classifier
@torch.no_grad()
def test_classifiers_round_no_worse_than_twice_the_oracle(case):
    exact, heard = classifiers(case)[1](features(5)).logits, features(5).bfloat16()
    errors = [
        made(heard).logits.float().sub(exact).square().mean()
        for made in classifiers(case, dtype=torch.bfloat16)
    ]
    assert errors[0] ** 0.5 <= 2 * errors[1] ** 0.5


@every_classifier
@torch.no_grad()
def test_classifiers_save_every_byte_and_transformers_reads_them(case, tmp_path):
    model = classifiers(case)[0]
    model.save_pretrained(tmp_path / "once")
    taut.WhisperForAudioClassification.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    theirs, info = getattr(transformers, CLASSIFIER).from_pretrained(
        tmp_path / "once", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    close(model(features(2)).logits, theirs(features(2)).logits)
    packed = taut.AutoModelForAudioClassification.from_pretrained(
        tmp_path / "once", quantization_config=packing("nf4-double")
    )
    assert packed.is_quantized and packed.projector.packed is packed.classifier.packed is None


@torch.no_grad()
def test_a_classifier_of_a_whole_model_has_a_new_head_and_its_encoder():
    whole = load(CASES[0])
    with pytest.warns(UserWarning, match=r"no weights for projector.weight, .* of a WhisperForAudioClass"):
        model = load(CASES[0], auto=CLASSIFIER, num_labels=7)
    assert model(features(2)).logits.shape == (2, 7)
    want = whole.get_encoder()(features(2)).last_hidden_state
    assert torch.equal(model.get_encoder()(features(2)).last_hidden_state, want)
    model.freeze_encoder()
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {
        "projector",
        "classifier",
    }
    with pytest.raises(RequestError, match="exactly one of input_features and encoder_outputs"):
        model()
    weighted = classifiers(CLASSIFIERS[1])[0]
    with pytest.raises(RequestError, match=r"has 0 of 4; ask the encoder .* output_hidden_states=True"):
        weighted(encoder_outputs=weighted.get_encoder()(features(2)))


def test_fewer_frames_are_fewer_tokens_to_attend_to():
    model, given = load(CASES[0]), inputs(CASES[0])
    with torch.no_grad():
        short = model.get_encoder()(given["input_features"][..., : FRAMES // 2 - 1]).last_hidden_state
        embeds = model.encoder.pack(given["input_features"])[0].embeds.view(3, FRAMES // 2, -1)
    assert short.shape[1] == FRAMES // 4
    # The convolutions see one frame beyond each end; up to there all is as in the whole clip.
    cut = model.encoder.pack(given["input_features"][..., : FRAMES // 2])[0].embeds.view(3, FRAMES // 4, -1)
    close(cut[:, :-1], embeds[:, : FRAMES // 4 - 1], 1e-5)


def test_bad_input_is_named():
    model, given = load(CASES[0]), inputs(CASES[0])
    ids = given["decoder_input_ids"]
    for wrong, message in (
        (torch.zeros(3, BINS + 1, FRAMES), rf"\[3, 21, 60\]; expected floats \[clips, {BINS}, frames\]"),
        (torch.zeros(3, BINS, FRAMES + 2), "has 62 frames, and the encoder takes 1 to 60"),
        (torch.zeros(3, BINS, FRAMES, dtype=torch.int64), "input_features is torch.int64"),
        (None, "exactly one of input_features and encoder_outputs"),
        (given["input_features"][:2], "have 3 rows and the encoder's 2"),
    ):
        with pytest.raises(RequestError, match=message):
            model(wrong, decoder_input_ids=ids)
    with pytest.raises(RequestError, match="the model has 64 positions"):
        model(given["input_features"], decoder_input_ids=ids.repeat(1, 4))
    with pytest.raises(ConfigError, match="which AutoModelForSeq2SeqLM does not load; these do: AutoModel, "):
        load(CASES[0], auto="AutoModelForSeq2SeqLM")
