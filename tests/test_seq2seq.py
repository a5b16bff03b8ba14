"""What every encoder-decoder must pass, from the table in `seq2seq.py`; marked `gpu`, on a GPU too."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import taut
from taut import AutoModelForSeq2SeqLM, weights
from taut.engine.drafts import Ledger
from taut.engine.lookup import Lookup
from taut.engine.request import Request, SamplingParams
from taut.engine.resident import Resident
from taut.errors import ConfigError, RequestError
from taut.models import families, family, kind
from tests.families import CASES as DECODERS
from tests.families import CONTEXT, VOCAB, Case, checkpoint, oracle
from tests.seq2seq import CASES
from tests.test_encoders import fields
from tests.test_families import close, every_device, padded, rows

AUTO = "AutoModelForSeq2SeqLM"
every_case = pytest.mark.parametrize("case", CASES, ids=str)

SOURCES, TARGETS = (9, 1, 23, 14), (5, 17, 1, 8)


def load(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32, auto: str = AUTO, **options):
    path = checkpoint(case, AUTO)
    return getattr(taut, auto).from_pretrained(path, dtype=dtype, device=device, **options)


def reference(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    theirs = oracle(case, dtype, device, auto=AUTO)
    if "vocab_size" in inspect.signature(theirs._get_top_k_continuations).parameters:
        # Then their beams count the config's ids, which are the encoder's, instead of the logits'.
        theirs.config.vocab_size = theirs.get_output_embeddings().out_features
    return theirs


def limited(prompts: list[list[int]]) -> list[list[int]]:
    """Ids that both tables of every case have."""
    return [[3 + token % (VOCAB - 30) for token in prompt] for prompt in prompts]


def prompts() -> tuple[list[list[int]], list[list[int]]]:
    return limited(rows(*SOURCES)), limited(rows(*TARGETS))


def alone(model, source: list[int], target: list[int], device: str = "cpu", **options):
    with torch.no_grad():
        ids, decoder = (torch.tensor([row], device=device) for row in (source, target))
        return model(ids, decoder_input_ids=decoder, **options)


def grids(side: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The prompts in padded grids, the decoder's padded on the other side than the encoder's."""
    sources, targets = prompts()
    decoder = padded(targets, "right" if side == "left" else "left", device)
    return padded(sources, side, device) | {f"decoder_{name}": value for name, value in decoder.items()}


def test_every_encoder_decoder_is_in_the_table():
    known = {name for name in families() if kind(family(name)) == "encoder-decoder"}
    assert {load(case).config.model_type for case in CASES} == known


@every_device
@every_case
def test_every_output_equals_the_oracles_alone_and_padded(case, device):
    model, theirs = load(case, device), reference(case, device=device)
    options = {"output_hidden_states": True, "output_attentions": True}
    want = [alone(theirs, *pair, device, **options) for pair in zip(*prompts(), strict=True)]
    for side in ("left", "right"):
        given = grids(side, device)
        with torch.no_grad():
            got, fused = fields(model(**given, **options)), fields(model(**given))
        for row, expected in enumerate(map(fields, want)):
            source, target = (given[f"{name}attention_mask"][row].bool() for name in ("", "decoder_"))
            # theirs always has a cache
            assert got.keys() == {name for name in expected if not name.startswith("past")}
            for name, values in got.items():
                own = source if name.startswith("encoder") else target
                values, wanted = values[row], expected[name][0]
                if "attentions" in name:
                    values = values[:, own][:, :, source if name.startswith("cross") else own]
                else:
                    assert (values[~own] == 0).all()
                    values = values[own]
                    if name in fused:
                        close(fused[name][row][own].cpu(), wanted.cpu())
                close(values.cpu(), wanted.cpu())


@every_case
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_attention_implementation_agrees(case, implementation):
    given = grids("right")
    with torch.no_grad():
        got, want = load(case, attn_implementation=implementation)(**given), load(case)(**given)
    close(got.logits, want.logits)


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
    model, rounded, exact = load(case, device, dtype), reference(case, dtype, device), reference(case)
    ours, theirs = [], []
    for length in (9, 14, 17, 23, 30):
        source, target = limited(rows(length)), limited(rows(length + 1))
        want = alone(exact, source[0], target[0]).logits
        for found, made in ((ours, model), (theirs, rounded)):
            logits = alone(made, source[0], target[0], device).logits.float().cpu()
            found.append((logits - want).square().mean())
    assert sum(ours) ** 0.5 <= 2 * sum(theirs) ** 0.5


