"""Beam search against transformers': the same sequences and scores; groups against a plainer search."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers

from taut.engine.beams import Beams
from taut.engine.engine import Engine
from taut.engine.request import Request, SamplingParams
from taut.errors import NumericsError, RequestError
from tests.engine import letters as alphabet
from tests.engine.test_generate import END, PAD, VOCAB, last_letter_bias, padded
from tests.engine.test_generate import pair as pair  # a fixture

FLAGS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
CASES = {
    "plain": {"num_beams": 3, "max_new_tokens": 9},
    "all of them": {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 9},
    "ends": {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 14, "eos_token_id": [25, 44, 9]},
    "early": {
        "num_beams": 3,
        "num_return_sequences": 3,
        "max_new_tokens": 14,
        "eos_token_id": [25, 44, 9, 17],
        "early_stopping": True,
        "length_penalty": 0.3,
    },
    "never": {
        "num_beams": 3,
        "num_return_sequences": 3,
        "max_new_tokens": 14,
        "eos_token_id": [25, 44, 9, 17],
        "early_stopping": "never",
        "length_penalty": 2.0,
    },
    "short ones": {
        "num_beams": 4,
        "max_new_tokens": 14,
        "eos_token_id": [25, 44, 9, 17, 5, 8, 31],
        "early_stopping": "never",
        "length_penalty": -1.5,
    },
    "long ones": {
        "num_beams": 2,
        "max_length": 22,
        "min_new_tokens": 6,
        "eos_token_id": [25, 44],
        "length_penalty": 3.0,
    },
    "options": {
        "num_beams": 3,
        "max_new_tokens": 12,
        "repetition_penalty": 1.8,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[32], [25, 37]],
        "sequence_bias": {(44, 7): 5.0, (9,): 4.0},
        "suppress_tokens": [31, 42],
        "renormalize_logits": True,
        "eos_token_id": [25, 44],
    },
    "allowed": {
        "num_beams": 3,
        "max_new_tokens": 8,
        "prefix_allowed_tokens_fn": lambda row, ids: [3 + row, 20, 33, int(ids[-1])],
    },
    "processor": {
        "num_beams": 2,
        "max_new_tokens": 8,
        "logits_processor": [last_letter_bias],
    },
    "criterion": {
        "num_beams": 3,
        "num_return_sequences": 3,
        "max_new_tokens": 12,
        "stopping_criteria": [lambda ids, scores: ids[:, -1] % 5 == 0],
    },
    "forced": {
        "num_beams": 3,
        "max_new_tokens": 7,
        "eos_token_id": [25, 44],
        "forced_eos_token_id": 25,
        "begin_suppress_tokens": [20, 31, 6],
        "exponential_decay_length_penalty": (3, 1.4),
    },
}  # fmt: skip


def both(pair, options):
    theirs, model = pair
    ids, mask = padded()
    lists = {
        "logits_processor": transformers.LogitsProcessorList,
        "stopping_criteria": transformers.StoppingCriteriaList,
    }
    options = {"eos_token_id": None, **options}
    wrapped = {k: lists[k](v) if k in lists else v for k, v in options.items()}
    return (
        theirs.generate(ids, attention_mask=mask, **FLAGS, **wrapped),
        model.generate(ids, attention_mask=mask, **FLAGS, **options),
    )


@pytest.mark.parametrize("name", CASES)
def test_sequences_and_scores_are_those_of_transformers(pair, name):
    expected, got = both(pair, CASES[name])
    theirs = torch.where(expected.sequences < 0, PAD, expected.sequences)  # where nothing ends a row
    assert got.sequences.tolist() == theirs.tolist()
    torch.testing.assert_close(got.sequences_scores, expected.sequences_scores, rtol=1e-5, atol=1e-5)
    assert got.beam_indices.tolist() == expected.beam_indices.tolist()
    rows = CASES[name]["num_beams"]
    for mine, theirs in zip(got.scores, expected.scores, strict=False):
        assert mine.shape == theirs.shape == (3 * rows, VOCAB)
    for mine, theirs in ((got.scores[0], expected.scores[0]), (got.logits[0], expected.logits[0])):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_the_scores_kept_explain_the_scores_of_the_sequences(pair):
    options = {**CASES["never"], "num_return_sequences": 3}
    _, got = both(pair, options)
    model = pair[1]
    steps = model.compute_transition_scores(got.sequences, got.scores, got.beam_indices)
    lengths = (got.beam_indices >= 0).sum(1)
    torch.testing.assert_close(steps.sum(1) / lengths**2.0, got.sequences_scores)
    expected = pair[0].compute_transition_scores(got.sequences, got.scores, got.beam_indices.long())
    assert torch.equal(steps, expected)
    ids, mask = padded()
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=4, eos_token_id=None, **FLAGS)
    ours, theirs = (
        one.compute_transition_scores(plain.sequences, plain.scores, normalize_logits=True)
        for one in (model, pair[0])
    )
    torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def grouped(theirs, prompt, *, count, groups, penalty, new, ends, early, power):
    """Groups of beams, one step and one beam at a time, over whole sequences: every sequence that ended, as
    (score, tokens), the best first."""
    size = count // groups
    beams = [[(0.0 if at == 0 else -1e9, ()) for at in range(size)] for _ in range(groups)]
    ended, done = [[] for _ in range(groups)], [False] * groups
    for length in range(1, new + 1):
        taken = torch.zeros(VOCAB)
        for group in range(groups):
            if done[group]:
                continue
            found = []
            for score, tokens in beams[group]:
                ids = torch.tensor([[*prompt, *tokens]])
                values = theirs(ids).logits[0, -1].log_softmax(-1) - penalty * taken
                found += [(score + value, (*tokens, at)) for at, value in enumerate(values.tolist())]
            found = sorted(found, key=lambda one: one[0], reverse=True)[: max(2, 1 + len(ends)) * size]
            going = []
            for rank, (score, tokens) in enumerate(found):
                if tokens[-1] in ends:
                    if rank < size:
                        ended[group].append((score / length**power, tokens))
                elif len(going) < size:
                    going.append((score, tokens))
            ended[group] = sorted(ended[group], key=lambda one: one[0], reverse=True)[:size]
            for _, tokens in going:
                taken[tokens[-1]] += 1
            beams[group] = going
            if len(ended[group]) == size:
                reach = new if early == "never" and power > 0 else length
                best = max(score for score, _ in found) / reach**power
                done[group] = early is True or ended[group][-1][0] >= best
    for group in range(groups):
        if not done[group]:
            ended[group] += [(score / new**power, tokens) for score, tokens in beams[group]]
            ended[group] = sorted(ended[group], key=lambda one: one[0], reverse=True)[:size]
    return sorted((one for group in ended for one in group), key=lambda one: one[0], reverse=True)


@pytest.mark.parametrize(
    ("count", "groups", "penalty", "early", "power"),
    [(4, 2, 0.3, False, 1.0), (4, 4, 1.5, True, 0.5), (6, 3, 0.8, "never", 2.0), (4, 2, 3.0, "never", -1.0)],
)
def test_groups_of_beams_are_those_of_a_plain_search(pair, count, groups, penalty, early, power):
    theirs, model = pair
    ids, mask = padded()
    ends = [25, 44, 9, 17]
    got = model.generate(
        ids,
        attention_mask=mask,
        num_beams=count,
        num_beam_groups=groups,
        diversity_penalty=penalty,
        early_stopping=early,
        length_penalty=power,
        num_return_sequences=count,
        max_new_tokens=9,
        eos_token_id=ends,
        **FLAGS,
    )
    plain = model.generate(ids, attention_mask=mask, num_beams=count, max_new_tokens=9, eos_token_id=ends)
    assert got.sequences[::count].tolist() != plain.tolist()
    for row in range(3):
        expected = grouped(
            theirs,
            ids[row][mask[row] == 1].tolist(),
            count=count,
            groups=groups,
            penalty=penalty,
            new=9,
            ends=ends,
            early=early,
            power=power,
        )
        for at, (score, tokens) in enumerate(expected):
            line = got.sequences[row * count + at, 7:].tolist()
            assert line == [*tokens, *[PAD] * (len(line) - len(tokens))]
            assert abs(float(got.sequences_scores[row * count + at]) - score) < 1e-4 * max(1, abs(score))


# -- drawn ---------------------------------------------------------------------------------------------


def test_beams_are_drawn_without_replacement_by_their_probabilities():
    """Four of five tokens are drawn, and the two likeliest of them go on: how often each two do."""
    probability = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05])
    expected: dict[tuple[int, ...], float] = {}
    for drawn in itertools.permutations(range(5), 4):
        chance, left = 1.0, 1.0
        for token in drawn:
            chance, left = chance * float(probability[token]) / left, left - float(probability[token])
        two = tuple(sorted(drawn)[:2])
        expected[two] = expected.get(two, 0.0) + chance
    counted = dict.fromkeys(expected, 0)
    for seed in range(4000):
        request = Request([1], SamplingParams(9, greedy=False, seed=seed), group=Beams(2))
        going = request.group.choose(request, probability.log()[None])
        counted[tuple(token for _, token in going)] += 1
    for two, chance in expected.items():
        assert abs(counted[two] / 4000 - chance) < 4 * (chance * (1 - chance) / 4000) ** 0.5 + 1e-3, two


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_k": 5},
        {"top_p": 0.5, "min_p": 0.02},
        {"typical_p": 0.4},
        {"epsilon_cutoff": 0.05},
    ],
    ids=str,
)
def test_what_beams_are_drawn_from_is_as_in_transformers(pair, options):
    """The first step, whose scores don't depend on what is drawn; at least three tokens are always kept."""
    options = {"num_beams": 2, "do_sample": True, "max_new_tokens": 2, "eos_token_id": [25, 44], **options}
    expected, got = both(pair, options)
    torch.testing.assert_close(got.scores[0], expected.scores[0], rtol=1e-4, atol=1e-4)
    assert (got.scores[0] > -torch.inf).sum(1).min() >= 3


