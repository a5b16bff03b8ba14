"""What every family must pass, from the table in `families.py`, on the CPU and, marked `gpu`, on a GPU."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from taut import AutoModelForCausalLM, weights
from taut.config import Moe
from taut.errors import RequestError
from taut.models import families, family, kind, rules
from tests.families import CASES, CONTEXT, VOCAB, Case, checkpoint, oracle

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_device = pytest.mark.parametrize("device", DEVICES)

LENGTHS = (9, 1, 23, 14)


def rows(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def padded(prompts: list[list[int]], side: str, device: str) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts)) + 1  # a column that is padding in every row
    ids, mask = torch.zeros(len(prompts), width, dtype=torch.int64), torch.zeros(len(prompts), width)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, place] = torch.tensor(prompt)
        mask[row, place] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def alone(model, prompt: list[int], device: str) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([prompt], device=device)).logits[0].float().cpu()


def load(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(checkpoint(case), dtype=dtype, device=device, **options)


def close(got: torch.Tensor, want: torch.Tensor, bound: float = 1e-4) -> None:
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= bound * want.abs().max().clamp_min(0.03)  # one logit may be near zero


def test_every_family_is_in_the_table():
    decoders = {name for name in families() if kind(family(name)) == "decoder"}
    assert {load(case).config.model_type for case in CASES} == decoders


@every_device
@every_case
def test_logits_equal_the_oracle_alone_and_padded(case, device):
    model, reference = load(case, device), oracle(case, device=device)
    prompts = rows(*LENGTHS)
    want = [alone(reference, prompt, device) for prompt in prompts]
    for side in ("left", "right"):
        inputs = padded(prompts, side, device)
        with torch.no_grad():
            got = model(**inputs).logits.cpu()
        for row, mask, expected in zip(got, inputs["attention_mask"].cpu().bool(), want, strict=True):
            close(row[mask], expected)
            assert (row[~mask] == 0).all()


@every_case
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_attention_implementation_agrees(case, implementation):
    if implementation == "sdpa" and case.name == "gemma2":
        pytest.skip("scaled_dot_product_attention has no soft-cap")
    prompt = rows(30)[0]
    close(
        alone(load(case, attn_implementation=implementation), prompt, "cpu"), alone(load(case), prompt, "cpu")
    )


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
    # A rounded score may choose another expert, which says nothing of rounding: here all are chosen.
    experts = case.options.get("num_experts", case.options.get("num_local_experts"))
    changes = {} if experts is None else {"num_experts_per_tok": experts}
    model, reference = load(case, device, dtype, **changes), oracle(case, dtype, device, **changes)
    exact = oracle(case, **changes)
    ours, theirs = [], []
    for prompt in rows(9, 14, 17, 23, 30):
        want = alone(exact, prompt, "cpu")
        ours.append((alone(model, prompt, device) - want).square().mean(-1))
        theirs.append((alone(reference, prompt, device) - want).square().mean(-1))
    moes = [layer.mlp for layer in model.config.layers if isinstance(layer.mlp, Moe)]
    assert all(moe.chosen == moe.experts for moe in moes)
    assert torch.cat(ours).mean() ** 0.5 <= 2 * torch.cat(theirs).mean() ** 0.5


@every_device
@every_case
def test_prefill_and_decode_equal_the_full_pass(case, device):
    # Within the trained context of the dynamic scaling, whose angles change with every token beyond it.
    prompts, new = rows(6, 1, 8), 8
    if "longrope" in case.name:
        prompts = rows(28, 1, 30)  # rows that pass the trained context while they decode
    model = load(case, device)
    out = model.generate(
        **padded(prompts, "left", device),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    for row, prompt in enumerate(prompts):
        made = out.sequences[row, -new:].tolist()
        for step, logits in enumerate(out.logits):  # longrope turns every key anew past its boundary
            full = alone(model, prompt + made[:step], device)[-1]
            close(logits[row].float().cpu(), full)
            assert full.argmax().item() == made[step]  # the engine's greedy tokens are the plain loop's


@every_case
def test_generate_equals_the_oracles(case):
    # transformers keeps longrope's keys from before the boundary except in Phi-3; stay within it.
    inputs = {"input_ids": torch.tensor(rows(11)), "attention_mask": torch.ones(1, 11)}
    model, reference = load(case), oracle(case)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = reference.generate(**inputs, **options)
    assert model.generate(**inputs, **options).tolist() == want.tolist()


@every_case
def test_save_is_byte_identical_and_transformers_reads_it(case, tmp_path):
    import transformers

    model = load(case)
    model.save_pretrained(tmp_path / "once")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "once", dtype=torch.float32)
    again.save_pretrained(tmp_path / "twice", max_shard_size="40KB")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "twice", dtype=torch.float32)
    third.save_pretrained(tmp_path / "third")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "third" / name).read_bytes()
    assert len(list((tmp_path / "twice").glob("*.safetensors"))) > 1
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "twice", attn_implementation=case.attention, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    close(alone(model, rows(19)[0], "cpu"), alone(theirs, rows(19)[0], "cpu"))


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "gptj", "gpt-neo", "bloom", "opt", "llama"])
def test_older_files_load_too(name, tmp_path):
    """Names without their first word, masks among the weights: as the first checkpoints on the Hub are."""
    case = next(case for case in CASES if case.name == name)
    tensors = load_file(checkpoint(case) / "model.safetensors")
    prefix = next(n.split(".")[0] for n in tensors if ".0." in n)
    masks = {"gpt2": "attn.bias", "gpt-neox": "attention.bias", "gptj": "attn.masked_bias"}
    masks |= {"gpt-neo": "attn.attention.masked_bias"}
    if name in masks:
        block = next(n.split(".0.")[0] for n in tensors if ".0." in n)
        tensors[f"{block}.0.{masks[name]}"] = torch.ones(1, 1, 4, 4)
    save_file({n.removeprefix(f"{prefix}."): t for n, t in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint(case) / "config.json").read_bytes())
    older = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(alone(older, rows(9)[0], "cpu"), alone(load(case), rows(9)[0], "cpu"))


@pytest.mark.parametrize("case", [c for c in CASES if "experts" in str(c.options)], ids=str)
def test_files_with_the_names_of_transformers_modules_load_too(case, tmp_path):
    """Experts in one tensor that files usually hold one by one, or under other names."""
    oracle(case).save_pretrained(tmp_path, save_original_format=False)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    usual = load(case)
    for (name, got), want in zip(other.named_parameters(), usual.parameters(), strict=True):
        assert torch.equal(got, want), name


def test_a_row_longer_than_the_learned_positions_is_refused():
    model = load(next(case for case in CASES if case.name == "opt"))
    with pytest.raises(RequestError, match="a row has 65 tokens, and the model has 64 positions"):
        model(torch.ones(1, CONTEXT + 1, dtype=torch.int64))


@every_case
def test_every_config_key_is_accounted_for(case):
    config = load(case).config
    assert config.unused == ()
    assert family(config.model_type).ARCHITECTURE in config.source["architectures"]


@every_device
@every_case
def test_loss_and_gradients_equal_the_oracle(case, device, tmp_path):
    model, reference = load(case, device), oracle(case, device=device)
    prompts = rows(*LENGTHS)
    prompts[2][5] = prompts[2][11] = 0  # the padding token, whose vector learns nothing there
    inputs = padded(prompts, "right", device)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[2, 4:9] = -100
    if "dynamic" in case.name or "longrope" in case.name:  # theirs turn by the batch's longest row
        inputs = {k: v[2:3, :23] for k, v in inputs.items()}
        labels = labels[2:3, :23]
    ours, theirs = model(**inputs, labels=labels), reference(**inputs, labels=labels)
    close(ours.loss.detach(), theirs.loss.detach(), 1e-5)
    ours.loss.backward()
    theirs.loss.backward()
    with torch.no_grad():
        for given in (model, reference):
            for param in given.parameters():
                param.copy_(param.grad)  # so that saving gives gradients under the files' names
    reference.save_pretrained(tmp_path)
    want = load_file(tmp_path / "model.safetensors")
    # Some gradients are zero but for rounding: a key bias where nothing rotates moves no weight.
    floor = 1e-3 * max(grad.abs().max() for grad in want.values())
    got = {tensor.name: tensor.read().cpu() for tensor in weights.store(model, rules(model.config))}
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert (got[name] - expected).abs().max() <= 2e-4 * max(expected.abs().max(), floor)


def counted(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Positions from each row's first token; 0 at padding."""
    return (inputs["attention_mask"].long().cumsum(1) - 1).clamp(min=0)