@every_device
@every_case
def test_loss_and_gradients_equal_the_oracle(case, device, tmp_path):
    model, theirs = load(case, device), reference(case, device=device)
    sources, targets = prompts()
    for prompt in (sources[2], targets[1]):
        prompt[5] = prompt[11] = 0  # the padding token, whose vector learns nothing there
    given, decoder = padded(sources, "right", device), padded(targets, "right", device)
    labels = decoder["input_ids"].masked_fill(decoder["attention_mask"] == 0, -100)
    labels[1, 4:9] = -100
    ours, wanted = model(**given, labels=labels), theirs(**given, labels=labels)
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
    floor = 1e-3 * max(grad.abs().max() for grad in want.values())
    got = {tensor.name: tensor.read().cpu() for tensor in weights.store(model, model.rules())}
    # Positions that are computed are in our files whether or not they are in theirs, as is a table unused.
    assert {n for n in got.keys() ^ want.keys() if "embed_positions" not in n} <= {"model.shared.weight"}
    for name, expected in want.items():
        if name in got:
            assert (got[name] - expected).abs().max() <= 2e-4 * max(expected.abs().max(), floor), name


@every_case
def test_save_is_byte_identical_and_transformers_reads_it(case, tmp_path):
    model = load(case)
    assert model.config.unused == ()
    model.save_pretrained(tmp_path / "once")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "once", dtype=torch.float32)
    again.save_pretrained(tmp_path / "twice", max_shard_size="40KB")
    third = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "twice", dtype=torch.float32)
    third.save_pretrained(tmp_path / "third")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "third" / name).read_bytes()
    theirs, info = transformers.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "twice", output_loading_info=True
    )
    assert info["missing_keys"] <= {"model.shared.weight"}  # which nothing reads where there are two tables
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    source, target = limited(rows(19, 12))
    close(alone(model, source, target).logits, alone(theirs, source, target).logits)


# -- generation --------------------------------------------------------------------------------------

PLAIN = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def theirs_alone(model, source: list[int], **options) -> list[list[int]]:
    """transformers' tokens for one row; without its cache, which is too short for a deeper decoder."""
    given = {"input_ids": torch.tensor([source]), "attention_mask": torch.ones(1, len(source))}
    return model.generate(**given, **PLAIN | options, use_cache=False).tolist()


@every_device
@every_case
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_equals_the_oracles(case, beams, device):
    model, theirs, (sources, _) = load(case, device), reference(case), prompts()
    options = {"max_new_tokens": 12, "num_beams": beams, "no_repeat_ngram_size": 2, "forced_bos_token_id": 7}
    want = [row for source in sources for row in theirs_alone(theirs, source, **options)]
    assert len({tuple(row) for row in want}) > 1  # what is said depends on the source
    for side in ("left", "right"):
        assert model.generate(**padded(sources, side, device), **PLAIN | options).tolist() == want


@every_device
@every_case
def test_prefill_and_decode_equal_the_full_pass(case, device):
    model, new, (sources, targets) = load(case, device), 6, prompts()
    decoder = padded(targets, "left", device)
    out = model.generate(
        **padded(sources, "right", device),
        decoder_input_ids=decoder["input_ids"],
        decoder_attention_mask=decoder["attention_mask"],
        max_new_tokens=new,
        return_dict_in_generate=True,
        output_logits=True,
        **PLAIN,
    )
    start = model.config.decoder_start_token_id
    for row, (source, target) in enumerate(zip(sources, targets, strict=True)):
        made = out.sequences[row, -new:].tolist()
        for step, logits in enumerate(out.logits):
            full = alone(model, source, [start, *target, *made[:step]], device).logits[0, -1].cpu()
            close(logits[row].float().cpu(), full)
            assert full.argmax().item() == made[step]


@pytest.mark.parametrize(
    "options",
    [
        {"encoder_no_repeat_ngram_size": 1},
        {"encoder_no_repeat_ngram_size": 2, "num_beams": 2},
        {"encoder_repetition_penalty": 2.5, "no_repeat_ngram_size": 1},
        {"encoder_repetition_penalty": 0.4, "encoder_no_repeat_ngram_size": 3, "repetition_penalty": 1.3},
        {"min_length": 9, "forced_eos_token_id": 2, "eos_token_id": 11},
    ],
    ids=str,
)
def test_options_about_what_the_encoder_read(options):
    model, theirs = load(named("bart")), reference(named("bart"))
    source, said = [7, 8, 9, 7], []
    while source[-2:] != said[-2:]:  # until it would repeat what it reads
        said = theirs_alone(theirs, source, max_new_tokens=9)[0]
        source += said[-2:] if said[-2:] != source[-2:] else []
    inputs = {"input_ids": torch.tensor([source]), "attention_mask": torch.ones(1, len(source))}
    want = theirs_alone(theirs, source, max_new_tokens=9, **options)
    rest = {name: value for name, value in options.items() if name in ("num_beams", "no_repeat_ngram_size")}
    assert want != theirs_alone(theirs, source, max_new_tokens=9, **rest)
    assert model.generate(**inputs, max_new_tokens=9, **PLAIN | options).tolist() == want