def test_drawn_beams_follow_the_seed_alone(pair):
    _, model = pair
    ids, mask = padded()
    options = {
        "num_beams": 3,
        "do_sample": True,
        "max_new_tokens": 9,
        "eos_token_id": None,
        "temperature": 2.0,
    }
    together = model.generate(ids, attention_mask=mask, seed=[5, 6, 7], **options)[:, 7:].tolist()
    for row in range(3):
        prompt = [ids[row][mask[row] == 1].tolist()]
        one = model.generate(prompt, seed=5 + row, **options)
        assert one[0, len(prompt[0]) :].tolist() == together[row]
        assert model.generate(prompt, seed=50 + row, **options)[0, len(prompt[0]) :].tolist() != together[row]


# -- how a search ends ---------------------------------------------------------------------------------


def test_stop_strings_end_beams(pair):
    _, model = pair
    letters = alphabet.letters(alphabet.ASCII)
    ids, mask = padded()
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 10, "eos_token_id": None}
    options |= {"attention_mask": mask, "suppress_tokens": [END, PAD, 2], **FLAGS}
    free = model.generate(ids, **options)
    text = letters.decode(free.sequences[0, 7:].tolist())
    got = model.generate(ids, stop_strings=[text[2:4]], tokenizer=letters, length_penalty=0.1, **options)
    reasons = {"stop_string": 0, "length": 0}
    for row, why in zip(got.sequences[:, 7:].tolist(), got.finish_reasons, strict=True):
        new = letters.decode([token for token in row if token != PAD])
        assert new.endswith(text[2:4]) == (why == "stop_string")
        assert text[2:4] not in new[:-1]
        reasons[why] += 1
    assert reasons["stop_string"] >= 1


