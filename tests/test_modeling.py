"""The Hugging Face-shaped door: shapes, options, packed inputs, and errors that name what is wrong."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import taut
from taut import AutoModelForCausalLM, CausalLM
from taut.errors import CheckpointError, ConfigError, NumericsError, RequestError, TautError, WeightsError
from taut.models import read_config
from taut.processor.output import BatchFeature
from taut.quant.base import Packed
from taut.tokenizer.encoding import BatchEncoding
from tests.families import CASES, VOCAB, checkpoint, oracle

LLAMA = CASES[0]


@pytest.fixture(scope="module")
def folder():
    return checkpoint(LLAMA)


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


IDS = torch.tensor([[5, 9, 17, 3, 88, 41, 7]])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "int4"}, RequestError, "dtype is 'int4'; known: auto, float32"),
        ({"dtype": torch.int8}, RequestError, "dtype is torch.int8; known: auto"),
        ({"device": "gpu"}, RequestError, "device is 'gpu'; known: auto, cpu, cuda"),
        ({"device": "xpu"}, RequestError, "device is 'xpu'; known: auto, cpu, cuda"),
        ({"device_map": {"": "cpu", "lm_head": 0}}, RequestError, "one device holds it all"),
        ({"attn_implementation": "egaer"}, RequestError, "'egaer'; known: auto, .*; nearest: eager"),
        ({"torch_dtyp": "auto"}, RequestError, "no option 'torch_dtyp', .*; nearest: torch_dtype"),
        ({"rope_tetha": 5.0}, RequestError, "nor the config such a key"),
        ({"rms_norm_eps": 0.5, "config": {}}, RequestError, "changes to one: rms_norm_eps; change the"),
        ({"hidden_act": "relu6"}, ConfigError, "'hidden_act' is 'relu6'; known"),
        ({"max_memory": {0: "1GB"}}, RequestError, "is not in this release"),
    ],
    ids=str,
)
def test_bad_load_options_are_named(folder, options, error, message):
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(folder, **options)


def test_a_config_is_read_without_weights_and_given_to_a_model(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    config = taut.AutoConfig.from_pretrained(tmp_path)
    assert config == read_config(json.loads((folder / "config.json").read_text()))
    assert (config.model_type, config.hidden_size, len(config.layers)) == ("llama", 48, 3)
    changed = taut.AutoConfig.from_pretrained(folder, rms_norm_eps=0.5, trust_remote_code=True)
    given = AutoModelForCausalLM.from_pretrained(folder, config=changed)
    assert given.model.norm.config.eps == 0.5 and given.config.source["rms_norm_eps"] == 0.5
    same = AutoModelForCausalLM.from_pretrained(folder, rms_norm_eps=0.5, use_cache=True, max_memory=None)
    assert same.config == changed and torch.equal(same(IDS).logits, given(IDS).logits)
    import transformers

    theirs = transformers.AutoConfig.from_pretrained(folder, rms_norm_eps=0.5)
    same = AutoModelForCausalLM.from_pretrained(folder, config=theirs)
    assert torch.equal(same(IDS).logits, given(IDS).logits)
    values = {key: value for key, value in config.source.items() if key != "model_type"}
    assert AutoModelForCausalLM.from_config(taut.AutoConfig.for_model("llama", **values)).config == config


def test_a_padding_token_that_the_vocabulary_lacks_pads_nothing(folder, model):
    other = AutoModelForCausalLM.from_pretrained(folder, pad_token_id=VOCAB)
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def test_what_is_wrong_with_a_config_is_named(folder, tmp_path):
    with pytest.raises(ConfigError, match="a 'llama' has no 'rms_norm_epsilon'; nearest: rms_norm_eps"):
        taut.AutoConfig.from_pretrained(folder, rms_norm_epsilon=1e-5)
    with pytest.raises(ConfigError, match="'hidden_act' is 'relu6'; known"):
        taut.AutoConfig.from_pretrained(folder, hidden_act="relu6")
    with pytest.raises(ConfigError, match=r"'model_type' is 'lama'.*nearest: llama"):
        taut.AutoConfig.for_model("lama")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        taut.AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="expected a JSON object, got int"):
        AutoModelForCausalLM.from_pretrained(folder, config=4)
    with pytest.raises(TypeError, match=r"call AutoConfig\.from_pretrained"):
        taut.AutoConfig()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(folder, model):
    named = r"'cuda:3', but this PyTorch sees no CUDA GPU.*; use device='cpu', or device_map='auto'"
    for place in ({"device": "cuda:3"}, {"device_map": {"": 3}}, {"device_map": 3}):
        with pytest.raises(RequestError, match=named):
            AutoModelForCausalLM.from_pretrained(folder, **place)
    for movable in (model, BatchEncoding({"input_ids": IDS}), BatchFeature({"pixel_values": IDS})):
        for where in ("cuda:3", 3, torch.device("cuda", 3)):
            with pytest.raises(RequestError, match=named):
                movable.to(where)
    for move in (model.cuda, lambda: model.to(device="cuda"), lambda: model.to("cuda", torch.float16)):
        with pytest.raises(RequestError, match="'cuda', but this PyTorch sees no CUDA GPU"):
            move()
    with pytest.raises(RequestError, match="device is 'gpu'; known: auto, cpu, cuda"):
        model.to("gpu")
    assert model.to("auto", torch.float16).to(device="cpu").dtype is torch.float16


def _edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: shutil.rmtree(f), CheckpointError, "copy"),
        (lambda f: (f / "config.json").unlink(), CheckpointError, "config.json"),
        (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "safetensors"),
        (lambda f: (f / "config.json").write_text("{"), CheckpointError, "not valid JSON"),
        (_truncate, CheckpointError, "model.safetensors"),
        (lambda f: _edit_config(f, model_type="lama"), ConfigError, "nearest: .*llama"),
        (lambda f: _edit_config(f, rope_parameters={"rope_type": "spiral"}), ConfigError, "'spiral'; known"),
        (lambda f: _edit_config(f, hidden_size=96), WeightsError, r"the file has \[131, 48\], the config"),
        (lambda f: _edit_config(f, num_hidden_layers=2), WeightsError, "unexpected: model.layers.2"),
        (lambda f: _edit_config(f, num_hidden_layers=4), WeightsError, "missing: model.layers.3"),
        (lambda f: _edit_config(f, quantization_config={"quant_method": "magic"}), TautError, "magic"),
    ],
)
def test_damaged_folders_are_named_and_nothing_is_loaded(folder, tmp_path, damage, error, message):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(str(copy))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(1, 7, 48)}, "exactly one of"),
        ({"input_ids": IDS[0]}, r"input_ids is torch.int64 \[7\]; expected int64 \[rows, width\]"),
        ({"input_ids": IDS.float()}, r"input_ids is torch.float32 \[1, 7\]"),
        ({"input_ids": IDS + VOCAB - 10}, rf"input_ids\[0, 4\] is {88 + VOCAB - 10}; the vocabulary has"),
        ({"input_ids": -IDS}, r"input_ids\[0, 4\] is -88"),
        ({"input_ids": IDS, "attention_mask": torch.ones(1, 6)}, r"attention_mask has shape \[1, 6\]"),
        ({"input_ids": IDS, "labels": IDS[:, :3]}, r"labels has shape \[1, 3\]"),
        ({"input_ids": IDS, "labels": IDS, "logits_to_keep": 1}, "labels need every position's logits"),
        ({"input_ids": IDS, "past_key_values": ()}, "past_key_values is a tuple; expected what"),
    ],
)
def test_bad_inputs_are_named(model, inputs, message):
    with pytest.raises(RequestError, match=message):
        model(**inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, "empty|no token"),
        ({"input_ids": IDS.repeat(1, 10), "max_new_tokens": 4}, "context"),
        ({"input_ids": IDS + VOCAB}, "token id 136 is outside the model.s vocabulary"),
        ({"input_ids": IDS, "temperature": -1.0, "do_sample": True}, "temperature is -1.0"),
    ],
)
def test_bad_requests_are_named(model, options, message):
    with pytest.raises(RequestError, match=message):
        model.generate(**options)


def test_nan_names_the_first_layer_that_has_it(model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = float("nan")
        model.model.layers[2].self_attn.o_proj.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match=r"model.layers.1.mlp.down_proj \(weight itself is not finite\)"):
        model.generate(IDS, max_new_tokens=3)


def test_packed_positions_give_each_sequence_its_own_loss_and_logits(model):
    lengths = (3, 4)
    positions = torch.tensor([[p for n in lengths for p in range(n)]])
    together = model(IDS, position_ids=positions, labels=IDS)
    parts = [model(ids, labels=ids) for ids in IDS.split(lengths, dim=1)]
    assert torch.allclose(together.logits, torch.cat([p.logits for p in parts], 1), atol=1e-5)
    want = sum(p.loss * (n - 1) for p, n in zip(parts, lengths, strict=True)) / (sum(lengths) - 2)
    assert torch.allclose(together.loss, want, atol=1e-6)
    total = model(IDS, position_ids=positions, labels=IDS, num_items_in_batch=10).loss
    assert torch.allclose(total, want * (sum(lengths) - 2) / 10, atol=1e-6)


def test_embeds_logits_to_keep_and_tuples(model):
    whole = model(IDS).logits
    embeds = model.get_input_embeddings()(IDS)
    assert torch.allclose(model(inputs_embeds=embeds).logits, whole, atol=1e-6)
    two = torch.cat((IDS, torch.zeros_like(IDS)))
    mask = torch.tensor([[1] * 7, [0] * 5 + [1] * 2])
    kept = model(two, attention_mask=mask, logits_to_keep=3).logits
    assert kept.shape == (2, 3, VOCAB)
    assert torch.allclose(kept, model(two, attention_mask=mask).logits[:, -3:], atol=1e-6)
    (logits,) = model(IDS, return_dict=False)
    assert torch.equal(logits, whole) and torch.equal(model(IDS)[0], whole)
    output = model(IDS)
    assert output.loss is None and list(output) == ["logits"]
    with pytest.raises(AttributeError, match="no field 'logit'; it has: loss, logits"):
        output.logit  # noqa: B018


def test_logits_beside_a_loss_are_computed_when_looked_at(model, monkeypatch):
    want, calls, logits = model(IDS).logits, [], model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: calls.append(1) or logits(hidden))
    output = model(IDS, labels=IDS)
    assert list(output) == ["loss", "logits"] and output[0] is output.loss and not calls
    for read in (lambda o: o.logits, lambda o: o[1], lambda o: dict(o)["logits"], lambda o: o[1:][0]):
        assert torch.equal(read(model(IDS, labels=IDS)), want)
    for read in (lambda o: list(o.values())[1], lambda o: dict(**o)["logits"], lambda o: o.get("logits")):
        assert torch.equal(read(model(IDS, labels=IDS)), want)
    assert torch.equal(output.logits, output["logits"]) and len(calls) == 8
    model(IDS, labels=IDS).logits.sum().backward()  # and gradients flow through them
    watched = []
    model.lm_head.register_forward_hook(lambda *_: watched.append(1))
    assert torch.allclose(model(IDS, labels=IDS).loss, output.loss) and watched


def test_a_familys_own_class_name_loads_that_family_alone(folder):
    from taut import LlamaForCausalLM

    assert isinstance(LlamaForCausalLM.from_pretrained(folder, dtype="float32"), CausalLM)
    with pytest.raises(ConfigError, match="is a 'llama' and not a 'gpt2'; load it with AutoModelForCausalLM"):
        taut.GPT2LMHeadModel.from_pretrained(folder)
    with pytest.raises(AttributeError, match="no LamaForCausalLM; nearest: LlamaForCausalLM"):
        taut.LamaForCausalLM  # noqa: B018


def test_from_config_and_what_a_model_says_of_itself():
    config = read_config(json.loads((checkpoint(LLAMA) / "config.json").read_text()))
    model = CausalLM.from_config(config, dtype=torch.bfloat16)
    assert model.dtype is torch.bfloat16 and model.device.type == "cpu"
    assert model.get_memory_footprint() == 2 * model.num_parameters()
    assert torch.isfinite(model(IDS).logits).all()
    model.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == 0
    with pytest.raises(TypeError, match=r"call AutoModelForCausalLM.from_pretrained"):
        AutoModelForCausalLM()


def test_training_between_generations_sees_and_keeps_its_weights(folder):
    """Inference layouts come and go under the same parameters, so an optimizer made before stays good."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert losses[-1] < losses[0]
    after = model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, reference(IDS).logits, atol=0.05)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_model_changes_its_dtype_as_it_would_load_in_it(folder, dtype):
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if dtype is not torch.bfloat16:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = {"max_new_tokens": 4, "do_sample": False}
    model.generate(IDS, **options)  # an engine of the dtype before
    assert {torch.bfloat16: model.bfloat16, torch.float16: model.half, torch.float32: model.float}[
        dtype
    ]() is model
    assert model.dtype is dtype and torch.equal(model(IDS).logits, wanted(IDS).logits)
    assert torch.equal(model.generate(IDS, **options), wanted.generate(IDS, **options))
    assert model.train().training and not model.eval().training


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_parameters_are_counted_as_in_transformers(name):
    case = next(case for case in CASES if case.name == name)
    model, theirs = AutoModelForCausalLM.from_pretrained(checkpoint(case)), oracle(case)
    assert model.num_parameters() == theirs.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == theirs.num_parameters(exclude_embeddings=True)


