"""Guesses that are checked in one step: the tokens are those without them, however bad they are."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from taut.engine.draft_model import Assistant, DraftModel
from taut.engine.drafts import Ledger
from taut.engine.engine import Engine
from taut.engine.lookup import Lookup
from taut.engine.request import Request, SamplingParams
from taut.engine.resident import Resident
from taut.errors import RequestError
from taut.modeling import CausalLM
from tests.engine import letters as alphabet
from tests.engine.guesses import Always, Prompter
from tests.engine.test_engine import MODELS, PROMPTS, Chained, alone, check_pages, engine
from tests.engine.test_generate import END, PAD, VOCAB, padded
from tests.engine.test_generate import pair as pair  # a fixture
from tests.engine.tiny import Tiny


def asked(prompt, new=12, **options) -> Request:
    greedy = options.pop("greedy", True)
    params = SamplingParams(new, greedy=greedy, temperature=1.5, seed=options.pop("seed", 0))
    return Request(list(prompt), params, **options)


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "options", [{}, {"cache_tokens": 40, "chunk": 5}, {"max_rows": 2, "page_size": 1}], ids=str
)
def test_tokens_are_those_without_guesses(model, options, greedy):
    for rate in (0.0, 0.7, 1.0):
        answers = {prompt: alone(model, prompt, 12, greedy) for prompt in PROMPTS}
        prompter = Prompter(answers, rate)
        e = engine(model, **options)
        e.ledger = Always()
        e.graphs = Chained(e)
        rows = [asked(p, greedy=greedy, drafter=prompter if at % 3 else None) for at, p in enumerate(PROMPTS)]
        for row in rows:
            e.submit(row)
        steps = 0
        while e.has_work:
            e.step()
            check_pages(e.scheduler)
            steps += 1
        assert [row.output for row in rows] == list(answers.values())
        assert e.pages.free == e.pages.count
        assert sorted(map(id, prompter.forgotten)) == sorted(id(r) for r in rows if r.drafter)
        right = sum(right for _, right in prompter.learned)
        if rate == 0.0:
            assert right <= len(prompter.learned) * 0.2
        elif not options:
            assert right > 10


def test_right_guesses_save_steps_and_wrong_ones_cost_none():
    answers = {PROMPTS[2]: alone("plain", PROMPTS[2], 12)}
    steps = []
    for rate in (None, 1.0, 0.0):
        e = engine()
        e.ledger = Always()
        row = e.submit(asked(PROMPTS[2], drafter=None if rate is None else Prompter(answers, rate)))
        steps.append(0)
        while e.has_work:
            e.step()
            steps[-1] += 1
        assert row.output == answers[PROMPTS[2]]
    assert steps[1] < 8 < steps[0] == 12 and 11 <= steps[2] <= 12


@pytest.mark.parametrize("ending", ["an end token", "a hook", "its length"])
def test_a_row_ends_inside_a_guess(ending):
    full = alone("plain", PROMPTS[2], 12)
    length = {"an end token": full.index(full[4]) + 1, "a hook": 6, "its length": 3}[ending]
    prompter = Prompter({PROMPTS[2]: full}, 1.0, most=12, seed=3)
    row = Request(
        list(PROMPTS[2]),
        SamplingParams(
            3 if ending == "its length" else 12, eos_token_ids=(full[4],) if ending == "an end token" else ()
        ),
        drafter=prompter,
        should_stop=(lambda r: len(r.output) == 6) if ending == "a hook" else None,
        keep_scores=True,
        keep_logits=True,
        logprobs=1,
    )
    e = engine()
    e.ledger = Always()
    e.submit(row)
    tokens = []
    while e.has_work:
        tokens += [token for event in e.step() for token in event.tokens]
    assert row.output == tokens == full[:length]
    assert len(row.scores) == len(row.logits) == len(row.token_logprobs) == length
    assert [int(scores.argmax()) for scores in row.scores] == row.output
    assert e.pages.free == e.pages.count


def test_processors_see_the_row_as_it_will_be():
    seen = []

    def ban_last(ids, scores):
        seen.append(ids[0].tolist())
        return scores.index_fill(1, ids[0, -1:], float("-inf"))

    plain = asked((1, 2), logits_processors=(ban_last,))
    engine().run([plain])
    seen.clear()
    e = engine()
    e.ledger = Always()
    row = asked((1, 2), logits_processors=(ban_last,), drafter=Prompter({(1, 2): plain.output}, 0.6))
    e.run([row])
    assert row.output == plain.output
    assert all([1, 2, *row.output[:at]] in seen for at in range(12))


# -- lookup --------------------------------------------------------------------------------------------


def guess(tokens, most=8, ngram=2):
    lookup = Lookup(most, ngram)
    request = Request(list(tokens), SamplingParams(90))
    lookup.propose([request])
    lookup._rows[request].size, lookup._rows[request].rests_until = most, 0
    return lookup.propose([request]).get(request)


def test_a_lookup_goes_on_as_the_row_did_before():
    assert guess([1, 2, 3, 4, 5, 9, 1, 2]) == [3, 4, 5, 9, 1, 2, 3, 4]  # and then as it is guessed to go on
    assert guess([1, 2, 3, 4, 5, 9, 1, 2], most=3) == [3, 4, 5]
    assert guess([7, 1, 2, 3, 8, 1, 2, 4, 9, 1, 2]) == [4, 9, 1, 2, 4, 9, 1, 2]  # the newest of equal places
    assert guess([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], most=2) == [3, 8]  # where more is the same
    assert guess([1, 2, 3, 4]) is None and guess([5]) is None
    assert guess([5, 6, 5], most=2) is None and guess([5, 6, 5], most=2, ngram=1) == [6, 5]
    assert guess([4, 4, 4], most=3) == [4, 4, 4]


def test_a_lookup_that_fails_rests_and_one_that_succeeds_reaches_further():
    lookup = Lookup(10)
    request = Request([1, 2, 1, 2], SamplingParams(90))
    sizes, rests = [], []
    for right in (0, 0, 0, 9, 9, 9):
        while not (offered := lookup.propose([request])):
            request.output.append(2 - len(request.output) % 2)
        sizes.append(len(offered[request]))
        lookup.learn(request, sizes[-1], min(right, sizes[-1]))
        rests.append(lookup._rows[request].wait)
        request.output.append(2 - len(request.output) % 2)
    assert sizes == [4, 2, 2, 2, 6, 10] and rests == [1, 2, 4, 0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(
    extra=st.floats(0.0, 12.0),
    chance=st.floats(0.0, 1.0),
    rows=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_guesses_cost_at_most_a_twentieth_of_the_time(extra, chance, rows, seed):
    """A check takes `1 + extra` times as long as a plain step; a guess is right by `chance`."""
    ledger, draw = Ledger(), random.Random(seed)
    tokens = seconds = 0.0
    while tokens < 400:
        drafted = rows * 2
        if ledger.affords(rows, drafted):
            right = sum(draw.random() < chance for _ in range(drafted))
            took = (1 + extra) * draw.uniform(0.95, 1.05)
        else:
            drafted = right = 0
            took = draw.uniform(0.95, 1.05)
        ledger.record(rows, drafted, right, took)
        seconds += took
        tokens += 1 + right / rows
    # A start is lent: two first checks, which may have to compile kernels.
    assert seconds < tokens / 0.95 + 2 * extra + Ledger.START
    if 2 * chance > 2 * extra + 0.2:
        assert seconds < tokens * (1 + extra) / (1 + 2 * chance) * 1.15 + 10


# -- a draft model -------------------------------------------------------------------------------------


def assisted(model: str, draft: Tiny, requests: list[Request], **options) -> tuple[Engine, DraftModel]:
    e = engine(model, **options)
    e.ledger = Always()
    drafts = DraftModel(draft, num_pages=40, page_size=4)
    for request in requests:
        request.drafter = Assistant(drafts, draft, 6)
    e.run(requests)
    return e, drafts


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_a_draft_model_changes_no_token(model, greedy):
    """The model itself guesses right, with the same angles and draws; another one mostly doesn't."""
    for draft in (MODELS[model], MODELS["plain"], Tiny(seed=5), Tiny(context=24, boundary=10)):
        requests = [asked(prompt, greedy=greedy, seed=at) for at, prompt in enumerate(PROMPTS)]
        e, drafts = assisted(model, draft, requests)
        for at, row in enumerate(requests):
            assert row.output == alone(model, PROMPTS[at], 12, greedy, at)
        assert e.pages.free == e.pages.count and drafts.pages.free == drafts.pages.count
        assert not drafts.has_work


