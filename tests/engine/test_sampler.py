"""The sampler against transformers' processors, its hash against plain integers, its draws against chance."""

from __future__ import annotations

from math import inf, sqrt

import pytest
import torch
from transformers.generation import logits_process as hf

from taut.engine.request import Request, SamplingParams
from taut.engine.sampler import (
    NUCLEUS_WIDTH,
    NonFiniteLogits,
    NothingLeft,
    Sampler,
    repeating,
    uniform,
)
from taut.errors import RequestError

EOS = (1, 5)
PROMPT = [3, 9, 4, 3, 9, 7, 2]
OUTPUT = [3, 9, 4, 6, 3, 9]


def request(output=OUTPUT, *, prompt=PROMPT, keep_scores=True, logits_processors=(), **options) -> Request:
    options = {"max_new_tokens": 50, "eos_token_ids": EOS, **options}
    made = Request(
        list(prompt),
        SamplingParams(**options),
        logits_processors=tuple(logits_processors),
        keep_scores=keep_scores,
    )
    made.output = list(output)
    return made


def logits(rows: int, vocab: int, seed: int = 0, dtype=torch.float64, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * spread).to(dtype)


def halve(ids, scores):
    return torch.where(torch.arange(scores.shape[1]) % 2 == 0, scores - 1.5, scores)


def oracle(row: Request) -> hf.LogitsProcessorList:
    """transformers' processors for a request, in the order of its `_get_logits_processor`."""
    p = row.params
    made = hf.LogitsProcessorList()
    bias = {(token,): float(value) for token, value in p.logit_bias.items()} | dict(p.sequence_bias)
    if bias:
        made.append(hf.SequenceBiasLogitsProcessor(bias))
    if p.repetition_penalty != 1.0:
        made.append(hf.RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    if p.no_repeat_ngram_size:
        made.append(hf.NoRepeatNGramLogitsProcessor(p.no_repeat_ngram_size))
    if p.bad_words:
        words = [list(word) for word in p.bad_words]
        made.append(hf.NoBadWordsLogitsProcessor(words, list(p.eos_token_ids)))
    if p.min_new_tokens:
        made.append(
            hf.MinNewTokensLengthLogitsProcessor(len(row.prompt), p.min_new_tokens, list(p.eos_token_ids))
        )
    made.extend(row.logits_processors)
    if not p.greedy:
        if p.temperature != 1.0:
            made.append(hf.TemperatureLogitsWarper(p.temperature))
        if p.top_k:
            made.append(hf.TopKLogitsWarper(p.top_k))
        if p.top_p < 1.0:
            made.append(hf.TopPLogitsWarper(p.top_p))
        if p.min_p:
            made.append(hf.MinPLogitsWarper(p.min_p))
        if p.typical_p < 1.0:
            made.append(hf.TypicalLogitsWarper(p.typical_p))
    return made


DRAW = {"greedy": False}
OPTIONS = [
    {},
    DRAW,
    {"logit_bias": {4: 2.5, 8: -3.0, 0: -inf}},
    {"sequence_bias": {(3, 9, 4): 4.0, (9, 8): -2.0, (7, 7): 9.0, (2,): 1.0}},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3},
    {"no_repeat_ngram_size": 40},
    {"bad_words": ((7,), (9, 4), (4, 9, 8), (1,), (3, 9, 10), (3, 9))},
    {"min_new_tokens": 7},
    {"min_new_tokens": 6},
    {"logits_processors": (halve,), "repetition_penalty": 1.2},
    {**DRAW, "temperature": 0.7},
    {**DRAW, "top_k": 1},
    {**DRAW, "top_k": 50},
    {**DRAW, "top_k": 10**6},
    {**DRAW, "top_p": 0.9},
    {**DRAW, "top_p": 0.001},
    {**DRAW, "top_p": 0.9999},
    {**DRAW, "min_p": 0.05},
    {**DRAW, "min_p": 1.0},
    {**DRAW, "typical_p": 0.6},
    {**DRAW, "typical_p": 0.99},
    {**DRAW, "top_k": 40, "top_p": 0.8, "temperature": 1.4},
    {**DRAW, "top_k": 40, "top_p": 0.8, "min_p": 0.02, "typical_p": 0.9},
    {**DRAW, "top_p": 0.8, "min_p": 0.02, "temperature": 0.8},
    {**DRAW, "top_p": 0.95, "typical_p": 0.9},
    {
        **DRAW,
        "top_k": 20,
        "top_p": 0.9,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "bad_words": ((2,), (9, 0)),
        "min_new_tokens": 30,
        "logit_bias": {6: 1.0},
    },
]