@pytest.mark.parametrize("name", ["t5", "mbart"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.4},
        {"num_beams": 4, "early_stopping": True, "eos_token_id": list(range(20, 60)), "length_penalty": -1.0},
        {"num_beams": 2, "prefix_allowed_tokens_fn": lambda row, ids: [3 + len(ids), 20, 33, int(ids[-1])]},
        {"prefix_allowed_tokens_fn": lambda row, ids: [7, 20, 33 + len(ids)], "repetition_penalty": 1.5},
    ],
    ids=",".join,
)
def test_sequences_and_scores_are_those_of_transformers(name, options):
    model, theirs, (sources, _) = load(named(name)), reference(named(name)), prompts()
    given = {"input_ids": torch.tensor(sources[:1]), "attention_mask": torch.ones(1, len(sources[0]))}
    flags = {"max_new_tokens": 9, "return_dict_in_generate": True, "output_scores": True}
    want = theirs.generate(**given, **PLAIN | flags | options)
    got = model.generate(**given, **PLAIN | flags | options)
    assert got.sequences.tolist() == want.sequences.tolist()
    if "num_beams" in options:
        torch.testing.assert_close(got.sequences_scores, want.sequences_scores, rtol=1e-5, atol=1e-5)
        assert got.beam_indices.tolist() == want.beam_indices.tolist()
    torch.testing.assert_close(got.scores[0], want.scores[0], rtol=1e-4, atol=1e-4)


def test_decoders_begin_as_they_are_told():
    case = next(case for case in CASES if case.name == "t5")
    model, theirs, (sources, _) = load(case), reference(case), prompts()
    source, options = sources[0], {"max_new_tokens": 5}
    inputs = {"input_ids": torch.tensor([source]), "attention_mask": torch.ones(1, len(source))}
    for given in ([[9, 8]], [[0, 9, 8]]):  # with its start token and without
        decoder = {"decoder_input_ids": torch.tensor(given)}
        want = theirs_alone(theirs, source, **options, **decoder)
        assert want[0][:3] == [0, 9, 8]
        assert model.generate(**inputs, **options, **decoder, **PLAIN).tolist() == want
    want = [theirs_alone(theirs, source, **options, decoder_start_token_id=start)[0] for start in (5, 6)]
    twice = {name: value.repeat(2, 1) for name, value in inputs.items()}
    assert model.generate(**twice, **options, decoder_start_token_id=[5, 6], **PLAIN).tolist() == want
    assert list(model.stream(**inputs, **options, **PLAIN)) == theirs_alone(theirs, source, **options)[0][1:]


