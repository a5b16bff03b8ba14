"""What every encoder must pass, from the table in `encoders.py`, on the CPU and, marked `gpu`, on a GPU."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file

import taut
from taut.models import families, family, kind
from tests.encoders import CASES
from tests.families import VOCAB, Case, checkpoint, oracle
from tests.test_families import LENGTHS, close, every_device

HEADS = ["AutoModel"]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_head = pytest.mark.parametrize("head", HEADS)


def load(case: Case, head: str = "AutoModel", device: str = "cpu", dtype=torch.float32, **options):
    return getattr(taut, head).from_pretrained(checkpoint(case, head), dtype=dtype, device=device, **options)


def inputs(case: Case, side: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Rows of `LENGTHS` tokens in a grid with a column that is padding in every row, and what comes with each
    token of the case's family; padding is random too, so that whatever looks at it is found out."""
    config, generator = load(case).config, torch.Generator().manual_seed(5)
    rows, width = len(LENGTHS), max(LENGTHS) + 1
    mask = torch.zeros(rows, width, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        mask[row, slice(width - length, width) if side == "left" else slice(0, length)] = 1
    ids = torch.randint(3, VOCAB, (rows, width), generator=generator)
    found = {"input_ids": ids, "attention_mask": mask}
    for features in config.features:
        count = features.tables[0][1]
        found[features.given] = torch.randint(0, count, (rows, width), generator=generator)
    return {name: value.to(device) for name, value in found.items()}


def alone(model, given: dict[str, torch.Tensor], row: int, **options):
    """The output for one row of a grid, without its padding."""
    real = given["attention_mask"][row].bool()
    with torch.no_grad():
        return model(**{name: value[row : row + 1, real] for name, value in given.items()}, **options)


def fields(output) -> dict[str, torch.Tensor]:
    """The tensors of an output by name, those of a tuple numbered."""
    found = {}
    for name, value in output.items():
        values = (
            {f"{name}.{i}": v for i, v in enumerate(value)} if isinstance(value, tuple) else {name: value}
        )
        found |= values
    return found


def test_every_encoder_is_in_the_table():
    encoders = {name for name in families() if kind(family(name)) == "encoder"}
    assert {load(case).config.model_type for case in CASES} == encoders


@every_device
@every_head
@every_case
def test_every_output_equals_the_oracles_alone_and_padded(case, head, device):
    model, reference = load(case, head, device), oracle(case, device=device, auto=head)
    options = {"output_hidden_states": True, "output_attentions": True}
    for side in ("left", "right"):
        given = inputs(case, side, device)
        with torch.no_grad():
            got = fields(model(**given, **options))
            fused = fields(model(**given))
        for row in range(len(LENGTHS)):
            real = given["attention_mask"][row].bool()
            want = fields(alone(reference, given, row, **options))
            assert got.keys() == want.keys()
            for name, expected in want.items():
                values = got[name][row]
                if name.startswith("attentions"):
                    values = values[:, real][:, :, real]
                elif values.dim() == 2:
                    assert (values[~real] == 0).all()
                    values = values[real]
                close(values.cpu(), expected[0].cpu())
                if name in fused:
                    close(fused[name][row][real if fused[name].dim() == 3 else ...].cpu(), expected[0].cpu())


@every_case
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_attention_implementation_agrees(case, implementation):
    given = inputs(case, "right")
    got, want = load(case, attn_implementation=implementation)(**given), load(case)(**given)
    close(got.last_hidden_state, want.last_hidden_state)


@every_case
def test_bfloat16_rounds_no_worse_than_twice_the_oracle(case):
    model, given = load(case, dtype=torch.bfloat16), inputs(case, "right")
    exact, rounded = oracle(case, auto="AutoModel"), oracle(case, torch.bfloat16, auto="AutoModel")
    ours, theirs = [], []
    for row in (0, 2, 3):
        want = alone(exact, given, row).last_hidden_state
        ours.append((alone(model, given, row).last_hidden_state.float() - want).square().mean())
        theirs.append((alone(rounded, given, row).last_hidden_state.float() - want).square().mean())
    assert sum(ours) ** 0.5 <= 2 * sum(theirs) ** 0.5


@every_head
@every_case
def test_save_is_byte_identical_and_transformers_reads_it(case, head, tmp_path):
    model = load(case, head)
    assert model.config.unused == () and not model.load_report.fresh
    model.save_pretrained(tmp_path / "once")
    getattr(taut, head).from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    saved, original = (
        load_file(f / "model.safetensors") for f in (tmp_path / "once", checkpoint(case, head))
    )
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)
    theirs, info = getattr(transformers, head).from_pretrained(tmp_path / "once", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(theirs).__name__ == type(oracle(case, auto=head)).__name__ == model.architecture()