@pytest.mark.parametrize("vocab", [24, 1000, 3 * NUCLEUS_WIDTH])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_processed_scores_are_those_of_transformers(vocab, dtype):
    rows = [request(**options, seed=index) for index, options in enumerate(OPTIONS)]
    for seed in range(4):
        given = logits(len(rows), vocab, seed, dtype)
        before = given.clone()
        tokens, scores = Sampler()(given, rows)
        assert torch.equal(given, before)
        for index, row in enumerate(rows):
            ids = torch.tensor([row.prompt + row.output])
            expected = oracle(row)(ids, given[index : index + 1].clone())[0]
            differ = scores[index].isinf() != expected.isinf()
            if dtype == torch.float32:
                # transformers sums thousands of probabilities in float32: its cut may fall one token beside
                assert given[index].double().softmax(-1)[differ].sum() < 1e-6, OPTIONS[index]
            else:
                assert not differ.any(), OPTIONS[index]
            torch.testing.assert_close(scores[index][~differ], expected[~differ], rtol=1e-6, atol=1e-6)
            assert expected[tokens[index]] > -inf
            if row.params.greedy:
                assert tokens[index] == expected.argmax()


def test_ties_are_kept_as_transformers_keeps_them():
    """bfloat16 logits tie often: all that equal the k-th score stay; a nucleus ends inside the tie, where
    transformers' unstable sort decides which of the equals stay and Taut keeps the larger ids."""
    options = [{"top_k": k} for k in (1, 2, 7, 50)] + [{"top_p": p} for p in (0.1, 0.5, 0.93)]
    options += [{"top_k": 30, "top_p": 0.7}, {"typical_p": 0.5}, {"top_k": 12, "typical_p": 0.8}]
    rows = [request(greedy=False, **some) for some in options]
    for vocab in (300, 2 * NUCLEUS_WIDTH):
        for seed in range(5):
            given = (logits(len(rows), vocab, seed) * 2).round() / 2
            _, scores = Sampler()(given, rows)
            for index, row in enumerate(rows):
                expected = oracle(row)(torch.tensor([row.prompt + row.output]), given[index : index + 1])[0]
                assert torch.equal(scores[index].sort().values, expected.sort().values), options[index]
                if row.params.top_p == 1.0:
                    assert torch.equal(scores[index], expected), options[index]
                kept, gone = scores[index] > -inf, scores[index] == -inf
                edge = scores[index][kept].min()
                if row.params.typical_p == 1.0 and (gone & (given[index] == edge)).any():
                    ids = torch.arange(vocab)
                    assert ids[kept & (given[index] == edge)].min() > ids[gone & (given[index] == edge)].max()


def test_presence_and_frequency_count_generated_tokens_only():
    row = request(output=[4, 4, 6], prompt=[7, 7, 4], presence_penalty=0.5, frequency_penalty=0.25)
    given = logits(1, 10)
    _, scores = Sampler()(given, [row])
    change = torch.zeros(1, 10, dtype=torch.float64)
    change[0, 4], change[0, 6] = -(0.5 + 2 * 0.25), -(0.5 + 0.25)
    torch.testing.assert_close(scores, given + change)


def test_repeating_finds_what_would_complete_an_ngram():
    history = [1, 2, 3, 1, 2, 4, 1, 2]
    assert sorted(repeating(history, 1)) == [1, 2, 3, 4]
    assert sorted(repeating(history, 2)) == [3, 4]
    assert repeating(history, 3) == [3, 4]
    assert repeating(history, 4) == []
    assert repeating([5], 2) == []
    assert repeating([5, 5], 2) == [5]


def test_all_greedy_rows_are_the_argmax_and_keep_nothing():
    given = logits(5, 100)
    tokens, scores = Sampler()(given, [request(keep_scores=False) for _ in range(5)])
    assert tokens == given.argmax(-1).tolist()
    assert scores is None


# -- draws ---------------------------------------------------------------------------------------------