def test_encoder_outputs_take_the_place_of_a_source():
    case = next(case for case in CASES if case.name == "mbart")
    model, given = load(case), grids("left")
    source = {name: given[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        states = model(**given).encoder_last_hidden_state
        want = model(**given).logits
        for form in (states, (states,), model.get_encoder()(**source)):
            rest = {name: value for name, value in given.items() if name != "input_ids"}
            assert torch.equal(model(**rest, encoder_outputs=form).logits, want)
    options = {"max_new_tokens": 6, "decoder_start_token_id": 4, **PLAIN}
    mask = source["attention_mask"]
    got = model.generate(encoder_outputs=(states,), attention_mask=mask, num_beams=2, **options)
    assert torch.equal(got, model.generate(**source, num_beams=2, **options))


def test_bad_requests_are_named():
    case = next(case for case in CASES if case.name == "marian-two-tables")
    model, ids = load(case), torch.tensor([[5, 6, 7]])
    decoder = taut.AutoModelForCausalLM.from_pretrained(checkpoint(DECODERS[0]))
    for options, message in (
        ({"decoder_input_ids": [[VOCAB - 10]]}, "decoder_input_ids row 0, position 0: token id 121"),
        ({"input_ids": torch.tensor([[VOCAB]])}, "input_ids row 0, position 0: token id 131"),
        ({"input_ids": torch.zeros(1, CONTEXT + 1, dtype=torch.int64) + 4}, "the encoder's context is 64"),
        ({"decoder_input_ids": [[4], [5]]}, "decoder_input_ids has 2 rows, and the encoder reads 1"),
        ({"decoder_start_token_id": [4, 5]}, "decoder_start_token_id has 2 tokens for 1 rows"),
        ({"encoder_outputs": torch.zeros(1, 2, 3)}, r"its last_hidden_state \[rows, width, 48\] first"),
        ({"guidance_scale": 2.0}, "guidance_scale is 2.0, which is for decoders"),
        ({"assistant_model": load(named("bart"))}, "has 131 tokens in its vocabulary and the model 111"),
        ({"assistant_model": decoder}, "is a llama without an encoder and the model a marian with an enc"),
        (
            {"assistant_model": model, "encoder_outputs": torch.zeros(1, 2, 48)},
            "encoder_outputs are states of the model's own encoder",
        ),
    ):
        with pytest.raises(RequestError, match=message):
            model.generate(**{"input_ids": ids, "max_new_tokens": 2, **options})
    with pytest.raises(RequestError, match=r"decoder_input_ids\[0, 0\] is 120; the vocabulary has ids 0"):
        model(ids, decoder_input_ids=torch.tensor([[120]]))
    with pytest.raises(RequestError, match="have 2 rows and the encoder's 1"):
        model(ids, decoder_input_ids=torch.tensor([[5], [6]]))
    with pytest.raises(RequestError, match="give exactly one of decoder_input_ids and decoder_inputs_embeds"):
        model(ids)
    with pytest.raises(ConfigError, match="a family of encoder-decoders, which AutoModelForCausalLM"):
        load(case, auto="AutoModelForCausalLM")


# -- what is particular ---------------------------------------------------------------------------------


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@every_device
@pytest.mark.parametrize("name", ["t5", "t5-gated-silu"])
def test_t5_in_float16_holds_what_float16_cannot(name, device, tmp_path):
    """Sums between blocks and products of the MLP beyond 65504, as T5 1.1 and Flan have them."""
    tensors = load_file(checkpoint(named(name), AUTO) / "model.safetensors")
    for key, tensor in tensors.items():
        if key.endswith("wo.weight"):
            tensors[key] = tensor * 80000
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint(named(name), AUTO) / "config.json").read_bytes())
    exact = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float32)
    half = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16, device=device)
    sources, targets = prompts()
    for source, target in zip(sources[::2], targets[::2], strict=True):
        want = alone(exact, source, target, output_hidden_states=True)
        got = alone(half, source, target, device, output_hidden_states=True)
        assert max(state.abs().max() for state in want.encoder_hidden_states) > 65504
        assert got.encoder_last_hidden_state.dtype is torch.float16
        for field in ("encoder_hidden_states", "decoder_hidden_states"):
            for ours, theirs in zip(got[field], want[field], strict=True):
                close(ours.float().cpu(), theirs, 2e-2)
        close(got.logits.cpu(), want.logits, 2e-2)
        tokens = half.generate(torch.tensor([source], device=device), max_new_tokens=4, **PLAIN)
        assert tokens.tolist() == exact.generate(torch.tensor([source]), max_new_tokens=4, **PLAIN).tolist()


@pytest.mark.parametrize("name", ["t5", "bart-uneven-scaled", "marian-two-tables"])
def test_both_stacks_without_a_head(name, tmp_path):
    case, given = named(name), grids("right")
    transformers.AutoModel.from_pretrained(checkpoint(case, AUTO)).save_pretrained(tmp_path / "theirs")
    for path in (checkpoint(case, AUTO), tmp_path / "theirs"):
        model = taut.AutoModel.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            got, want = model(**given), load(case)(**given, output_hidden_states=True)
        assert torch.equal(got.last_hidden_state, want.decoder_hidden_states[-1])
        assert torch.equal(got.encoder_last_hidden_state, want.encoder_last_hidden_state)
    model.save_pretrained(tmp_path / "ours")
    theirs, info = transformers.AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(theirs).__name__ == model.architecture() == f"{case.family}Model"


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_the_encoder_alone(name, tmp_path):
    case, given = named(name), padded(prompts()[0], "left", "cpu")
    kind = getattr(taut, f"{case.family}EncoderModel")
    transformers.AutoModelForTextEncoding.from_pretrained(checkpoint(case, AUTO)).save_pretrained(tmp_path)
    with torch.no_grad():
        want = load(case)(**given, decoder_input_ids=given["input_ids"]).encoder_last_hidden_state
        for path in (checkpoint(case, AUTO), tmp_path):
            model = kind.from_pretrained(path, dtype=torch.float32)
            assert torch.equal(model(**given).last_hidden_state, want)
    model.save_pretrained(tmp_path / "ours")
    theirs, info = transformers.AutoModelForTextEncoding.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(theirs).__name__ == model.architecture() == kind.__name__


