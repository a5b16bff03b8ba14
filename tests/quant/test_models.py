"""Whole models in 4 and 8 bit: every family, transformers + bitsandbytes both ways, and bad input."""

from __future__ import annotations

import functools
import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from taut import AutoModelForCausalLM, BitsAndBytesConfig, weights
from taut.errors import CheckpointError, ConfigError, RequestError, TautError
from taut.kernels import moe
from taut.layers.experts import ExpertLinear
from taut.layers.linear import Linear
from taut.modeling import CausalLM
from taut.models import read_config, rules
from tests.families import CASES, TINY, VOCAB, checkpoint
from tests.scratch import scratch

pytest.importorskip("bitsandbytes")

FORMATS = {
    "fp4": {"load_in_4bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
every_format = pytest.mark.parametrize("name", FORMATS)
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def config(name: str) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(**FORMATS[name])


def load(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(input_ids=ids, **inputs).logits.float()


def close(got, want, bound=1e-4):
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= bound * want.abs().max()


def off(got, want):
    return ((got - want).norm() / want.norm()).item()


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear | ExpertLinear)}


def dequantized(model, path):
    """The same model in full precision with the values that the packed weights stand for."""
    dense = load(path)
    for name, module in linears(model).items():
        if module.packed is not None:
            with torch.no_grad():
                dense.get_submodule(name).weight.copy_(module.packed.dequantize(torch.float32))
    return dense


@pytest.fixture
def same_experts(monkeypatch):
    """After a call of this, routers choose again, one after the other, the experts that they chose since the
    call before: a rounded score may choose another, which would say nothing of the weights."""
    route, made, given = moe.route, [], []

    def choose(scores, chosen, normalised):
        if not given:
            made.append(route(scores, chosen, normalised)[1])
            return route(scores, chosen, normalised)
        experts = given.pop(0)
        shares = scores.softmax(-1).gather(1, experts)
        return shares / shares.sum(-1, keepdim=True) if normalised else shares, experts

    def again():
        given[:] = made
        made.clear()

    monkeypatch.setattr(moe, "route", choose)
    return again


# --------------------------------------------------------------------------------------------- every family


@every_case
@every_format
def test_every_family_computes_with_its_packed_weights(case, name, same_experts):
    path = checkpoint(case)
    model = load(path, quantization_config=config(name))
    dense = load(path)
    packed = [n for n, m in linears(model).items() if m.packed is not None]
    assert packed == [n for n in linears(model) if n != "lm_head"]  # everything but the head
    assert len(packed) >= 4 * len(model.model.layers)
    assert model.get_memory_footprint() < dense.get_memory_footprint()
    assert model.is_quantized and (model.is_loaded_in_8bit, model.is_loaded_in_4bit) == (
        name == "int8",
        name != "int8",
    )
    dense = dequantized(model, path)
    for length in (1, 14):
        want = logits(dense, prompt(length))
        same_experts()
        got = logits(model, prompt(length))
        if name == "int8" and length > 1:  # activations are in 8 bits too
            assert off(got, want) < 0.06
        else:
            close(got, want)


@pytest.mark.parametrize(
    ("attention", "device", "dtype"),
    [
        ("sdpa", "cpu", torch.float32),
        ("eager", "cpu", torch.float32),
        pytest.param("flash_attention_2", "cuda", torch.float16, marks=pytest.mark.gpu),
    ],
    ids=["sdpa", "eager", "flash"],
)
@every_case
@pytest.mark.parametrize("name", ["nf4-double", "int8"])
def test_padded_batches_attention_and_streaming_combine(case, name, attention, device, dtype):
    if attention == "sdpa" and case.name == "gemma2":
        pytest.skip("scaled_dot_product_attention has no soft-cap")
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint(case),
        dtype=dtype,
        device=device,
        quantization_config=config(name),
        attn_implementation=attention,
    )
    rows = [prompt(9, 1).to(device), prompt(4, 2).to(device)]
    ids, mask = (torch.zeros(2, 10, dtype=torch.int64, device=device) for _ in range(2))
    for row, one in enumerate(rows):
        ids[row, 10 - one.shape[1] :], mask[row, 10 - one.shape[1] :] = one, 1
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = logits(model, ids, attention_mask=mask)
    for row, one in enumerate(rows):
        alone, got = logits(model, one)[0], together[row, -one.shape[1] :]
        if dtype is torch.float16:  # a router may choose otherwise for some token
            assert ((got - alone).norm(dim=1) / alone.norm(dim=1)).median() < 0.05
        elif name == "int8":  # a row's neighbours decide which columns are outliers
            assert off(got, alone) < 0.05
        else:
            close(got, alone)
    made = model.generate(input_ids=ids, attention_mask=mask, **options)
    assert made.shape == (2, 15)
    if name != "int8" and dtype is torch.float32:
        for row, one in enumerate(rows):
            assert (
                made[row, 10:].tolist()
                == model.generate(input_ids=one, **options)[0, one.shape[1] :].tolist()
            )

    streamed: list[int] = []
    streamer = SimpleNamespace(put=lambda ids: streamed.extend(ids.view(-1).tolist()), end=lambda: None)
    whole = model.generate(input_ids=rows[0], streamer=streamer, **options)
    assert streamed[-5:] == whole[0, -5:].tolist()