@pytest.mark.parametrize("model", MODELS)
def test_a_model_that_guesses_for_itself_is_right(model):
    """Whatever it has to compute again: rows grow by ever longer guesses."""
    learned = []

    class Watched(Assistant):
        def learn(self, request, offered, right):
            learned.append((offered, right))
            super().learn(request, offered, right)

    row = asked(PROMPTS[3], 26, greedy=False, seed=4)
    row.drafter = Watched(DraftModel(MODELS[model], num_pages=40, page_size=4), MODELS[model], 20)
    e = engine(model)
    e.ledger = Always()
    e.submit(row)
    after = []
    while e.has_work:
        e.step()
        after.append(len(row.output))
    assert row.output == alone(model, PROMPTS[3], 26, False, 4)
    assert all(right == offered > 0 for offered, right in learned)
    assert after == ([1, 7, 10, 11, 21, 26] if model == "longrope" else [1, 7, 15, 25, 26])


def test_a_draft_cache_without_room_guesses_for_whom_it_can():
    requests = [asked(prompt) for prompt in PROMPTS]
    e = engine()
    e.ledger = Always()
    drafts = DraftModel(MODELS["plain"], num_pages=8, page_size=4)
    for request in requests:
        request.drafter = Assistant(drafts, MODELS["plain"], 6)
    e.run(requests)
    assert [row.output for row in requests] == [alone("plain", prompt, 12) for prompt in PROMPTS]
    assert drafts.pages.free == 8