def test_time_runs_out(pair):
    _, model = pair
    e = Engine(model, cache_tokens=512)
    request = Request([5, 6, 7], SamplingParams(40, max_time=60.0), group=Beams(3, returned=2))
    e.submit(request)
    for _ in range(4):
        assert e.step() == []
    request.submitted -= 61
    ((ended, tokens),) = e.step()
    assert ended is request and tokens == request.output == request.group.hypotheses[0].tokens
    assert [len(found.tokens) for found in request.group.hypotheses] == [5, 5]
    assert request.finish_reason == "time" and e.pages.free == e.pages.count
    cancelled = e.submit(Request([5, 6, 7], SamplingParams(40), group=Beams(3)))
    e.cancel(cancelled)
    assert cancelled.group.hypotheses == [] and not e.has_work


def test_where_nothing_can_follow_there_are_fewer_sequences(pair):
    _, model = pair
    ids = torch.tensor([[5, 6, 7]])
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 4, "eos_token_id": 25, **FLAGS}
    got = model.generate(ids, prefix_allowed_tokens_fn=lambda row, ids: [25], **options)
    assert got.sequences[0].tolist() == [5, 6, 7, 25] and got.finish_reasons[0] == "stop"
    assert got.sequences.shape == (3, 4)


def test_errors_end_a_search_alone(pair):
    _, model = pair

    def broken(ids, scores):
        raise KeyError("mine")

    e = Engine(model, cache_tokens=512)
    bad = Request([5, 6], SamplingParams(9), logits_processors=(broken,), group=Beams(2))
    nan = Request([5, 6], SamplingParams(9), group=Beams(2))
    good = Request([5, 6], SamplingParams(9), group=Beams(2))
    e.run([good])
    again = Request([5, 6], SamplingParams(9), group=Beams(2))
    e.run([bad, again])
    assert isinstance(bad.error, KeyError) and again.output == good.output
    weight = model.model.norm.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[3] = float("nan")
        e.run([nan])
        weight.copy_(kept)
    assert isinstance(nan.error, NumericsError) and "norm" in str(nan.error)
    assert e.pages.free == e.pages.count