def splitmix(seed: int, step: int) -> float:
    mask = (1 << 64) - 1

    def mixed(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    gamma = 0x9E3779B97F4A7C15
    return (mixed((mixed((seed + gamma) & mask) + step * gamma) & mask) >> 12) / 2**52


def test_uniform_is_splitmix64():
    pairs = [(0, 0), (0, 1), (1, 0), (-1, 3), (2**63 - 1, 10**6), (-(2**63), 7)]
    pairs += [(seed * 7919, step) for seed in range(20) for step in range(20)]
    seeds, steps = torch.tensor([s for s, _ in pairs]), torch.tensor([t for _, t in pairs])
    assert uniform(seeds, steps).tolist() == [splitmix(s % 2**64, t) for s, t in pairs]


def test_first_output_of_splitmix64_is_the_published_one():
    """The first output of the reference generator seeded with 0 is 0xE220A8397B1DCDAF: one mix."""
    from taut.kernels.sample import _mixed, signed

    first = _mixed(torch.tensor([signed(0x9E3779B97F4A7C15)])).item() % 2**64
    assert first == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("by", ["seed", "step"])
def test_uniforms_are_uniform_along_seeds_and_along_steps(by):
    count = torch.arange(100_000)
    fixed = torch.full_like(count, 12345)
    drawn = uniform(count, fixed) if by == "seed" else uniform(fixed, count)
    held = torch.histc(drawn, bins=100, min=0, max=1)
    chi2 = ((held - 1000) ** 2 / 1000).sum().item()
    assert chi2 < 99 + 4 * sqrt(2 * 99)
    assert abs(torch.corrcoef(torch.stack((drawn[:-1], drawn[1:])))[0, 1]) < 0.02
    assert drawn.min() >= 0 and drawn.max() < 1


@pytest.mark.parametrize("options", [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}, {"typical_p": 0.7}])
def test_draws_follow_the_processed_distribution(options):
    given = logits(1, 30, seed=3, spread=1.0)
    count = 4000
    rows = [request(greedy=False, seed=seed, **options) for seed in range(count)]
    tokens, scores = Sampler()(given.expand(count, -1), rows)
    expected = scores[0].softmax(-1) * count
    seen = torch.bincount(torch.tensor(tokens), minlength=30).double()
    assert (seen[expected == 0] == 0).all()
    kept = expected > 0
    chi2 = ((seen - expected)[kept] ** 2 / expected[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    assert chi2 < freedom + 4 * sqrt(2 * freedom)


def test_a_draw_does_not_depend_on_the_batch():
    """Each row alone, in the whole batch, and in the reversed batch: the same token and scores."""
    vocab = 2 * NUCLEUS_WIDTH
    rows = [request(**options, seed=100 + index) for index, options in enumerate(OPTIONS)]
    given = logits(len(rows), vocab, 7, torch.float32)
    together, scores = Sampler()(given, rows)
    backwards, _ = Sampler()(given.flip(0), rows[::-1])
    assert backwards[::-1] == together
    for index, row in enumerate(rows):
        alone, one = Sampler()(given[index : index + 1], [row])
        assert alone == [together[index]], OPTIONS[index]
        torch.testing.assert_close(one[0], scores[index], rtol=0, atol=0)


def test_seed_and_step_change_the_draw_and_nothing_else_does():
    given = torch.zeros(1, 1000)
    first = Sampler()(given, [request(greedy=False, seed=1)])[0]
    assert Sampler()(given, [request(greedy=False, seed=1, prompt=[8], output=[2] * len(OUTPUT))])[0] == first
    assert Sampler()(given, [request(greedy=False, seed=2)])[0] != first
    assert Sampler()(given, [request(greedy=False, seed=1, output=OUTPUT[1:])])[0] != first
    assert Sampler()(given, [request(greedy=False, seed=1 + 2**64)])[0] == first


# -- what can't be sampled -----------------------------------------------------------------------------


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("value", [float("nan"), inf])
def test_rows_that_are_not_finite_are_named(greedy, value):
    given = logits(4, 50)
    given[1, 7] = given[3, 0] = value
    with pytest.raises(NonFiniteLogits, match="row 1, 3 are not finite") as caught:
        Sampler()(given, [request(greedy=greedy) for _ in range(4)])
    assert caught.value.rows == [1, 3]


def test_minus_infinity_is_a_ban_not_an_error():
    given = torch.full((2, 5), -inf)
    given[:, 3] = -2.0
    tokens, _ = Sampler()(given, [request(), request(greedy=False, top_k=4, top_p=0.9)])
    assert tokens == [3, 3]


@pytest.mark.parametrize("greedy", [True, False])
def test_a_row_with_every_token_banned_is_named(greedy):
    rows = [request(), request(greedy=greedy, bad_words=tuple((token,) for token in range(6)))]
    rows[1].params.__dict__["eos_token_ids"] = ()
    with pytest.raises(NothingLeft, match="row 1: every token is excluded") as caught:
        Sampler()(logits(2, 6), rows)
    assert caught.value.rows == [1]


def test_wrong_shapes_are_refused():
    with pytest.raises(RequestError, match=r"\(2, 9\) for 1 requests"):
        Sampler()(logits(2, 9), [request()])
    with pytest.raises(RequestError, match=r"logits processor .* returned \(9,\)"):
        Sampler()(logits(1, 9), [request(logits_processors=[lambda ids, scores: scores[0]])])


@pytest.mark.gpu
def test_cuda_chooses_what_the_cpu_chooses():
    rows = [request(**options, seed=index) for index, options in enumerate(OPTIONS) if "halve" not in options]
    rows = [row for row in rows if not row.logits_processors]
    given = logits(len(rows), 3 * NUCLEUS_WIDTH, 5, torch.float32)
    here, scores = Sampler()(given, rows)
    there, moved = Sampler()(given.cuda(), rows)
    assert here == there
    torch.testing.assert_close(moved.cpu(), scores)
