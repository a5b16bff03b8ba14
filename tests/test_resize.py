"""Models with another number of token ids, another table of tokens or another head over them: as transformers
makes them, saved and loaded by both."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

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
GENERATE = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")


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

    check_files(model, case, head, ids, tmp_path)


def check_files(model, case: Case, head: str, ids: torch.Tensor, folder) -> None:
    """Taut and transformers load what the model saves, and compute what it does."""
    model.save_pretrained(folder)
    again = getattr(taut, head).from_pretrained(folder)
    assert again.config == model.config and torch.equal(logits(again, ids), logits(model, ids))
    read, info = getattr(transformers, head).from_pretrained(
        folder, attn_implementation=case.attention, output_loading_info=True
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


def drawn(like: torch.Tensor, seed: int) -> nn.Parameter:
    values = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(values * like.detach().std())


@pytest.mark.parametrize(("case", "head"), MODELS, ids=str)
def test_another_table_of_tokens_is_looked_up_and_stays_shared(case, head, tmp_path):
    """By a tied head, and by both stacks of an encoder-decoder, as transformers has it after `tie_weights`;
    families that scale its vectors go on doing so."""
    model, theirs = load(case, head), oracle(case, auto=head)
    table = model.get_input_embeddings()
    before, weight = logits(model, IDS), drawn(table.weight, 0)
    tied = table if model.get_output_embeddings() is table else None
    new = nn.Embedding(*weight.shape, padding_idx=5)
    new.weight = weight
    model.set_input_embeddings(new)
    model.tie_weights()
    assert model.get_input_embeddings().weight is weight and model.get_input_embeddings().padding == 5
    assert tied is None or model.get_output_embeddings().weight is weight
    with torch.no_grad():
        theirs.get_input_embeddings().weight.copy_(weight)  # which all that share it see
    got = logits(model, IDS)
    close(got, logits(theirs, IDS))
    assert not torch.allclose(got, before, atol=1e-3)
    check_files(model, case, head, IDS, tmp_path)


@pytest.mark.parametrize(("case", "head"), [m for m in MODELS if m[1] in GENERATE], ids=str)
def test_another_head_scores_tokens_alone(case, head, tmp_path):
    """As in transformers; one that was the table of tokens has a matrix of its own then."""
    model, theirs = load(case, head), oracle(case, auto=head)
    old, table = model.get_output_embeddings(), model.get_input_embeddings().weight
    own = drawn(old.weight, 1)
    new = nn.Linear(*reversed(own.shape), bias=getattr(old, "bias", None) is not None)
    new.weight = own
    model.set_output_embeddings(new)
    theirs.set_output_embeddings(new)
    assert model.get_output_embeddings().weight is own and model.get_input_embeddings().weight is table
    assert not model.config.tied
    close(logits(model, IDS), logits(theirs, IDS))
    decoder = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    model(input_ids=IDS, labels=IDS, **decoder).loss.backward()
    got, own.grad = own.grad, None
    theirs(input_ids=IDS, labels=IDS, **decoder).loss.backward()
    close(got, own.grad)
    close(table.grad, theirs.get_input_embeddings().weight.grad)
    check_files(model, case, head, IDS, tmp_path)


def test_a_model_with_another_table_and_head_generates_and_trains_them():
    model = load(LLAMA)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    before = model.generate(IDS, **options)  # an engine for the weights before
    donor = load(LLAMA)
    with torch.no_grad():
        for table in (donor.get_input_embeddings(), donor.get_output_embeddings()):
            table.weight.copy_(table.weight.roll(7, 0))
    model.set_input_embeddings(donor.get_input_embeddings())
    model.set_output_embeddings(donor.get_output_embeddings())
    assert torch.equal(model.generate((IDS + 7) % VOCAB, **options), (before + 7) % VOCAB)
    model(IDS, labels=IDS).loss.backward()
    assert donor.get_input_embeddings().weight.grad is not None and donor.lm_head.weight.grad is not None


def test_a_quantized_model_takes_a_dense_head(tmp_path):
    tied = next(case for case in families.CASES if case.name == "llama-tied")
    model = load(tied, load_in_4bit=True)
    new = nn.Linear(*reversed(model.get_output_embeddings().shape), bias=False)
    model.set_output_embeddings(new)
    model.save_pretrained(tmp_path)
    again = taut.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.is_quantized and torch.equal(again.lm_head.weight, new.weight)
    assert torch.equal(logits(again, IDS), logits(model, IDS))


def test_what_cannot_take_their_place_is_named():
    class Soft(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + 1

    def hooked():
        module = nn.Embedding(VOCAB, 48)
        module.register_forward_hook(lambda *_: None)
        return module

    packed = load(
        LLAMA, quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["q_proj"])
    )
    packed.set_output_embeddings(packed.get_output_embeddings())  # is what is there
    bert = next(case for case in encoders.CASES if case.name == "bert")
    llama, gptj = load(LLAMA), load(next(case for case in families.CASES if case.name == "gptj"))
    masked, scores = load(bert, "AutoModelForMaskedLM"), load(LLAMA, "AutoModelForSequenceClassification")
    gemma = load(next(case for case in families.CASES if case.name == "gemma"))
    picture, wide = taut.AutoModel.from_config(vision()), VOCAB + 9
    for model, value, message in (
        (llama, nn.Embedding(wide, 48), rf"{wide}, 48\].*first resize_token_embeddings\({wide}\)"),
        (llama, nn.Embedding(VOCAB, 40), r"is \[131, 40\], and that of this model \[131, 48\]"),
        (llama, nn.Embedding(VOCAB, 48, dtype=torch.bfloat16), "give it module.to"),
        (llama, nn.Embedding(VOCAB, 48, max_norm=1.0), "has max_norm=1.0"),
        (llama, Soft(VOCAB, 48), "set_input_embeddings takes an nn.Embedding, .* not Soft"),
        (llama, hooked(), "has hooks"),
        (llama, gemma.get_input_embeddings(), "multiplies its vectors by 6.9"),
        (llama, nn.Linear(48, VOCAB), "has a bias, and that of a LlamaForCausalLM has none"),
        (llama, nn.Linear(48, wide, bias=False), rf"first resize_token_embeddings\({wide}\)"),
        (gptj, nn.Linear(48, VOCAB, bias=False), "has no bias, and that of a GPTJForCausalLM has one"),
        (packed, nn.Linear(48, VOCAB, bias=False), r"the head is held packed \(int8\)"),
        (llama, packed.lm_head, r"the module given is held packed \(int8\)"),
        (masked, nn.Linear(48, VOCAB), "scores tokens by its table"),
        (scores, nn.Linear(48, VOCAB), "scores no tokens"),
        (picture, nn.Embedding(VOCAB, 8), "a ViTModel has no table of tokens"),
    ):
        table = isinstance(value, (nn.Embedding, type(gemma.get_input_embeddings())))
        before = model.get_input_embeddings(), model.get_output_embeddings()
        with pytest.raises(RequestError, match=message):
            (model.set_input_embeddings if table else model.set_output_embeddings)(value)
        assert before == (model.get_input_embeddings(), model.get_output_embeddings())


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