@every_device
@every_case
@torch.no_grad()
def test_the_loss_of_padded_rows_is_that_of_each_alone(case, device):
    model, reference, prompts = load(case, device), oracle(case, device=device), rows(9, 1, 13, 6)
    total = count = 0
    for prompt in (prompt for prompt in prompts if len(prompt) > 1):
        ids = torch.tensor([prompt], device=device)
        total += reference(ids, labels=ids).loss * (len(prompt) - 1)
        count += len(prompt) - 1
    for side in ("left", "right"):
        inputs = padded(prompts, side, device)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        for places in ({}, {"position_ids": counted(inputs)}):
            close(model(**inputs, **places, labels=labels).loss, total / count, 1e-5)
            with pytest.warns(UserWarning, match="other than -100 at padding"):
                loss = model(**inputs, **places, labels=inputs["input_ids"]).loss
            close(loss, total / count, 1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "gemma2", "qwen2", "falcon-7b", "mpt"])
@torch.no_grad()
def test_the_oracles_loss_is_another_where_a_pad_predicts_or_positions_count_pads(name):
    """What is left of the difference to transformers on the left: its last pad predicts the first token, and
    learned positions begin at the first pad unless they are given."""
    case = next(case for case in CASES if case.name == name)
    model, reference, inputs = load(case), oracle(case), padded(rows(9, 13, 6), "left", "cpu")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    places = {} if name in ("bloom", "mpt") else {"position_ids": counted(inputs)}  # ALiBi has none
    ours = model(**inputs, labels=labels).loss
    assert abs(reference(**inputs, **places, labels=labels).loss - ours) > 1e-3
    inside = labels.masked_fill(inputs["attention_mask"].cumsum(1) == 1, -100)
    close(ours, reference(**inputs, **places, labels=inside).loss, 1e-5)
    fits = abs(reference(**inputs, labels=inside).loss - ours) < 1e-4
    assert fits == (name != "gpt2")


@every_case
def test_hidden_states_equal_the_oracle(case):
    ids = torch.tensor(rows(12))
    with torch.no_grad():
        ours = load(case)(ids, output_hidden_states=True).hidden_states
        theirs = oracle(case)(ids, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs)
    for got, want in zip(ours, theirs, strict=True):
        close(got, want)


def test_lengths_pass_the_boundaries_they_are_meant_to():
    """The cases' windows and rope boundaries lie inside the prompts that the tests above use."""
    assert max(LENGTHS) < CONTEXT
    window = next(load(c) for c in CASES if c.name == "mistral-window")
    assert all(layer.attn.window == 5 for layer in window.config.layers)
    assert 30 < next(load(c) for c in CASES if c.name == "phi3-longrope").config.rope_boundary < 38