@every_case
@every_format
def test_saving_and_loading_again_keeps_every_byte(case, name, tmp_path):
    model = load(checkpoint(case), quantization_config=config(name))
    model.save_pretrained(tmp_path / "once")
    again = load(tmp_path / "once")
    assert again.quantization_config == model.quantization_config
    assert torch.equal(logits(again, prompt(11)), logits(model, prompt(11)))
    again.save_pretrained(tmp_path / "twice", max_shard_size="20KB")
    load(tmp_path / "twice").save_pretrained(tmp_path / "third")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "third" / file).read_bytes()


def test_gradients_reach_the_embedding_through_packed_layers():
    model = load(checkpoint(CASES[0]), quantization_config=config("nf4")).train()
    dense = dequantized(model, checkpoint(CASES[0])).train()
    for m in (model, dense):
        m(input_ids=prompt(12), labels=prompt(12)).loss.backward()
    close(model.model.embed_tokens.weight.grad, dense.model.embed_tokens.weight.grad)


# ------------------------------------------------------------------- transformers + bitsandbytes, both ways

# Rows of whole blocks: bitsandbytes' CPU code dequantizes others wrongly.
ALIGNED = {
    **TINY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
OTHERS = {"Llama": {}, "Phi3": {"sliding_window": None}, "Qwen2": {"tie_word_embeddings": True}}
EXPERTS = {
    "Mixtral": {"num_local_experts": 4, "sliding_window": None},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
}


@functools.cache
def aligned(kind: str) -> Path:
    torch.manual_seed(3)
    settings = getattr(transformers, f"{kind}Config")(**{**ALIGNED, **(OTHERS | EXPERTS)[kind]})
    model = getattr(transformers, f"{kind}ForCausalLM")(settings)
    for param in model.parameters():
        if param.dim() >= 2:
            torch.nn.init.normal_(param, std=0.08)
    folder = scratch("quant") / kind
    model.save_pretrained(folder)
    return folder


def theirs(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", device_map="cpu", **options
        ).train()  # in inference, bitsandbytes' CPU code computes 4-bit layers in bfloat16


def agree(ours, reference, name):
    if name != "int8":
        return close(logits(ours, prompt(15)), logits(reference, prompt(15)), 2e-4)
    # In training, bitsandbytes' CPU code multiplies by the dequantized weight, as one row does here.
    close(logits(ours, prompt(1)), logits(reference, prompt(1)), 2e-4)
    exact, got = logits(reference, prompt(15)), logits(ours, prompt(15))
    rounded = logits(reference.eval(), prompt(15))  # several rows round their activations to 8 bits
    assert off(got, rounded) < 0.04 and off(got, exact) < 1.3 * off(rounded, exact)


@pytest.mark.parametrize("kind", OTHERS)
@every_format
def test_transformers_reads_what_taut_saves_and_the_other_way_round(kind, name, tmp_path):
    ours = load(aligned(kind), quantization_config=config(name))
    reference = theirs(aligned(kind), quantization_config=transformers.BitsAndBytesConfig(**FORMATS[name]))
    agree(ours, reference, name)
    reference.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    mine, other = (
        load_file(tmp_path / "ours/model.safetensors"),
        load_file(tmp_path / "theirs/model.safetensors"),
    )
    assert mine.keys() == other.keys()
    for key, tensor in mine.items():
        assert torch.equal(tensor, other[key]), key
    agree(ours, theirs(tmp_path / "ours"), name)
    reread = load(tmp_path / "theirs")
    assert torch.equal(logits(reread, prompt(15)), logits(ours, prompt(15)))


@pytest.mark.parametrize("kind", EXPERTS)
def test_models_with_dense_experts_go_both_ways(kind, tmp_path):
    """transformers 5 never packs experts, since it holds those of a layer in one tensor."""
    options = {**FORMATS["nf4"], "llm_int8_skip_modules": ["lm_head", ".*experts"]}
    ours = load(aligned(kind), quantization_config=BitsAndBytesConfig(**options))
    assert [n for n, m in linears(ours).items() if m.packed is None and "experts" not in n] == ["lm_head"]
    ours.save_pretrained(tmp_path / "ours")
    agree(ours, theirs(tmp_path / "ours"), "nf4")
    reference = theirs(aligned(kind), quantization_config=transformers.BitsAndBytesConfig(**FORMATS["nf4"]))
    reference.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match=r"says nf4, but .*experts.* are not and stay dense"):
        reread = load(tmp_path / "theirs")
    assert torch.equal(logits(reread, prompt(15)), logits(ours, prompt(15)))