@pytest.mark.parametrize("name", ["t5-gated-unscaled", "mt5", "bart", "marian-two-tables"])
def test_a_head_in_the_file_is_the_models_though_the_config_ties_it(name, tmp_path):
    """As in T5 1.1, Flan and mT5; and tables under other names, as files have them that dropped copies."""
    path, source, target = checkpoint(named(name), AUTO), *limited(rows(11, 7))
    config = (path / "config.json").read_bytes()
    tensors = load_file(path / "model.safetensors")
    table = next(key for key in ("shared.weight", "model.shared.weight") if key in tensors or "two" in name)
    table = "model.decoder.embed_tokens.weight" if "two" in name else table
    head = torch.randn(tensors[table].shape, generator=torch.Generator().manual_seed(0)) * 0.2
    copies = {"lm_head.weight": tensors[table].clone()}
    if "two" not in name:
        alias = table.replace("shared", "encoder.embed_tokens")
        copies |= {alias: tensors[table].clone(), alias.replace("encoder", "decoder"): tensors[table].clone()}
    renamed = {("lm_head.weight" if key == table else key): value for key, value in tensors.items()}
    for at, changed in enumerate(({**tensors, "lm_head.weight": head}, {**tensors, **copies}, renamed)):
        folder = tmp_path / str(at)
        folder.mkdir()
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_bytes(config)
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
        assert model.config.tied == (at > 0)
        theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
        want = alone(theirs, source, target).logits
        close(alone(model, source, target).logits, want)
        model.save_pretrained(folder / "saved")
        theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "saved")
        close(alone(theirs, source, target).logits, want)


@pytest.mark.parametrize("name", ["t5", "bart-uneven-scaled", "mbart", "pegasus-scaled", "marian-scaled"])
def test_embeddings_in_place_of_tokens(name):
    case, (source, target) = named(name), limited(rows(11, 7))
    model, theirs = load(case), reference(case)
    table = model.get_input_embeddings().weight.detach()
    given = {"inputs_embeds": table[source][None], "decoder_inputs_embeds": table[target][None]}
    with torch.no_grad():
        close(model(**given).logits, theirs(**given).logits)


@pytest.mark.parametrize("name", ["t5", "bart", "mbart", "marian"])
def test_what_the_decoder_reads_for_labels(name):
    case = named(name)
    model, theirs = load(case), reference(case)
    labels = torch.tensor([[5, 6, 7, -100], [8, -100, -100, -100], [5, 4, 3, 2]])
    want = theirs.prepare_decoder_input_ids_from_labels(labels).tolist()
    assert model.prepare_decoder_input_ids_from_labels(labels).tolist() == want
    ids = torch.tensor([[5, 6, 7, 9]])
    if "bart" in name:  # denoising: without anything else it reads what the encoder reads
        with torch.no_grad():
            close(model(ids).logits, theirs(ids).logits)


@every_case
def test_past_key_values_continue_a_row(case):
    model, given = load(case), grids("right")
    ids, mask = given["decoder_input_ids"], given["decoder_attention_mask"]
    first = {**given, "decoder_input_ids": ids[:, :9], "decoder_attention_mask": mask[:, :9]}
    with torch.no_grad():
        want = model(**given)
        begun = model(**first, use_cache=True)
        states = (begun.encoder_last_hidden_state,)
        rest = {"attention_mask": given["attention_mask"], "encoder_outputs": states}
        for columns in (slice(9, 12), slice(12, None)):
            step = {"decoder_input_ids": ids[:, columns], "decoder_attention_mask": mask[:, columns]}
            got = model(**rest, **step, past_key_values=begun.past_key_values)
            close(got.logits, want.logits[:, columns])


