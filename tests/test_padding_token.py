"""`pad_token_id` of configs as they are found: one that the vocabulary hasn't, below 0 or behind its end."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

import taut
from taut.errors import ConfigError
from tests import encoders, families, seq2seq
from tests.families import VOCAB, Case, checkpoint, oracle
from tests.test_families import close

CAUSAL, MASKED, SEQ2SEQ = (f"AutoModelFor{head}" for head in ("CausalLM", "MaskedLM", "Seq2SeqLM"))
# Families whose table has a padding token in transformers, and two whose hasn't.
TABLES = dict.fromkeys(("llama", "opt-350m", "gemma3"), CAUSAL)
TABLES |= dict.fromkeys(("bert", "distilbert", "roberta", "modernbert"), MASKED) | {"bart": SEQ2SEQ}
WITHOUT = {"gpt2": CAUSAL, "t5": SEQ2SEQ}
MODELS = {case.name: case for case in (*families.CASES, *encoders.CASES, *seq2seq.CASES)}


def padded_by(name: str, token: int) -> Case:
    case = MODELS[name]
    return replace(case, name=f"{name}{token}", options={**case.options, "pad_token_id": token})


def loaded(case: Case, head: str):
    return getattr(taut, head).from_pretrained(checkpoint(case, head))


def learned(model, ids: torch.Tensor, head: str) -> torch.Tensor:
    """What the table of tokens learns from the logits of `ids`."""
    given = {"input_ids": ids} | ({"decoder_input_ids": ids} if head == SEQ2SEQ else {})
    model(**given).logits.float().square().mean().backward()
    return model.get_input_embeddings().weight.grad


@pytest.mark.parametrize(
    ("name", "head", "token"),
    # RoBERTa's positions begin behind its padding token: with -3 transformers can't compute anything.
    [
        (*one, token)
        for one in (TABLES | WITHOUT).items()
        for token in (-1, -3)
        if one[0] != "roberta" or token == -1
    ],
)
def test_a_padding_token_below_0_counts_from_the_end_of_the_table(name, head, token):
    """For what a lookup learns, as in transformers; as a token it is none."""
    case = padded_by(name, token)
    model, theirs = loaded(case, head), oracle(case, auto=head)
    ids = torch.tensor([[7, VOCAB - 1, 4, 9, VOCAB - 3], [VOCAB - 3, 5, VOCAB - 1, 60, 3]])
    close(learned(model, ids, head), learned(theirs, ids, head), 2e-4)
    assert model.get_input_embeddings().padding == (None if name in WITHOUT else VOCAB + token)
    assert model.config.pad_token_id is None and model.config.source["pad_token_id"] == token


@pytest.mark.parametrize(("name", "head"), TABLES.items())
def test_a_padding_token_that_the_table_has_not(name, head):
    """transformers can't make such a model. One behind the end pads nothing; one before the beginning is
    named."""
    config = loaded(MODELS[name], head).config.source
    for token in (VOCAB, -VOCAB - 1):
        with pytest.raises(AssertionError, match="Padding_idx must be within num_embeddings"):
            bad = {**config, "pad_token_id": token}
            getattr(transformers, head).from_config(transformers.AutoConfig.for_model(**bad))
    with pytest.raises(ConfigError, match="'pad_token_id' is -132; "):
        getattr(taut, head).from_config({**config, "pad_token_id": -VOCAB - 1})
    if name != "roberta":  # whose positions begin behind it
        beyond = getattr(taut, head).from_config({**config, "pad_token_id": VOCAB})
        assert beyond.get_input_embeddings().padding is None
    folder = checkpoint(padded_by(name, -1), head)
    assert getattr(taut, head).from_pretrained(folder, pad_token_id=5).get_input_embeddings().padding == 5


def test_rows_that_end_early_are_filled_with_what_there_is():
    """transformers fills with -1, and looks it up where a row goes on for two steps: an IndexError."""
    ids = torch.tensor([[7, 30, 4], [12, 5, 6]])
    options = {"max_new_tokens": 5, "do_sample": False}
    model = loaded(padded_by("llama", -1), CAUSAL)
    assert model.generation_config.pad_token_id == -1
    first, second = model.generate(ids, **options, eos_token_id=None)[:, 3:].tolist()
    end = next(token for token in first if token not in second)
    with pytest.warns(UserWarning, match=f"pad_token_id is -1, which is no token: rows .* token {end}"):
        made = model.generate(ids, **options, eos_token_id=end)[:, 3:].tolist()
    at = first.index(end)
    assert at < 4 and made == [first[:at] + [end] * (5 - at), second]
    beyond = loaded(padded_by("gpt2", 999), CAUSAL)  # whose table has no padding token
    first, second = beyond.generate(ids, **options, eos_token_id=None)[:, 3:].tolist()
    end = next(token for token in second if token not in first)
    made, at = beyond.generate(ids, **options, eos_token_id=end)[:, 3:].tolist(), second.index(end)
    assert at < 4 and made == [first, second[: at + 1] + [999] * (4 - at)]


def test_rows_that_are_padded_are_classified_by_their_own_last_token():
    """Where -1 is the padding token, transformers takes the last column of every row."""
    head = "AutoModelForSequenceClassification"
    case = padded_by("llama", -1)
    model, theirs = loaded(case, head), oracle(case, auto=head)
    ids = torch.tensor([[7, 30, 4, 9], [12, 5, 0, 0]])
    with torch.no_grad():
        got = model(ids, attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])).logits
        for row, length in ((0, 4), (1, 2)):
            close(got[row : row + 1], theirs(ids[row : row + 1, :length]).logits)