@every_format
def test_each_experts_matrices_are_packed_as_bitsandbytes_packs_them(name, tmp_path):
    """As transformers 4 wrote them: every matrix by itself, the routers too."""
    import bitsandbytes.functional as bnb

    load(aligned("Mixtral"), quantization_config=config(name)).save_pretrained(tmp_path)
    dense, stored = (load_file(folder / "model.safetensors") for folder in (aligned("Mixtral"), tmp_path))
    experts = [n for n in dense if ".experts." in n]
    assert len(experts) == 3 * 4 * 3
    gate = "model.layers.1.block_sparse_moe.gate.weight"

    def packed(key: str) -> dict[str, torch.Tensor]:
        weight = dense[key]
        if name == "int8":
            values, scale, _ = bnb.int8_vectorwise_quant(weight.half())
            return {key: values, f"{key.removesuffix('weight')}SCB": scale}
        c = config(name)
        codes, state = bnb.quantize_4bit(
            weight, compress_statistics=c.bnb_4bit_use_double_quant, quant_type=c.bnb_4bit_quant_type
        )
        return {key: codes} | {f"{key}.{n}": t for n, t in state.as_dict(packed=True).items()}

    for key in experts:
        for part, tensor in packed(key).items():
            if "quant_state" in part:  # JSON whose numbers are spelled otherwise
                assert part in stored
            else:
                assert torch.equal(stored[part], tensor), part
    want = logits(load(tmp_path), prompt(11))
    stored.pop(gate)
    save_file(stored | packed(gate), tmp_path / "model.safetensors", metadata={"format": "pt"})
    older = load(tmp_path)
    assert off(older.model.layers[1].mlp.gate.weight, dense[gate]) < 0.2
    assert off(logits(older, prompt(11)), want) < 0.5


def test_transformers_config_and_dicts_are_taken_as_they_are(tmp_path):
    wanted = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16"
    )
    one = load(aligned("Llama"), quantization_config=wanted)
    two = load(aligned("Llama"), quantization_config=wanted.to_dict())
    assert one.quantization_config == two.quantization_config
    one.save_pretrained(tmp_path)
    assert load(aligned("Llama"), load_in_4bit=True).model.layers[0].self_attn.o_proj.packed.compute is None
    for model in (one, load(tmp_path)):
        assert model.model.layers[0].self_attn.o_proj.packed.compute is torch.bfloat16
    close(
        logits(one, prompt(5)), logits(theirs(aligned("Llama"), quantization_config=wanted), prompt(5)), 0.03
    )


