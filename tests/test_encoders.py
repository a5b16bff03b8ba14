"""What every encoder must pass, from the table in `encoders.py`, on the CPU and, marked `gpu`, on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import taut
from taut import weights
from taut.layers.linear import Linear
from taut.layers.norm import Norm
from taut.models import families, family, kind
from tests.encoders import CASES
from tests.families import CONTEXT, VOCAB, Case, checkpoint, oracle
from tests.test_families import LENGTHS, close, every_device

HEADS = (
    "AutoModel",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)
# Every head that transformers has for a family, of its first case; of its others the usual one.
FIRST = {case.family: case for case in reversed(CASES)}
MODELS = [
    (case, head)
    for case in CASES
    for head in HEADS
    if getattr(transformers, f"{case.family}Config") in getattr(transformers, head)._model_mapping
    and (
        head == "AutoModelForMaskedLM"
        or FIRST[case.family] is case
        or ("Sequence" in head and "classifier_pooling" in case.options)
    )
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_model = pytest.mark.parametrize(("case", "head"), MODELS, ids=str)
every_head = pytest.mark.parametrize(("case", "head"), [m for m in MODELS if m[1] != "AutoModel"], ids=str)


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
        values = torch.randint(0, count, (rows, width, 4), generator=generator).sort(-1).values
        values = values[..., [0, 2, 1, 3]]  # left, upper, right and lower edge
        found[features.given] = values if features.given == "bbox" else values[..., 0]
    return {name: value.to(device) for name, value in found.items()}


def alone(model, given: dict[str, torch.Tensor], row: int, **options):
    """The output for one row of a grid, without its padding."""
    real = given["attention_mask"][row].bool()
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


def distance(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """How far tensors are from those that they should be, of their size."""
    off = sum((got.float() - want).square().mean() for got, want in pairs)
    return float((off / sum(want.square().mean() for _, want in pairs)) ** 0.5)


def luck(head: str) -> float:
    """By how much an oracle's own error may be too small, where it is that of the few scores of a head."""
    return 0.0 if head == "AutoModel" else 2**-7


def test_every_encoder_is_in_the_table():
    encoders = {name for name in families() if kind(family(name)) == "encoder"}
    assert {load(case).config.model_type.replace("-", "_") for case in CASES} == encoders


