"""Whole sets of prompts: each answer is that of the prompt alone, in the order of the prompts."""

from __future__ import annotations

import pytest
import torch

from taut.engine import offline
from taut.engine.offline import Generated
from taut.errors import RequestError
from tests.engine import letters as alphabet
from tests.engine.test_generate import CONTEXT, END, PAD, VOCAB
from tests.engine.test_generate import pair as pair  # a fixture

PLAIN = {"max_new_tokens": 9, "eos_token_id": None}


@pytest.fixture(scope="module")
def prompts():
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 40, (23,), generator=draw).tolist()
    return [torch.randint(3, VOCAB, (length,), generator=draw).tolist() for length in lengths]


def alone(model, prompt, **options):
    return model.generate([prompt], **{**PLAIN, **options})[0, len(prompt) :].tolist()


@pytest.mark.parametrize("ahead", [1, 4, 512])
def test_answers_are_those_of_each_prompt_alone(pair, prompts, monkeypatch, ahead):
    model = pair[1]
    monkeypatch.setattr(offline, "AHEAD", ahead)
    assert model.generate_batch(prompts, **PLAIN) == [alone(model, prompt) for prompt in prompts]
    assert model.generate_batch([]) == []
    assert model.generate_batch([torch.tensor(prompts[0])], **PLAIN) == [alone(model, prompts[0])]


def test_the_longest_run_first(pair):
    seen = []

    def watch(ids, scores):
        seen.append(ids.shape[1])
        return scores

    prompts = [[5] * length for length in (2, 9, 4)]
    pair[1].generate_batch(prompts, logits_processor=[watch], max_new_tokens=1, use_cache=False)
    assert seen == [9, 4, 2]


def test_a_seed_gives_the_same_answers_in_any_set(pair, prompts):
    model = pair[1]
    options = {"do_sample": True, "temperature": 2.0, **PLAIN}
    whole = model.generate_batch(prompts, seed=3, **options)
    assert whole == model.generate_batch(prompts, seed=3, **options)
    assert whole[:5] == model.generate_batch(prompts[:5], seed=3, **options)
    assert whole != model.generate_batch(prompts, seed=4, **options)
    assert len({tuple(answer) for answer in model.generate_batch([prompts[0]] * 9, **options)}) == 9
    rows = model.generate(prompts[:3], seed=3, **options)
    assert rows[:, -9:].tolist() == whole[:3]
    copies = model.generate_batch(prompts[:3], seed=3, num_return_sequences=2, **options)
    rows = model.generate(prompts[:3], seed=3, num_return_sequences=2, **options)
    assert [row for answers in copies for row in answers] == rows[:, -9:].tolist()


def test_texts_and_conversations(pair):
    model, letters = pair[1], alphabet.letters(alphabet.ASCII)
    letters.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    options = {**PLAIN, "suppress_tokens": [END, PAD, 2]}
    texts = ["Hello", "a longer text", "b"]
    answers = model.generate_batch(texts, tokenizer=letters, **options)
    expected = [letters.decode(alone(model, letters.encode(text), **options)) for text in texts]
    assert answers == expected
    chats = [[{"role": "user", "content": text}] for text in texts]
    assert model.generate_batch(chats, tokenizer=letters, **options) == expected
    whole = model.generate_batch(
        texts, tokenizer=letters, return_dict_in_generate=True, logprobs=1, **options
    )
    assert all(isinstance(answer, Generated) for answer in whole)
    assert [answer.text for answer in whole] == expected
    assert {answer.finish_reason for answer in whole} == {"length"} and len(whole[0].logprobs) == 9
    beams = model.generate_batch(
        texts, tokenizer=letters, return_dict_in_generate=True, num_beams=3, num_return_sequences=2, **options
    )
    assert [len(answers) for answers in beams] == [2, 2, 2] and beams[0][0].score > beams[0][1].score
    stopped = model.generate_batch(texts, tokenizer=letters, stop_strings=[expected[0][3:5]], **options)
    assert stopped[0] == expected[0][:5]


def test_what_is_wrong_is_named_before_anything_runs(pair, prompts):
    model = pair[1]
    ran = []
    options = {**PLAIN, "logits_processor": [lambda ids, scores: ran.append(1) or scores]}
    for bad, match in (
        ([*prompts, [5] * (CONTEXT + 3)], rf"prompt 23: the prompt has {CONTEXT + 3} tokens"),
        ([[5], [5, 99]], r"prompt 1: input_ids row 0, position 1: token id 99"),
        ([[5], []], r"prompt 1: row 0 of input_ids has no token"),
        ([[5], "text"], r"prompt 1 is a text: pass tokenizer="),
        ([[{"role": "user", "content": "x"}]], r"prompt 0 is a conversation: pass tokenizer="),
        ("text", r"prompts is a str; expected a list of prompts"),
    ):
        with pytest.raises(RequestError, match=match):
            model.generate_batch(bad, **options)
    with pytest.raises(RequestError, match="prompt 0: unknown generation option 'max_new_token'"):
        model.generate_batch(prompts, max_new_token=3)
    assert not ran


def test_one_that_fails_while_it_runs(pair, prompts):
    model = pair[1]

    def broken(ids, scores):
        if ids[0, : len(prompts[7])].tolist() == prompts[7]:
            raise KeyError("seven")
        return scores

    with pytest.raises(KeyError, match="seven"):
        model.generate_batch(prompts, logits_processor=[broken], **PLAIN)
    kept = model._resident._engine
    assert not kept.has_work and kept.pages.free == kept.pages.count
    answers = model.generate_batch(prompts, logits_processor=[broken], return_exceptions=True, **PLAIN)
    assert isinstance(answers.pop(7), KeyError)
    assert answers == [alone(model, prompt) for at, prompt in enumerate(prompts) if at != 7]


def test_a_bar_is_shown_where_it_is_asked_for(pair, prompts, capsys):
    pair[1].generate_batch(prompts, **PLAIN)
    assert capsys.readouterr().err == ""
    pair[1].generate_batch(prompts, progress=True, **PLAIN)
    shown = capsys.readouterr()
    assert "23/23" in shown.err and "tok/s" in shown.err and shown.out == ""