def test_a_row_that_can_be_guessed_nothing_for_leaves_the_others_theirs():
    drafts = DraftModel(MODELS["plain"], num_pages=40, page_size=4)
    good, none = asked(PROMPTS[0]), asked(PROMPTS[1])
    none.params = replace(none.params, suppress_tokens=tuple(range(VOCAB)))
    assert drafts.propose([none, good], 4) == {good: alone("plain", PROMPTS[0], 4)}

    def broken(logits, rows):
        raise ZeroDivisionError("a fault of the sampler's own")

    drafts.sampler = broken
    with pytest.raises(ZeroDivisionError):
        drafts.propose([none, good], 4)


# -- generate ------------------------------------------------------------------------------------------


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(Ledger, "affords", Always.affords)


@pytest.fixture(scope="module")
def small():
    """A smaller model of the same vocabulary."""
    torch.manual_seed(3)
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 48,
    }
    return CausalLM.from_config(config, dtype=torch.float32).init_weights(std=0.5)


@pytest.mark.parametrize("who", ["small", "itself", "lookup"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eos_token_id": [25, 44]},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "min_new_tokens": 20},
        {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "seed": 3},
        {"do_sample": True, "num_return_sequences": 2, "seed": 5},
        {"prefix_allowed_tokens_fn": lambda row, ids: [3 + row, 20, 33, int(ids[-1])]},
    ],
    ids=",".join,
)
def test_assisted_rows_are_the_plain_ones(pair, small, always, who, options):
    _, model = pair
    ids, mask = padded()
    options = {"max_new_tokens": 24, "eos_token_id": None, "attention_mask": mask, **options}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    given = {
        "small": {"assistant_model": small},
        "itself": {"assistant_model": model, "num_assistant_tokens": 7},
        "lookup": {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 1},
    }
    plain = model.generate(ids, **options)
    got = model.generate(ids, **options, **given[who])
    assert got.sequences.tolist() == plain.sequences.tolist()
    assert got.finish_reasons == plain.finish_reasons
    for mine, expected in zip(got.scores, plain.scores, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


def test_greedy_assisted_tokens_are_those_of_transformers(pair, small, always, tmp_path):
    theirs, model = pair
    small.save_pretrained(tmp_path)
    assistant = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7]])
    for mine, other in (
        ({"assistant_model": small}, {"assistant_model": assistant}),
        ({"prompt_lookup_num_tokens": 4}, {"prompt_lookup_num_tokens": 4}),
    ):
        options = {"max_new_tokens": 30, "eos_token_id": None, "do_sample": False}
        assert (
            model.generate(ids, **options, **mine).tolist()
            == theirs.generate(ids, **options, **other).tolist()
        )