@torch.no_grad()
def test_packed_weights_stay_as_they_are_in_another_dtype(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, load_in_4bit=True)
    before, packed = model(IDS).logits, [m for m in model.modules() if isinstance(m, Packed)]
    buffers = [(buffer, buffer.clone()) for module in packed for buffer in module.buffers()]
    got = model.bfloat16()(IDS).logits
    assert model.dtype is torch.bfloat16 and model.is_quantized
    after = [buffer for module in packed for buffer in module.buffers()]
    assert all(a.dtype is b.dtype and torch.equal(a, b) for a, (_, b) in zip(after, buffers, strict=True))
    assert (got - before).norm() < 0.03 * before.norm()


def test_what_programs_set_in_a_config_is_set_and_all_else_is_an_error(folder, tmp_path):
    auto = taut.AutoModelForSequenceClassification
    with pytest.warns(UserWarning, match="newly initialised"):
        model = auto.from_pretrained(folder, num_labels=2)
    config = model.config
    assert config.use_cache is True and config.is_encoder_decoder is False
    config.use_cache, config.id2label = False, {0: "no", 1: "yes"}
    assert config.label2id == {"no": 0, "yes": 1}
    config.label2id = {"yes": 0, "no": 1}
    config.eos_token_id, config.problem_type = [4, 5], "regression"
    ids = torch.tensor([[5, 9, 7, 7]])
    config.pad_token_id = 7  # the last token that isn't one is scored
    torch.testing.assert_close(model(ids).logits, model(ids[:, :2]).logits)
    for name, value, message in (
        ("hidden_size", 64, r"config.hidden_size can't be changed.*hidden_size=64"),
        ("id2label", {0: "one"}, "id2label has 1 labels, and the model scores 2"),
    ):
        with pytest.raises(ConfigError, match=message):
            setattr(config, name, value)
    model.save_pretrained(tmp_path)
    again = auto.from_pretrained(tmp_path).config
    for read in (config, again):
        assert (read.use_cache, read.pad_token_id, read.eos_token_ids) == (False, 7, (4, 5))
        assert read.id2label == {0: "yes", 1: "no"} and read.problem_type == "regression"
    assert AutoModelForCausalLM.from_pretrained(folder).config.use_cache is True