def test_codes_may_be_stored_as_another_dtype(tmp_path):
    options = {**FORMATS["nf4"], "bnb_4bit_quant_storage": torch.bfloat16}
    ours = load(aligned("Llama"), quantization_config=BitsAndBytesConfig(**options))
    ours.save_pretrained(tmp_path / "ours")
    stored = load_file(tmp_path / "ours/model.safetensors")
    assert stored["model.layers.0.self_attn.q_proj.weight"].dtype is torch.bfloat16
    assert torch.equal(logits(load(tmp_path / "ours"), prompt(7)), logits(ours, prompt(7)))


# ------------------------------------------------------------------------------------------- what is packed


def test_modules_are_left_out_by_name_and_the_head_is_packed_when_not_named(tmp_path):
    skip = BitsAndBytesConfig(**FORMATS["nf4"], llm_int8_skip_modules=["q_proj", "model.layers.1"])
    model = load(checkpoint(CASES[0]), quantization_config=skip)
    first = model.model.layers[0]
    kinds = [first.self_attn.qkv_proj.packed.parts[0].kind, first.mlp.down_proj.packed.kind]
    kinds.append(model.lm_head.packed.kind)
    assert kinds == ["dense", "nf4", "nf4"]
    assert model.model.layers[1].mlp.down_proj.packed is None
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path), prompt(9)), logits(model, prompt(9)))


def test_a_name_that_leaves_nothing_out_is_said():
    options = {**FORMATS["nf4"], "llm_int8_skip_modules": ["q_porj", "lm_head", "down_proj"]}
    with pytest.warns(UserWarning, match="'q_porj' is neither .*nearest: q_proj") as found:
        load(checkpoint(CASES[0]), quantization_config=BitsAndBytesConfig(**options))
    assert len(found) == 1


def test_packed_weights_count_as_the_parameters_that_they_stand_for():
    for case in (CASES[0], next(case for case in CASES if case.name == "mixtral")):
        model, dense = load(checkpoint(case), quantization_config=config("nf4")), load(checkpoint(case))
        assert model.num_parameters() == dense.num_parameters()
        assert model.num_parameters(only_trainable=True) < dense.num_parameters()


def test_the_plan_tells_packed_products_from_others():
    skip = BitsAndBytesConfig(**FORMATS["nf4"], llm_int8_skip_modules=["o_proj", "lm_head"])
    model = load(aligned("Llama"), quantization_config=skip)
    lines = {c.op: c.chosen for c in model.plan().choices if "products of 512 rows" in c.op}
    packed, dense = "qkv_proj, gate_up_proj, down_proj", "o_proj"
    assert lines.keys() == {f"products of 512 rows: {names}" for names in (packed, dense)}
    assert lines[f"products of 512 rows: {packed}"].startswith("nf4: unpacked, then dense")
    assert "nf4" not in lines[f"products of 512 rows: {dense}"]