@every_device
@every_model
@torch.no_grad()
def test_every_output_equals_the_oracles_alone_and_padded(case, head, device):
    model, reference = load(case, head, device), oracle(case, device=device, auto=head)
    options = {"output_hidden_states": True, "output_attentions": True}

    def of_row(name: str, value: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Of a row, what is of its tokens."""
        if name == "pooler_output" or (name == "logits" and "Sequence" in head):
            return value
        if name.startswith("attentions"):
            return value[:, real][:, :, real]
        assert (
            value[~real] == (torch.finfo(value.dtype).min if "Question" in head and value.dim() == 1 else 0)
        ).all()
        return value[real]

    for side in ("left", "right"):
        given = inputs(case, side, device)
        got, fused = fields(model(**given, **options)), fields(model(**given))
        for row in range(len(LENGTHS)):
            real = given["attention_mask"][row].bool()
            want = fields(alone(reference, given, row, **options))
            assert list(got) == list(want)
            for name, expected in want.items():
                for found in (got, fused):
                    if name in found:
                        close(of_row(name, found[name][row], real).cpu(), expected[0].cpu())


def labelled(
    case: Case, head: str, given: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Labels for a grid's rows, and the share that each row has in the loss of all."""
    real, generator = given["attention_mask"].bool(), torch.Generator().manual_seed(6)
    rows = len(real)
    if "Token" in head or "Masked" in head:
        labels = torch.randint(0, 2 if "Token" in head else VOCAB, real.shape, generator=generator).to(
            real.device
        )
        labels[~real | (torch.rand(real.shape, generator=generator) < 0.3).to(real.device)] = -100
        counts = (labels != -100).sum(1)
        return {"labels": labels}, (counts / counts.sum()).tolist()
    if "Sequence" in head:
        return {"labels": torch.tensor([1, 0, 1, 1], device=real.device)}, [1 / rows] * rows
    spans = {"start_positions": real.long().argmax(1), "end_positions": real.long().cumsum(1).argmax(1)}
    return spans, [1 / rows] * rows


@every_device
@pytest.mark.parametrize("case", FIRST.values(), ids=str)
@torch.no_grad()
def test_packed_weights_compute_what_they_stand_for(case, device, tmp_path):
    """In 4 bits exactly, in 8 but for the rounding of what they multiply; heads and poolers stay dense."""
    head, given = "AutoModelForSequenceClassification", inputs(case, "left", device)
    for options, bound in (({"load_in_4bit": True}, 1e-4), ({"load_in_8bit": True}, 0.05)):
        model, dense = load(case, head, device, **options), load(case, head, device)
        assert model.is_quantized and model.get_memory_footprint() < dense.get_memory_footprint()
        for name, module in model.named_modules():
            if isinstance(module, Linear) and module.packed is not None:
                assert "classifier" not in name and "pooler" not in name
                dense.get_submodule(name).weight.copy_(module.packed.dequantize(torch.float32))
        close(model(**given).logits, dense(**given).logits, bound)
        model.save_pretrained(tmp_path / str(bound))
        again = getattr(taut, head).from_pretrained(tmp_path / str(bound), device=device)
        assert torch.equal(again(**given).logits, model(**given).logits)


@every_device
@every_head
def test_loss_and_gradients_equal_the_oracles_of_each_row_alone(case, head, device, tmp_path):
    model, reference = load(case, head, device), oracle(case, device=device, auto=head)
    given = inputs(case, "left", device)
    labels, shares = labelled(case, head, given)
    loss, want = model(**given, **labels).loss, 0
    for row, share in enumerate(shares):
        if share:
            real = given["attention_mask"][row].bool()
            own = {n: v[row : row + 1] if v.dim() == 1 else v[row : row + 1, real] for n, v in labels.items()}
            if "Question" in head:
                own = {n: v - real.long().argmax() for n, v in own.items()}
            want += share * alone(reference, given, row, **own).loss
    close(loss.detach(), want.detach(), 1e-5)
    loss.backward()
    want.backward()
    with torch.no_grad():
        for param in (*model.parameters(), *reference.parameters()):
            param.copy_(torch.zeros_like(param) if param.grad is None else param.grad)
    reference.save_pretrained(tmp_path)  # so that saving gives gradients under the files' names
    expected = load_file(tmp_path / "model.safetensors")
    got = {tensor.name: tensor.read().cpu() for tensor in weights.store(model, model.rules())}
    # Some gradients are zero but for rounding: one bias of all scores of a softmax moves no share.
    floor = 1e-2 * max(grad.abs().max() for grad in expected.values())
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max() <= 2e-4 * max(gradient.abs().max(), floor), name


@pytest.mark.parametrize("head", ["AutoModelForTokenClassification", "AutoModelForMaskedLM"])
def test_labels_of_padding_are_warned_of_and_count_for_nothing(head):
    model, given = load(FIRST["Bert"], head), inputs(FIRST["Bert"], "left")
    labels = torch.ones_like(given["input_ids"])
    with pytest.warns(UserWarning, match="other than -100 at padding"):
        loss = model(**given, labels=labels).loss
    assert torch.equal(loss, model(**given, labels=labels.where(given["attention_mask"] != 0, -100)).loss)


@every_case
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_attention_implementation_agrees(case, implementation):
    given = inputs(case, "right")
    got, want = load(case, attn_implementation=implementation)(**given), load(case)(**given)
    close(got.last_hidden_state, want.last_hidden_state)


@pytest.mark.parametrize("family", ["Bert", "Albert", "ModernBert"])
def test_sums_inside_of_norms_change_nothing(family, monkeypatch):
    """As many rows are added on a GPU."""
    case = FIRST[family]
    model, given, ran = load(case), inputs(case, "right"), []
    want = model(**given).last_hidden_state
    monkeypatch.setattr(Norm, "sums", lambda _, x: ran.append(x) or True)
    close(model(**given).last_hidden_state, want, 1e-5)
    assert bool(ran) == (family != "ModernBert")  # which has no norm behind the sums


@every_model
@torch.no_grad()
def test_bfloat16_rounds_no_worse_than_twice_the_oracle(case, head):
    given, exact, errors = inputs(case, "right"), oracle(case, auto=head), []
    for model in (load(case, head, dtype=torch.bfloat16), oracle(case, torch.bfloat16, auto=head)):
        pairs = [(fields(alone(model, given, row)), fields(alone(exact, given, row))) for row in (0, 2, 3)]
        errors.append(distance([(got[name], want[name]) for got, want in pairs for name in want]))
    assert errors[0] <= 2 * errors[1] + luck(head)


@every_model
def test_save_is_byte_identical_and_transformers_reads_it(case, head, tmp_path):
    model = load(case, head)
    assert model.config.unused == () and not model.load_report.fresh
    model.save_pretrained(tmp_path / "once")
    own = getattr(taut, model.architecture())  # the family's own class loads it as well
    own.from_pretrained(tmp_path / "once").save_pretrained(tmp_path / "twice")
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


def rewritten(folder: Path, source: Path, rename, **config) -> Path:
    """A copy of a checkpoint with other names of its tensors, and a config with these values alone."""
    save_file(
        {rename(n): t for n, t in load_file(source / "model.safetensors").items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(
        json.dumps(config or json.loads((source / "config.json").read_text()))
    )
    return folder


def test_files_as_the_first_checkpoints_are_load_too(tmp_path):
    """BERT's norms with TensorFlow's names, buffers and tied matrices in the file, and no first word."""
    case = FIRST["Bert"]
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    folder = rewritten(
        tmp_path,
        checkpoint(case, "AutoModelForMaskedLM"),
        lambda name: next((name.replace(now, was) for now, was in old.items() if now in name), name),
    )
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.embeddings.position_ids"] = torch.arange(CONTEXT)[None]
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["cls.seq_relationship.weight"] = torch.zeros(2, 48)
    save_file(tensors, folder / "model.safetensors")
    older, usual = taut.BertForMaskedLM.from_pretrained(folder), load(case, "AutoModelForMaskedLM")
    assert all(torch.equal(a, b) for a, b in zip(older.parameters(), usual.parameters(), strict=True))


def test_nomics_first_config_and_transformers_own_names_load_too(tmp_path):
    case = FIRST["NomicBert"]
    source, usual = checkpoint(case, "AutoModel"), load(case)
    oracle(case, auto="AutoModel").save_pretrained(tmp_path, save_original_format=False)
    own = taut.AutoModel.from_pretrained(tmp_path)
    config = {"model_type": "nomic_bert", "n_embd": 48, "n_layer": 3, "n_head": 6, "n_inner": 80}
    config |= {
        "n_positions": CONTEXT,
        "activation_function": "swiglu",
        "rotary_emb_base": 1000,
        "prenorm": False,
    }
    config |= {
        "vocab_size": VOCAB,
        "rotary_emb_fraction": 1.0,
        "qkv_proj_bias": False,
        "rotary_emb_scale_base": None,
    }
    older = taut.AutoModel.from_pretrained(rewritten(tmp_path, source, str, **config))
    assert older.config.unused == () and older.config.layers == usual.config.layers
    for model in (own, older):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), usual.parameters(), strict=True))


@every_case
@torch.no_grad()
def test_embeddings_in_one_step_are_the_same(case, monkeypatch):
    """What a GPU's kernel is asked for, on the CPU: the same rows of the same tables."""
    model, given, asked = load(case), inputs(case, "left"), []
    want = model(**given).last_hidden_state
    monkeypatch.setattr("taut.layers.encoder.fuses", lambda lookups, *_: asked.append(lookups) or True)
    close(model(**given).last_hidden_state, want)
    assert asked or model.model.embed_layernorm.config.kind != "layer"
    asked.clear()
    hook = model.model.embed_tokens.register_forward_hook(lambda *_: None)
    close(model(**given).last_hidden_state, want)
    hook.remove()
    model.model.embed_tokens = torch.nn.Sequential(model.model.embed_tokens)  # as adapters wrap it
    close(model(**given).last_hidden_state, want)
    assert not asked