def test_options_of_generation_that_older_configs_hold(tmp_path):
    path = checkpoint(named("bart"), AUTO)
    config = json.loads((path / "config.json").read_text())
    older = {"num_beams": 4, "min_length": 5, "length_penalty": 2.0, "forced_bos_token_id": 7}
    fairseq = {"normalize_before": False, "add_final_layer_norm": False, "extra_pos_embeddings": 2}
    others = {"num_hidden_layers": 2, "_num_labels": 3, "output_past": True, "prefix": " "}
    (tmp_path / "config.json").write_text(json.dumps(config | older | fairseq | others))
    (tmp_path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.config.unused == ()
    assert {name: getattr(model.generation_config, name) for name in older} == older
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    ids, mask = torch.tensor([[5, 6, 7, 9]]), torch.ones(1, 4)
    want = theirs.generate(ids, attention_mask=mask, max_new_tokens=8)
    assert model.generate(ids, attention_mask=mask, max_new_tokens=8).tolist() == want.tolist()
    model.save_pretrained(tmp_path / "saved")  # from now on generation_config.json has them
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved")
    assert again.generation_config.num_beams == 4


@every_device
@pytest.mark.parametrize("name", ["t5", "bart", "marian"])
def test_assisted_tokens_are_those_of_transformers(name, device, monkeypatch):
    """A draft model reads each source by itself; greedy and drawn rows are what they are without guesses."""
    monkeypatch.setattr(Ledger, "affords", lambda self, rows, drafted: True)
    case, (sources, _) = named(name), prompts()
    layers = {"num_layers": 1} if name == "t5" else {"encoder_layers": 1, "decoder_layers": 1}
    small = Case(f"{name}-small", case.family, layers, case.base)
    model, draft = load(case, device), load(small, device)
    greedy = {"max_new_tokens": 12, **PLAIN}
    given = {"input_ids": torch.tensor(sources[:1]), "attention_mask": torch.ones(1, len(sources[0]))}
    want = reference(case).generate(**given, **greedy, assistant_model=reference(small))
    together = padded(sources, "left", device)
    resident = Resident.of(model)
    for assistant in (draft, model):
        got = model.generate(**together, **greedy, assistant_model=assistant)
        assert got[:1].tolist() == want.tolist()
        assert torch.equal(got, model.generate(**together, **greedy))
        draw = {**greedy, "do_sample": True, "seed": 3, "num_return_sequences": 2}
        drawn = model.generate(**together, **draw)
        assert torch.equal(model.generate(**together, **draw, assistant_model=assistant), drawn)
        drafts = Resident.of(assistant)._drafts
        assert drafts.pages.free == drafts.pages.count and not drafts.has_work
    counted = []
    for options in ({}, {"assistant_model": model}):
        engine, ran = resident._engine, []
        monkeypatch.setattr(engine, "_step", lambda step=engine._step, ran=ran: ran.append(1) or step())
        model.generate(**together, **greedy, **options)
        counted.append(len(ran))
    assert counted[1] < counted[0] / 2  # the model itself guesses right


def test_guesses_are_looked_up_in_the_source():
    request = Request([2], SamplingParams(9), source=(7, 8, 9, 4), output=[7, 8])
    assert Lookup(2, source=True).propose([request]) == {request: [9, 4]}
    assert Lookup(2).propose([request]) == {}


@pytest.mark.parametrize("name", ["t5", "marian"])
def test_the_ways_to_generate_agree(name):
    """Drawn rows are those of the row alone; guesses, sets of prompts and streams change no token."""
    model, (sources, _) = load(named(name)), prompts()
    draw = {"do_sample": True, "top_k": 0, "max_new_tokens": 7, "eos_token_id": None, "pad_token_id": 0}
    seeds = [5, 6, 7, 8]
    got = model.generate(**padded(sources, "left", "cpu"), seed=seeds, **draw).tolist()
    for source, seed, row in zip(sources, seeds, got, strict=True):
        assert model.generate(torch.tensor([source]), seed=seed, **draw).tolist() == [row]
    several = model.generate(torch.tensor([sources[0]]), seed=seeds, num_return_sequences=4, **draw).tolist()
    assert several[0] == got[0] and len({tuple(row) for row in several}) == 4
    greedy = {"max_new_tokens": 9, **PLAIN}
    want = model.generate(**padded(sources, "left", "cpu"), **greedy)
    guessed = model.generate(**padded(sources, "left", "cpu"), prompt_lookup_num_tokens=3, **greedy)
    assert torch.equal(guessed, want)
    assert model.generate_batch(sources, **greedy) == want[:, 1:].tolist()
    with torch.no_grad():
        fused = model(**grids("left")).logits
        model.to_bettertransformer()
        close(model(**grids("left")).logits, fused)
        close(model.reverse_bettertransformer()(**grids("left")).logits, fused)
