"""Heads beside the table of encoders: classifiers on decoders, what labels mean, and checkpoints without the
head that is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import taut
from taut.errors import ConfigError, RequestError, WeightsError
from tests.encoders import CASES as ENCODERS
from tests.families import CASES, CONTEXT, checkpoint, oracle
from tests.test_families import close

BERT = ENCODERS[0]
HEADS = [
    f"AutoModelFor{name}"
    for name in ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")
]
AUTO = "AutoModelForSequenceClassification"
# The first case of each family that transformers has a classifier of.
DECODERS = list(
    {c.family: c for c in reversed(CASES) if hasattr(transformers, f"{c.family}{AUTO[9:]}")}.values()
)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
IDS = torch.tensor([[7, 30, 4, 9, 88], [12, 5, 0, 0, 0], [3, 0, 41, 0, 0]])


def encoder() -> Path:
    """A checkpoint with the head that encoders are trained with."""
    return checkpoint(BERT, "AutoModelForMaskedLM")


@pytest.mark.parametrize("case", DECODERS, ids=str)
def test_decoders_classify_by_the_last_token_that_is_no_padding(case):
    model, reference = (
        taut.AutoModelForSequenceClassification.from_pretrained(checkpoint(case, AUTO)),
        oracle(case, auto=AUTO),
    )
    labels = torch.tensor([1, 0, 1])
    # The oracle looks for padding among the ids, whatever the mask says.
    for given in ({"attention_mask": MASK}, {"attention_mask": torch.ones_like(MASK)}, {}):
        ours, theirs = model(IDS, **given, labels=labels), reference(IDS, **given, labels=labels)
        close(ours.logits, theirs.logits)
        close(ours.loss, theirs.loss, 1e-5)
    assert model.architecture() == type(reference).__name__


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon-7b", "gpt-neox", "gemma2", "bloom"])
def test_decoders_classify_tokens(name, tmp_path):
    case, auto = next(c for c in CASES if c.name == name), "AutoModelForTokenClassification"
    model = taut.AutoModelForTokenClassification.from_pretrained(checkpoint(case, auto))
    close(model(IDS).logits, oracle(case, auto=auto)(IDS).logits)
    model.save_pretrained(tmp_path)
    saved, original = (load_file(f / "model.safetensors") for f in (tmp_path, checkpoint(case, auto)))
    assert saved.keys() == original.keys() and model.config.source["architectures"] == [model.architecture()]


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("regression", torch.tensor([0.3, -1.2, 2.0])),
        ("single_label_classification", torch.tensor([3, 0, 2])),
        ("multi_label_classification", torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]])),
    ],
)
@pytest.mark.parametrize("said", [False, True])
def test_labels_mean_what_transformers_takes_them_for(kind, labels, said, tmp_path):
    """By their number and dtype, or as the config says."""
    options = {"num_labels": 1 if kind == "regression" else 4} | ({"problem_type": kind} if said else {})
    with pytest.warns(UserWarning, match="no weights for .*classifier.weight.* newly initialised"):
        model = taut.AutoModelForSequenceClassification.from_pretrained(encoder(), **options)
    model.save_pretrained(tmp_path)
    reference = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    close(model(IDS, labels=labels).loss, reference(IDS, labels=labels).loss, 1e-5)
    with pytest.raises(RequestError, match=r"labels has shape \[2, 9\]"):
        model(IDS, labels=torch.zeros(2, 9, dtype=labels.dtype))


def test_labels_by_name_are_saved_and_must_agree(tmp_path):
    names = {0: "no", 1: "maybe", 2: "yes"}
    with pytest.warns(UserWarning, match="newly initialised"):
        model = taut.AutoModelForTokenClassification.from_pretrained(encoder(), id2label=names)
    model.save_pretrained(tmp_path)
    again = taut.BertForTokenClassification.from_pretrained(tmp_path)
    assert again.config.id2label == names and again.config.label2id["maybe"] == 1
    assert again(IDS).logits.shape == (*IDS.shape, 3) and not again.load_report.fresh
    with pytest.raises(ConfigError, match="num_labels is 2, and id2label has 3"):
        taut.AutoModelForTokenClassification.from_pretrained(encoder(), id2label=names, num_labels=2)
    with pytest.raises(WeightsError, match="ignore_mismatched_sizes=True makes it anew"):
        taut.AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=5)
    with pytest.warns(UserWarning, match="newly initialised"):
        other = taut.AutoModelForTokenClassification.from_pretrained(
            tmp_path, num_labels=5, ignore_mismatched_sizes=True
        )
    assert other(IDS).logits.shape == (*IDS.shape, 5)


def test_what_a_checkpoint_has_and_lacks_is_reported_by_name():
    with pytest.warns(UserWarning) as caught:
        model = taut.AutoModelForQuestionAnswering.from_pretrained(encoder())
    (warning,) = caught
    assert "qa_outputs.weight, qa_outputs.bias of a BertForQuestionAnswering" in str(warning.message)
    assert "cls.predictions" in str(warning.message) and warning.filename == __file__
    assert model.load_report.fresh == ("qa_outputs.weight", "qa_outputs.bias")
    assert (model.qa_outputs.bias == 0).all() and 0 < model.qa_outputs.weight.std() < 0.04


def test_answers_that_are_cut_off_count_for_nothing():
    model = taut.AutoModelForQuestionAnswering.from_pretrained(
        checkpoint(BERT, "AutoModelForQuestionAnswering")
    )
    at, cut = torch.tensor([2, 1, 0]), torch.tensor([2, 4, 700])
    some = model(IDS, attention_mask=MASK, start_positions=cut, end_positions=cut).loss
    first = model(IDS[:1], start_positions=at[:1], end_positions=at[:1]).loss
    close(some, first, 1e-5)
    output = model(IDS, attention_mask=MASK, start_positions=at, end_positions=at)
    assert list(output) == ["loss", "start_logits", "end_logits"]
    assert (output.start_logits.argmax(1) < MASK.sum(1)).all()


@pytest.mark.parametrize("head", ["AutoModel", *HEADS])
def test_rows_without_tokens_give_finite_numbers_and_leave_the_others_alone(head):
    model = getattr(taut, head).from_pretrained(checkpoint(BERT, head))
    ids, mask = torch.cat((IDS, IDS[:1])), torch.tensor([[0] * 5, [1] * 5, [0] * 5, [1, 1, 0, 0, 0]])
    output = model(ids, attention_mask=mask)
    for name, value in output.items():
        assert torch.isfinite(value).all(), name
        close(value[1:2], model(ids[1:2])[name])
    for empty in (ids[:, :0], ids[:0]):
        assert all(value.numel() == 0 or torch.isfinite(value).all() for value in model(empty).values())


@pytest.mark.parametrize("head", HEADS)
def test_an_input_longer_than_the_positions_is_refused(head):
    model = getattr(taut, head).from_pretrained(checkpoint(BERT, head))
    with pytest.raises(RequestError, match="has 65 tokens, and the model has 64 positions; shorten it"):
        model(torch.ones(1, CONTEXT + 1, dtype=torch.int64))


def test_a_family_without_the_head_is_told_which_classes_it_has():
    with pytest.raises(ConfigError, match="a family of decoders, which AutoModelForMaskedLM does not load"):
        taut.AutoModelForMaskedLM.from_pretrained(checkpoint(CASES[0]))
    with pytest.raises(ConfigError, match="these do: AutoModel, AutoModelForMaskedLM, AutoModelForSequence"):
        taut.AutoModelForCausalLM.from_pretrained(encoder())
