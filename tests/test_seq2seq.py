"""What every encoder-decoder must pass, from the table in `seq2seq.py`; marked `gpu`, on a GPU too."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file

import taut
from taut import AutoModelForSeq2SeqLM, weights
from taut.models import families, family, kind
from tests.families import VOCAB, Case, checkpoint, oracle
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
    return oracle(case, dtype, device, auto=AUTO)


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
