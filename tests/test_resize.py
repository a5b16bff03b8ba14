"""Models with another number of token ids: as transformers makes them, saved and loaded by both."""

from __future__ import annotations

import pytest
import torch
import transformers

import taut
from taut import BitsAndBytesConfig
from taut.errors import RequestError
from tests import encoders, families, seq2seq
from tests.families import VOCAB, Case, checkpoint, oracle
from tests.test_families import close

IDS = torch.tensor([[7, 30, 4, 9, 88], [12, 5, 6, 60, 3]])
# Heads that are the table, of their own, with biases, behind a projection; one table for two stacks.
MODELS = [
    (next(case for case in cases if case.name == name), head)
    for head, cases, names in (
        ("AutoModelForCausalLM", families.CASES, ("llama", "llama-tied", "gptj", "opt-350m", "gpt2")),
        ("AutoModelForSeq2SeqLM", seq2seq.CASES, ("bart", "t5", "t5-gated-unscaled")),
        ("AutoModelForMaskedLM", encoders.CASES, ("bert", "albert", "modernbert")),
        ("AutoModelForSequenceClassification", families.CASES, ("llama",)),
    )
    for name in names
]
LLAMA = MODELS[0][0]


def load(case: Case, head: str = "AutoModelForCausalLM", **options):
    return getattr(taut, head).from_pretrained(checkpoint(case, head), **options)


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **decoder).logits


@pytest.mark.parametrize("count", [VOCAB + 9, VOCAB - 31])
@pytest.mark.parametrize(("case", "head"), MODELS, ids=str)
def test_a_model_is_resized_as_in_transformers(case, head, count, tmp_path):
    model, theirs = load(case, head), oracle(case, auto=head)
    before, table = logits(model, IDS), model.resize_token_embeddings(count)
    theirs.resize_token_embeddings(count)
    assert table is model.get_input_embeddings() and model.config.vocab_size == count
    assert table.shape == table.weight.shape == theirs.get_input_embeddings().weight.shape
    got, ids = logits(model, IDS), IDS.clone()
    if before.shape[-1] > 2:  # scores of tokens
        close(got[..., : min(count, VOCAB)], before[..., :count], 1e-6)
    ids[0, 1] = count - 1
    close(logits(model, ids), logits(theirs, ids), 1e-2)  # theirs are drawn around the mean, which ours are

    model.save_pretrained(tmp_path)
    again = getattr(taut, head).from_pretrained(tmp_path)
    assert again.config == model.config and torch.equal(logits(again, ids), logits(model, ids))
    read, info = getattr(transformers, head).from_pretrained(
        tmp_path, attn_implementation=case.attention, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    close(logits(model, ids), logits(read, ids))


def test_a_resized_model_generates_and_trains():
    model = load(LLAMA)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(IDS, **options)  # an engine for the size before
    model.resize_token_embeddings(VOCAB + 9)
    with torch.no_grad():
        model.lm_head.weight[VOCAB + 8] = 40 * model.lm_head.weight[7]
        model.lm_head.weight[VOCAB + 7] = -model.lm_head.weight[VOCAB + 8]
    made = model.generate(IDS, **options)
    assert (made[:, IDS.shape[1] :] >= VOCAB + 7).all()
    model(made, labels=made).loss.backward()
    assert model.get_input_embeddings().weight.grad[VOCAB + 7 :].any()


@pytest.mark.parametrize("mean", [True, False])
def test_new_rows_are_the_mean_or_drawn(mean):
    model = load(LLAMA)
    old = model.get_input_embeddings().weight
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert model.get_input_embeddings().weight is old
    weight = model.resize_token_embeddings(VOCAB, pad_to_multiple_of=64, mean_resizing=mean).weight
    assert weight.shape == (192, 48) and torch.equal(weight[:VOCAB], old)
    if mean:
        torch.testing.assert_close(weight[VOCAB:], old.mean(0).expand(192 - VOCAB, -1))
    else:
        assert 0.015 < weight[VOCAB:].std() < 0.025
    assert weight.requires_grad


def test_models_in_few_bits_are_resized_where_table_and_head_are_dense(tmp_path):
    model = load(LLAMA, load_in_4bit=True)
    model.resize_token_embeddings(VOCAB + 9)
    model.save_pretrained(tmp_path)
    again = taut.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.is_quantized and torch.equal(logits(again, IDS), logits(model, IDS))
    packed = load(
        LLAMA, quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["q_proj"])
    )
    with pytest.raises(RequestError, match=r"the head is held packed \(int8\).*; load the model dense"):
        packed.resize_token_embeddings(VOCAB + 9)
    assert packed.config.vocab_size == VOCAB


def test_what_cannot_be_resized_is_named():
    two = next(case for case in seq2seq.CASES if case.name == "marian-two-tables")
    for make, count, message in (
        (lambda: load(two, "AutoModelForSeq2SeqLM"), 140, "have a table of tokens each"),
        (lambda: load(LLAMA), 0, "new_num_tokens is 0; expected an integer >= 1"),
        (lambda: taut.AutoModel.from_config(vision()), 9, "a ViTModel has no table of tokens"),
    ):
        with pytest.raises(RequestError, match=message):
            make().resize_token_embeddings(count)


def vision() -> dict[str, object]:
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    return config.to_dict() | {"architectures": ["ViTModel"]}