IDS = torch.full((2, 5), 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_return_sequences": 3}, r"num_return_sequences is 3; expected 1 to num_beams=2"),
        ({"num_beams": 300}, r"has 300 rows \(num_beams, guidance\), but the engine runs at most 256"),
        ({"num_beams": 0}, r"num_beams is 0; expected an integer of at least 1"),
        ({"early_stopping": "soon"}, r"early_stopping is 'soon'; expected True, False or 'never'"),
        ({"num_beam_groups": 2}, r"num_beam_groups is 2 and diversity_penalty 0, so that all groups"),
        ({"diversity_penalty": 0.5}, r"diversity_penalty is 0.5 with one group of beams"),
        ({"num_beams": 3, "num_beam_groups": 2, "diversity_penalty": 1.0}, r"2; it must divide num_beams=3"),
        ({"num_beams": 1, "num_beam_groups": 2, "diversity_penalty": 1.0}, r"groups is 2 without beams"),
        ({"num_beam_groups": 2, "diversity_penalty": 1.0, "do_sample": True}, r"of beams are not drawn"),
        ({"guidance_scale": 1.5}, r"num_beams=2 and guidance_scale=1.5 don't go together"),
        ({"logprobs": 2}, r"logprobs are kept of single rows"),
        ({"streamer": transformers.TextStreamer(None)}, r"a streamer shows tokens as they come, and with"),
    ],
)
def test_what_does_not_go_together_is_named(pair, options, message):
    with pytest.raises(RequestError, match=message):
        pair[1].generate(IDS, **{"max_new_tokens": 3, "num_beams": 2, **options})
    with pytest.raises(RequestError, match="beams are known at the end; use generate"):
        pair[1].stream(IDS[:1], max_new_tokens=3, num_beams=2)


def test_more_beams_than_the_cache_holds(pair):
    e = Engine(pair[1], num_pages=6, page_size=4)
    with pytest.raises(RequestError, match=r"4 rows .* of up to 18 tokens need 14 pages of 4 tokens"):
        e.submit(Request(list(range(3, 13)), SamplingParams(8), group=Beams(4)))
    fits = Request(list(range(3, 13)), SamplingParams(6), group=Beams(2))
    e.run([fits])
    assert fits.finish_reason == "length"