def test_drawn_tokens_follow_the_models_distribution(pair, small, always):
    """The second token, given the likeliest first one: it is mostly drawn while a guess is checked."""
    _, model = pair
    options = {"temperature": 0.8, "do_sample": True, "max_new_tokens": 3, "eos_token_id": None, "top_k": 0}
    count = 3000
    rows = model.generate(
        [[5, 6, 7]] * 200, num_return_sequences=count // 200, assistant_model=small, seed=1, **options
    )[:, 3:].tolist()
    for known in ([], [Counter(row[0] for row in rows).most_common(1)[0][0]]):
        logits = model(torch.tensor([[5, 6, 7, *known]])).logits[0, -1] / 0.8
        expected = logits.softmax(-1).tolist()
        drawn = Counter(row[len(known)] for row in rows if row[: len(known)] == known)
        total = drawn.total()
        assert total > 200
        for token, chance in enumerate(expected):
            spread = 4.5 * (chance * (1 - chance) / total) ** 0.5 + 2 / total
            assert abs(drawn[token] / total - chance) < spread, (token, drawn[token] / total, chance)


def test_streams_and_stop_strings_with_guesses(pair, small, always):
    _, model = pair
    letters = alphabet.letters(alphabet.ASCII)
    ids = torch.tensor([letters.encode("Hello wor")])
    options = {"max_new_tokens": 20, "eos_token_id": None, "suppress_tokens": [END, PAD, 2]}
    tokens = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
    text = letters.decode(tokens)
    for guesses in ({"assistant_model": small}, {"assistant_model": model}, {"prompt_lookup_num_tokens": 5}):
        assert list(model.stream(ids, **options, **guesses)) == tokens
        stop = text[8:10]
        pieces = model.stream(ids, tokenizer=letters, stop_strings=[stop], **options, **guesses)
        assert "".join(pieces) == text[: text.find(stop)] and pieces.finish_reason == "stop_string"
    assert not Resident.of(small)._drafts.has_work
    kept = Resident.of(small)._drafts
    model.generate(ids, assistant_model=small, **options)
    assert Resident.of(small)._drafts is kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"assistant_model": "gpt2"}, r"assistant_model is a str; expected a model"),
        ({"assistant_model": "other"}, r"assistant_model has 40 tokens in its vocabulary and the model 61"),
        ({"assistant_model": "small", "prompt_lookup_num_tokens": 3}, r"both guess; give one of them"),
        ({"assistant_model": "small", "num_beams": 2}, r"assistant_model guesses .* num_beams=2"),
        (
            {"prompt_lookup_num_tokens": 3, "guidance_scale": 2.0},
            r"prompt_lookup_num_tokens .* guidance_scale",
        ),
        (
            {"prompt_lookup_num_tokens": 0},
            r"prompt_lookup_num_tokens is 0; expected an integer of at least 1",
        ),
        (
            {"assistant_tokenizer": object()},
            r"assistant_tokenizer: an assistant_model guesses in the model's own",
        ),
    ],
)
def test_guesses_that_cannot_be_made_are_named(pair, small, options, message):
    other = CausalLM.from_config({**small.config.source, "vocab_size": 40}, dtype=torch.float32)
    models = {"small": small, "other": other}
    options = {k: models.get(v, v) if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(RequestError, match=message):
        pair[1].generate(torch.full((2, 5), 7), max_new_tokens=3, **options)