def test_moving_and_casting_a_packed_model():
    model = load(checkpoint(CASES[0]), quantization_config=config("nf4"))
    want = logits(model, prompt(8))
    model.to(torch.bfloat16)
    assert model.dtype is torch.bfloat16 and model.device.type == "cpu"
    assert off(logits(model, prompt(8)), want) < 0.1
    assert set(model.memory_by_format()) == {"nf4", "bfloat16"}
    assert sum(model.memory_by_format().values()) == model.get_memory_footprint()
    assert "nf4" in str(model.plan())


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "both True"),
        ({"load_in_4bit": "yes"}, "load_in_4bit is 'yes'"),
        ({"quantization_config": {"load_in_4bit": True, "load_in_8bit": True}}, "both True"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}}, "known: fp4, nf4"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_blocksize": 48}}, "known: 32, 64"),
        (
            {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_typ": "nf4"}},
            "nearest: bnb_4bit_quant_type",
        ),
        ({"quantization_config": {"load_in_8bit": True, "llm_int8_threshold": -1}}, "expected a number >= 0"),
        ({"quantization_config": {"load_in_8bit": True, "llm_int8_has_fp16_weight": True}}, "not supported"),
        (
            {"quantization_config": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "int8"}},
            "bnb_4bit_compute_dtype",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "'quant_method' is 'gptq'.*known: bitsandbytes"),
        ({"quantization_config": {}}, "neither load_in_4bit nor load_in_8bit"),
        ({"quantization_config": 4}, "is a int"),
        ({"quantization_config": {"load_in_4bit": True}, "load_in_4bit": True}, "not both"),
        (
            {"quantization_config": {"load_in_4bit": True, "llm_int8_skip_modules": ["*"]}},
            "no linear layer to pack",
        ),
    ],
    ids=str,
)
def test_bad_options_are_named(options, message):
    with pytest.raises(TautError, match=message):
        load(checkpoint(CASES[0]), **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {}
    for name in ("nf4-double", "int8"):
        folders[name] = tmp_path_factory.mktemp("saved") / name
        load(checkpoint(CASES[0]), quantization_config=config(name)).save_pretrained(folders[name])
    return folders


def damaged(folder, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "missing", "message"),
    [
        ("nf4-double", f"{Q}.weight.absmax", r"q_proj\.weight\.absmax is missing"),
        ("nf4-double", f"{Q}.weight.nested_absmax", r"q_proj\.weight\.nested_absmax is missing"),
        (
            "nf4-double",
            f"{Q}.weight.quant_state.bitsandbytes__nf4",
            r"quant_state\.bitsandbytes__nf4.* is missing",
        ),
        ("int8", f"{Q}.SCB", r"q_proj\.SCB is missing"),
    ],
)
def test_a_missing_part_of_the_state_is_named(saved, name, missing, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load(damaged(saved[name], tmp_path, lambda tensors: tensors.pop(missing)))


def test_a_corrupt_state_is_refused(saved, tmp_path):
    def change(tensors):
        tensors[f"{Q}.weight.quant_state.bitsandbytes__nf4"][5] = 200

    with pytest.raises(CheckpointError, match=f"{Q}.weight: its quant state is not JSON"):
        load(damaged(saved["nf4-double"], tmp_path, change))


def test_packing_again_is_refused_and_the_same_request_is_not(saved):
    assert load(saved["nf4-double"], load_in_4bit=True).quantization_config.bnb_4bit_quant_type == "nf4"
    with pytest.raises(RequestError, match="quantized already, to nf4, and int8 is asked for"):
        load(saved["nf4-double"], load_in_8bit=True)
    with pytest.raises(RequestError, match="quantized already, to int8, and fp4 is asked for"):
        load(saved["int8"], load_in_4bit=True)
    single = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_blocksize=128)
    with pytest.raises(RequestError, match="already, with bnb_4bit_blocksize=64, and 128 is asked for"):
        load(saved["nf4-double"], quantization_config=single)
    with pytest.warns(UserWarning, match=r"without effect are llm_int8_threshold=4.0 \(it has 6.0\)"):
        load(saved["int8"], quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=4.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("nf4-double", "int8"):
            load(saved[name], quantization_config=config(name))


def test_a_config_that_promises_packed_weights_is_held_to_it(saved, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(checkpoint(CASES[0]), plain)
    settings = json.loads((plain / "config.json").read_text())
    settings["quantization_config"] = config("nf4").to_dict()
    (plain / "config.json").write_text(json.dumps(settings))
    with pytest.raises(RequestError, match="says the weights are nf4, but no linear layer is"):
        load(plain)
    settings["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (plain / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="'quant_method' is 'awq'"):
        load(plain)

    def change(tensors):
        for key in [key for key in tensors if key.startswith(f"{Q}.weight")]:
            del tensors[key]
        tensors[f"{Q}.weight"] = torch.randn(48, 48)

    with pytest.warns(UserWarning, match=f"says nf4, but {Q}.weight are not"):
        load(damaged(saved["nf4-double"], tmp_path, change))


def test_every_name_a_checkpoint_gives_its_linear_layers_is_known():
    for case in CASES:
        given = read_config(json.loads((checkpoint(case) / "config.json").read_text()))
        with torch.device("meta"):
            model = CausalLM(given)
        names = weights.linears(model, rules(model.config))
        stored = load_file(checkpoint(case) / "model.safetensors")
        tables = ("embed", "wte", "wpe", "norm", ".gate.")  # a router is no linear layer
        tables += ("router", "proj_bias")
        want = {n for n, t in stored.items() if t.ndim >= 2 and not any(word in n for word in tables)}
        want |= {"embed_out.weight"} & stored.keys()
        assert set(names) == want
