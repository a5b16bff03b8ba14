"""`generate` against transformers' on one tiny checkpoint; prompts, streams, stops and what is refused."""

from __future__ import annotations

import asyncio
import copy
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.generation import logits_process, stopping_criteria

from taut.engine.generate import GenerateOutput, generate, stream
from taut.engine.generation import GenerationConfig
from taut.engine.request import Request, SamplingParams
from taut.engine.resident import Resident
from taut.engine.streamers import TextIteratorStreamer, TextStreamer
from taut.errors import NumericsError, RequestError
from taut.modeling import CausalLM
from tests.engine import letters as alphabet

VOCAB, CONTEXT, END, PAD, BOS = 61, 64, 0, 1, 2
PROMPT = "Hello wor"
PLAIN = {"max_new_tokens": 10, "eos_token_id": None, "suppress_tokens": [END, PAD, BOS]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The same random Llama in transformers and in Taut, with lively logits."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        eos_token_id=END,
        pad_token_id=PAD,
        bos_token_id=BOS,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return theirs, CausalLM.from_pretrained(str(folder), dtype=torch.float32)


@pytest.fixture(scope="module")
def model(pair):
    return pair[1]


@pytest.fixture(scope="module")
def letters():
    return alphabet.letters(alphabet.ASCII)


@pytest.fixture(autouse=True)
def no_warning_is_expected():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning, module="taut|tests")
        yield


def padded():
    """Three rows of 7, 4 and 5 tokens, padded left to 7."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (3, 7), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :2] = 0
    return torch.where(mask == 1, ids, PAD), mask


def alone(model, row, **options):
    """New tokens of one unpadded row."""
    return generate(model, [row], **options)[0, len(row) :].tolist()


def new_tokens(output, row, width, pad=PAD):
    tokens = output[row, width:].tolist()
    while tokens and tokens[-1] == pad:
        tokens.pop()
    return tokens


# -- what transformers gives ---------------------------------------------------------------------------


def last_letter_bias(ids, scores):
    return scores.scatter_add(1, ids[:, -1:], torch.full((len(ids), 1), -3.0))


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 20},
        {"max_length": 19},
        {"max_new_tokens": 40, "eos_token_id": [5, 25, 50]},
        {"max_new_tokens": 30, "eos_token_id": [25, 44], "min_new_tokens": 12},
        {"max_new_tokens": 30, "eos_token_id": [25, 44], "min_length": 15},
        {"max_new_tokens": 25, "repetition_penalty": 1.8},
        {"max_new_tokens": 25, "no_repeat_ngram_size": 2},
        {"max_new_tokens": 20, "bad_words_ids": [[32], [25, 37], [9]]},
        {"max_new_tokens": 20, "sequence_bias": {(32,): -20.0, (44, 7): 15.0, (9,): 4.0}},
        {"max_new_tokens": 20, "suppress_tokens": [31, 42, 45]},
        {"max_new_tokens": 20, "logits_processor": [last_letter_bias]},
        {"max_new_tokens": 20, "logits_processor": [logits_process.TopKLogitsWarper(5)]},
        {"max_new_tokens": 20, "prefix_allowed_tokens_fn": lambda row, ids: [3 + row, 20, int(ids[-1])]},
        {"max_new_tokens": 20, "stopping_criteria": [stopping_criteria.MaxLengthCriteria(13)]},
        {"max_new_tokens": 30, "stopping_criteria": [stopping_criteria.EosTokenCriteria([25, 44])]},
        {"max_new_tokens": 3, "temperature": 0.0, "num_beams": 1, "use_cache": False},
        {"max_new_tokens": 9, "forced_eos_token_id": [25, 44], "eos_token_id": [25, 44]},
        {"max_new_tokens": 9, "begin_suppress_tokens": [37, 11, 24, 51]},
        {"max_new_tokens": 30, "exponential_decay_length_penalty": (4, 1.6), "eos_token_id": [25, 44]},
    ],
    ids=",".join,
)
def test_greedy_output_is_that_of_transformers(pair, options):
    theirs, model = pair
    ids, mask = padded()
    lists = {
        "logits_processor": transformers.LogitsProcessorList,
        "stopping_criteria": transformers.StoppingCriteriaList,
    }
    wrapped = {k: lists[k](v) if k in lists else v for k, v in options.items()}
    if "temperature" in wrapped:
        wrapped.pop("temperature")
    expected = theirs.generate(ids, attention_mask=mask, do_sample=False, **wrapped)
    got = generate(model, ids, attention_mask=mask, do_sample=False, **options)
    assert got.dtype == torch.int64 and got.shape == expected.shape
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"do_sample": True, "temperature": 0.7, "top_k": 9, "seed": 3},
        {"do_sample": True, "top_p": 0.8, "min_p": 0.01, "typical_p": 0.95, "seed": 3},
        {"do_sample": True, "seed": 3},
        {"do_sample": True, "top_k": None, "seed": 3},
        {"do_sample": True, "epsilon_cutoff": 0.02, "temperature": 1.5, "seed": 3},
        {"do_sample": True, "eta_cutoff": 0.05, "top_p": 0.95, "seed": 3},
    ],
    ids=str,
)
def test_scores_and_logits_are_those_of_transformers(pair, options):
    """Sampled tokens differ, so transformers is fed ours: its scores at every step are compared."""
    theirs, model = pair
    ids, mask = padded()
    flags = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = generate(model, ids, attention_mask=mask, max_new_tokens=6, eos_token_id=None, **flags, **options)
    assert isinstance(out, GenerateOutput) and out[0] is out["sequences"] is out.sequences
    assert len(out.scores) == len(out.logits) == 6
    options = {k: v for k, v in options.items() if k != "seed"}
    for step in range(6):
        seen = out.sequences[:, : ids.shape[1] + step]
        longer = torch.cat((mask, torch.ones(3, step, dtype=mask.dtype)), dim=1)
        one = theirs.generate(
            seen, attention_mask=longer, max_new_tokens=1, eos_token_id=None, **flags, **options
        )
        torch.testing.assert_close(out.logits[step], one.logits[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.scores[step], one.scores[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_guidance_is_that_of_transformers(pair, rows):
    theirs, model = pair
    ids, mask = padded()
    negative, negative_mask = ids.flip(0, 1)[:rows], mask.flip(0, 1)[:rows]  # padded right
    options = {"max_new_tokens": 6, "eos_token_id": None, "guidance_scale": 2.5}
    flags = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    given = {"negative_prompt_ids": negative, "negative_prompt_attention_mask": negative_mask}
    out = model.generate(ids, attention_mask=mask, **given, **options, **flags)
    for row in range(3):
        other = row % rows
        one = theirs.generate(
            ids[row : row + 1][:, mask[row] == 1],
            negative_prompt_ids=negative[other : other + 1][:, negative_mask[other] == 1],
            **options,
            **flags,
        )
        assert out.sequences[row, 7:].tolist() == one.sequences[0, -6:].tolist()
        for step in range(6):
            torch.testing.assert_close(out.scores[step][row], one.scores[step][0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(out.logits[step][row], one.logits[step][0], rtol=1e-4, atol=1e-4)
    assert out.sequences.tolist() != model.generate(ids, attention_mask=mask, **options).tolist()


def test_a_forced_first_token_follows_a_prompt_of_one(pair):
    theirs, model = pair
    options = {"max_new_tokens": 5, "eos_token_id": None, "forced_bos_token_id": 33}
    options["begin_suppress_tokens"] = [int(model.generate([[5, 33]], max_new_tokens=1)[0, -1])]
    for ids in (torch.tensor([[5]]), torch.tensor([[5, 6]])):
        assert model.generate(ids, **options).tolist() == theirs.generate(ids, **options).tolist()


def test_logprobs_are_the_models_own(pair):
    _, model = pair
    ids, mask = padded()
    options = {"max_new_tokens": 5, "eos_token_id": None, "do_sample": True, "seed": 1, "temperature": 3.0}
    flags = {"return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids, attention_mask=mask, logprobs=3, **options, **flags)
    for row in range(3):
        for step, kept in enumerate(out.logprobs[row]):
            values = out.logits[step][row].log_softmax(-1)
            assert kept.logprob == pytest.approx(float(values[out.sequences[row, 7 + step]]), abs=1e-5)
            assert [token for token, _ in kept.top] == values.topk(3).indices.tolist()
            assert [value for _, value in kept.top] == pytest.approx(values.topk(3).values.tolist(), abs=1e-5)
    (only,) = model.generate([[5, 6]], max_new_tokens=1, logprobs=0, return_dict_in_generate=True).logprobs
    assert only[0].top == []


def test_renormalized_scores_are_log_probabilities(pair):
    theirs, model = pair
    ids, mask = padded()
    flags = {"return_dict_in_generate": True, "output_scores": True, "renormalize_logits": True}
    ours, other = (
        g(ids, attention_mask=mask, max_new_tokens=3, **flags) for g in (model.generate, theirs.generate)
    )
    for mine, expected in zip(ours.scores, other.scores, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


def test_options_come_in_the_order_of_transformers(pair):
    """Call, config of the call, model's config; transformers' own GenerationConfig is taken too."""
    _, model = pair
    ids, mask = padded()
    given = transformers.GenerationConfig(max_new_tokens=9, repetition_penalty=1.5)
    first = generate(model, ids, given, attention_mask=mask, max_new_tokens=4)
    second = generate(model, ids, attention_mask=mask, max_new_tokens=4, repetition_penalty=1.5)
    assert first.shape == (3, 11) and torch.equal(first, second)
    kept = model.generation_config
    model.generation_config = GenerationConfig(max_new_tokens=2, eos_token_id=END)
    try:
        assert generate(model, ids, attention_mask=mask).shape == (3, 9)
        assert generate(model, ids, attention_mask=mask, max_new_tokens=3).shape == (3, 10)
    finally:
        model.generation_config = kept


def test_length_defaults_and_clashes_are_said(model):
    ids = torch.full((1, 5), 7)
    with pytest.warns(UserWarning, match="neither max_new_tokens nor max_length is set: at most 20"):
        assert generate(model, ids, eos_token_id=None).shape == (1, 25)
    with pytest.warns(UserWarning, match=r"max_new_tokens=3 and max_length=30 are both set"):
        assert generate(model, ids, max_new_tokens=3, max_length=30, eos_token_id=None).shape == (1, 8)
    with pytest.warns(UserWarning, match="generation ends after 59"):
        assert generate(model, ids, max_new_tokens=100, eos_token_id=None).shape == (1, CONTEXT)


# -- prompts -------------------------------------------------------------------------------------------


def test_padding_anywhere_gives_what_the_row_gives_alone(model):
    ids, mask = padded()
    rows = [ids[row][mask[row] == 1].tolist() for row in range(3)]
    expected = [alone(model, row, max_new_tokens=8, eos_token_id=None) for row in rows]

    right, right_mask = torch.full((3, 7), PAD), torch.zeros(3, 7)
    inside, inside_mask = torch.full((3, 7), 60), torch.zeros(3, 7, dtype=torch.bool)
    for index, row in enumerate(rows):
        right[index, : len(row)] = torch.tensor(row)
        right_mask[index, : len(row)] = 1
        places = torch.arange(7)[
            torch.randperm(7, generator=torch.Generator().manual_seed(index))[: len(row)]
        ]
        places = places.sort().values
        inside[index, places] = torch.tensor(row)
        inside_mask[index, places] = True

    cases = [(ids, mask), (ids.int(), None), (right, right_mask), (right, None), (inside, inside_mask)]
    for given, given_mask in cases:
        out = generate(model, given, attention_mask=given_mask, max_new_tokens=8, eos_token_id=None)
        assert out[:, :7].tolist() == given.tolist()
        assert out[:, 7:].tolist() == expected
    ragged = generate(model, rows, max_new_tokens=8, eos_token_id=None)
    assert ragged.tolist() == [*torch.cat((ids, torch.tensor(expected)), dim=1).tolist()]
    assert generate(model, inputs=rows[0], max_new_tokens=8, eos_token_id=None)[0, 7:].tolist() == expected[0]


def test_without_a_mask_an_end_token_that_pads_is_part_of_the_prompt(model):
    ids = torch.tensor([[END, END, 9, 8], [5, 6, 7, 8]])
    with pytest.warns(UserWarning, match="no attention_mask is given, and the pad token 0 also ends"):
        out = generate(model, ids, pad_token_id=END, max_new_tokens=5)
    assert new_tokens(out, 0, 4, END) == alone(model, [END, END, 9, 8], max_new_tokens=5, pad_token_id=END)


def test_no_input_starts_from_bos(pair):
    theirs, model = pair
    assert generate(model, max_new_tokens=5).tolist() == theirs.generate(max_new_tokens=5).tolist()
    with pytest.raises(RequestError, match="no input_ids, and the model has no BOS token"):
        generate(model, max_new_tokens=5, bos_token_id=None)


def test_rows_that_end_are_filled_with_pad(model):
    ids, mask = padded()
    free = generate(model, ids, attention_mask=mask, max_new_tokens=10, eos_token_id=None)[:, 7:]
    end = int(free[0, 2])
    options = {"max_new_tokens": 10, "eos_token_id": end, "return_dict_in_generate": True}
    for pad, filled in ((60, 60), (None, end)):
        flags = {"output_scores": True, "output_logits": True, "pad_token_id": pad}
        if pad is None:
            with pytest.warns(UserWarning, match=f"filled up with the end-of-sequence token {end}"):
                out = generate(model, ids, attention_mask=mask, **options, **flags)
        else:
            out = generate(model, ids, attention_mask=mask, **options, **flags)
        assert out.finish_reasons[0] == "stop" and "length" in out.finish_reasons
        assert out.sequences[0, 7:].tolist() == [*free[0, :3].tolist(), *[filled] * 7]
        for step in out.scores[3:] + out.logits[3:]:
            assert step[0, filled] == 0 and step[0].exp().sum() == 1


# -- seeds ---------------------------------------------------------------------------------------------


def test_draws_follow_the_seed_alone(model):
    ids, mask = padded()
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 2.0, "eos_token_id": None}
    seeds = [11, 12, 13]
    together = generate(model, ids, attention_mask=mask, seed=seeds, **options)[:, 7:].tolist()
    for row, seed in enumerate(seeds):
        prompt = ids[row][mask[row] == 1].tolist()
        assert alone(model, prompt, seed=seed, **options) == together[row]
        assert alone(model, prompt, seed=seed + 5, **options) != together[row]


def test_torch_manual_seed_reproduces(model):
    ids, _ = padded()
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 2.0}
    drawn = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        drawn.append([generate(model, ids[:1], **options).tolist() for _ in range(2)])
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][1]


def test_copies_of_a_prompt_differ_and_repeat(model):
    ids, mask = padded()
    options = {"max_new_tokens": 9, "do_sample": True, "temperature": 3.0, "eos_token_id": None}
    out = generate(model, ids, attention_mask=mask, num_return_sequences=3, seed=4, **options)
    again = generate(model, ids, attention_mask=mask, num_return_sequences=3, seed=4, **options)
    assert out.shape == (9, 16) and torch.equal(out, again)
    assert out[:, :7].tolist() == ids.repeat_interleave(3, 0).tolist()
    assert len({tuple(row) for row in out[:, 7:].tolist()}) == 9


# -- stop strings and criteria -------------------------------------------------------------------------


def test_stop_strings_end_each_row_after_the_token_that_completes_one(model, letters):
    ids, mask = padded()
    options = {**PLAIN, "max_new_tokens": 12, "attention_mask": mask}
    free = generate(model, ids, **options)[:, 7:]
    texts = [letters.decode(row) for row in free.tolist()]
    stops = [texts[0][3:5], texts[1][7:10]]
    out = generate(model, ids, stop_strings=stops, tokenizer=letters, return_dict_in_generate=True, **options)
    for row, text in enumerate(texts):
        ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
        expected = free[row, : min(ends, default=12)].tolist()
        assert new_tokens(out.sequences, row, 7) == expected
        assert out.finish_reasons[row] == ("stop_string" if ends else "length")


def test_criteria_see_the_row_and_its_scores_and_end_it_alone(model):
    ids, mask = padded()
    seen = []

    def third(row, scores):
        seen.append((tuple(row.shape), None if scores is None else [tuple(s.shape) for s in scores]))
        return torch.tensor([row[0, 0] != PAD and row.shape[1] >= 10])

    flags = {"return_dict_in_generate": True, "output_scores": True}
    options = {"attention_mask": mask, "max_new_tokens": 6, "eos_token_id": None}
    out = generate(model, ids, stopping_criteria=third, **options, **flags)
    assert out.finish_reasons == ("stop", "length", "length")
    assert len(new_tokens(out.sequences, 0, 7)) == 3
    assert ((1, 9), [(1, VOCAB)] * 2) in seen
    seen.clear()
    generate(model, ids, stopping_criteria=[third, lambda row, scores: False], **options)
    assert {scores for _, scores in seen} == {None}


# -- streams -------------------------------------------------------------------------------------------


def test_a_streamer_gets_the_prompt_and_each_token(model, letters, capsys):
    ids = torch.tensor([letters.encode(PROMPT)])
    text = letters.decode(alone(model, ids[0].tolist(), **PLAIN))
    generate(model, ids, streamer=TextStreamer(letters), **PLAIN)
    assert capsys.readouterr().out == PROMPT + text + "\n"
    theirs = transformers.TextStreamer(letters, skip_prompt=True)
    generate(model, ids, streamer=theirs, **PLAIN)
    assert capsys.readouterr().out == text + "\n"
    stop = text[4:7]
    streamer = TextStreamer(letters, skip_prompt=True)
    generate(model, ids, streamer=streamer, stop_strings=stop, tokenizer=letters, **PLAIN)
    assert capsys.readouterr().out == text[: text.find(stop)] + "\n"


def test_an_iterator_streamer_runs_beside_and_fails_with_generate(model, letters):
    ids = torch.tensor([letters.encode(PROMPT)])
    text = letters.decode(alone(model, ids[0].tolist(), **PLAIN))
    streamer = TextIteratorStreamer(letters, skip_prompt=True, timeout=30)
    thread = threading.Thread(target=generate, args=(model, ids), kwargs={"streamer": streamer, **PLAIN})
    thread.start()
    assert "".join(streamer) == text
    thread.join()

    def broken(ids, scores):
        raise KeyError("mine")

    streamer = TextIteratorStreamer(letters, skip_prompt=True, timeout=30)
    with pytest.raises(KeyError, match="mine"):
        generate(model, ids, streamer=streamer, logits_processor=[broken], **PLAIN)
    with pytest.raises(KeyError, match="mine"):
        next(streamer)


def test_closing_a_streamer_ends_generation(model, letters):
    class Impatient(TextIteratorStreamer):
        def on_finalized_text(self, text, stream_end=False):
            super().on_finalized_text(text, stream_end)
            self.close()

    ids = torch.tensor([letters.encode(PROMPT)])
    out = generate(
        model,
        ids,
        streamer=Impatient(letters, skip_prompt=True),
        max_new_tokens=40,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    assert out.sequences.shape[1] == ids.shape[1] + 1 and out.finish_reasons == ("cancelled",)


def test_a_stream_gives_text_or_tokens_and_why_it_ended(model, letters):
    ids = torch.tensor([letters.encode(PROMPT)])
    tokens = alone(model, ids[0].tolist(), **PLAIN)
    text = letters.decode(tokens)
    assert list(stream(model, ids, **PLAIN)) == tokens
    pieces = stream(model, ids, tokenizer=letters, **PLAIN)
    assert pieces.finish_reason is None and next(pieces) == text[0]
    assert "".join(pieces) == text[1:]
    assert (pieces.finish_reason, pieces.tokens) == ("length", tokens)
    cut = stream(model, ids, tokenizer=letters, stop_strings=[text[4:7]], **PLAIN)
    assert "".join(cut) == text[: text.find(text[4:7])]
    assert cut.finish_reason == "stop_string"


def test_closing_a_stream_frees_its_pages_at_once(model, letters):
    ids = torch.tensor([letters.encode(PROMPT)])
    for leave in ("close", "with", "break"):
        pieces = stream(model, ids, max_new_tokens=40, eos_token_id=None)
        engine = pieces._engine
        next(pieces)
        assert engine.pages.free < engine.pages.count
        if leave == "close":
            pieces.close()
        elif leave == "with":
            with pieces:
                pass
        else:
            del pieces
        assert engine.pages.free == engine.pages.count and not engine.has_work
        if leave == "close":
            assert list(pieces) == [] and pieces.finish_reason == "cancelled"


def test_an_asynchronous_stream(model, letters):
    ids = torch.tensor([letters.encode(PROMPT)])
    tokens = alone(model, ids[0].tolist(), **PLAIN)

    async def main():
        whole = [token async for token in stream(model, ids, **PLAIN)]
        text = "".join([piece async for piece in stream(model, ids, tokenizer=letters, **PLAIN)])
        async with stream(model, ids, **PLAIN) as part:
            engine = part._engine
            async for _ in part:
                break
        assert engine.pages.free == engine.pages.count and part.finish_reason == "cancelled"
        return whole, text

    assert asyncio.run(main()) == (tokens, letters.decode(tokens))


# -- what is refused -----------------------------------------------------------------------------------


IDS = torch.full((2, 5), 7)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (torch.full((1, CONTEXT + 9), 7), {}, rf"prompt has {CONTEXT + 9} tokens .* context is {CONTEXT}"),
        (torch.zeros(1, 0, dtype=torch.int64), {}, r"row 0 of input_ids has no token \(it is empty\)"),
        ([[5], []], {}, r"row 1 of input_ids has no token \(all of it is padding\)"),
        (IDS, {"attention_mask": torch.tensor([[1] * 5, [0] * 5])}, r"row 1 of input_ids has no token"),
        (torch.tensor([[5, 6], [7, 61]]), {}, r"row 1, position 1: token id 61 .* vocabulary, 0 to 60"),
        (torch.tensor([[5, -100]]), {}, r"row 0, position 1: token id -100"),
        ([[PAD, PAD, 7, 99]], {}, r"row 0, position 3: token id 99"),
        (IDS, {"attention_mask": torch.ones(2, 4)}, r"attention_mask has shape \(2, 4\) .* \(2, 5\)"),
        (IDS[0], {}, r"shape \(5,\); expected \[rows, width\]; next step: input_ids.unsqueeze\(0\)"),
        (IDS.float(), {}, r"input_ids has dtype torch.float32; expected integers"),
        ("some text", {}, r"input_ids is a str; .* tokenize the text"),
        ([["a"]], {}, r"input_ids holds 'a'; expected token ids"),
        ({"input_ids": IDS}, {}, r"call generate\(\*\*inputs\)"),
        ([[5, 6], [7]], {"attention_mask": [[1, 1], [1, 0]]}, r"uneven length, which need no attention_mask"),
        (IDS, {"inputs": IDS}, r"input_ids and inputs are both given"),
        (IDS, {"inputs_embeds": torch.zeros(2, 5, 32)}, r"inputs_embeds: generation starts from token ids"),
        (IDS, {"token_type_ids": torch.ones(2, 5)}, r"token_type_ids are not all 0"),
        (IDS, {"temperature": -1}, r"temperature is -1"),
        (IDS, {"max_new_token": 4}, r"unknown generation option 'max_new_token'; nearest: max_new_tokens"),
        (IDS, {"atention_mask": IDS}, r"unknown generation option 'atention_mask'; nearest: attention_mask"),
        (IDS, {"max_length": 5, "max_new_tokens": None}, r"max_length is 5 and the prompt is already 5"),
        (IDS, {"negative_prompt_ids": [[3]]}, r"negative_prompt_ids need guidance_scale"),
        (
            IDS,
            {"negative_prompt_ids": [[3, 99]], "guidance_scale": 2.0},
            r"negative_prompt_ids row 0, position 1: token id 99",
        ),
        (
            torch.full((3, 5), 7),
            {"negative_prompt_ids": [[3], [4]], "guidance_scale": 2.0},
            r"negative_prompt_ids has 2 rows for 3 prompts",
        ),
        (IDS, {"guidance_scale": 0.0}, r"guidance_scale is 0.0; expected a number more than 0"),
        (IDS, {"exponential_decay_length_penalty": (5,)}, r"expected \(start, factor\)"),
        (IDS, {"logprobs": -1}, r"logprobs is -1"),
        (IDS, {"num_return_sequences": 2}, r"num_return_sequences is 2 with greedy decoding"),
        (IDS, {"stop_strings": ["x"]}, r"stop_strings=\['x'\] are matched on text. .* pass tokenizer="),
        (IDS, {"seed": [1, 2, 3], "do_sample": True}, r"seed holds 3 seeds for 2 returned rows"),
        (IDS, {"bad_words_ids": [[99]]}, r"bad_words has token id 99"),
        (
            IDS,
            {"streamer": TextStreamer(alphabet.letters())},
            r"shows one row, but the call makes 2",
        ),
        (IDS, {"logits_processor": [3]}, r"logits_processor holds 3, which can't be called"),
        (IDS, {"logits_processor": [lambda ids, scores: scores[0]]}, r"logits processor .* must return"),
        (
            IDS,
            {"bad_words_ids": [[id] for id in range(1, VOCAB)], "min_new_tokens": 1},
            r"row 0: every",
        ),
        (IDS, {"prefix_allowed_tokens_fn": lambda row, ids: []}, r"allows no token for row 0"),
        (IDS, {"generation_config": {"top_k": 3}}, r"generation_config is a dict; expected a Generation"),
        (
            IDS,
            {"tokenizer": "gpt2", "stop_strings": "x"},
            r"tokenizer is a str; expected a tokenizer",
        ),
    ],
    ids=lambda value: None,
)
def test_bad_requests_are_named(model, inputs, options, message):
    with pytest.raises(RequestError, match=message):
        generate(model, inputs, **{"max_new_tokens": 3, **options})


def test_logits_that_are_not_finite_are_an_error_that_names_the_layer(pair):
    _, model = pair
    weight = model.model.layers[1].mlp.down_proj.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[3, 3] = float("nan")
        with pytest.raises(NumericsError, match=r"layers\.1\.mlp\.down_proj"):
            generate(model, IDS, max_new_tokens=3)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_a_stream_takes_one_row(model):
    with pytest.raises(RequestError, match="stream gives one row, but the call makes 2"):
        stream(model, IDS, max_new_tokens=3)
    with pytest.raises(RequestError, match="temperature is -1"):
        stream(model, IDS, max_new_tokens=3, temperature=-1)


# -- CUDA ----------------------------------------------------------------------------------------------


def test_a_row_that_a_gpu_cannot_hold_is_refused(model, monkeypatch):
    """Numbers of a GPU with half a MiB free, of which the cache may have 80 %."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 19, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    there = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, config=model.config)
    token = 2 * 2 * (2 * 8) * 4  # keys and values, layers, kv heads * head dim, bytes
    fits = int((1 << 19) * 0.8) // (16 * token) * 16
    rows = [Request([3] * 8, SamplingParams(max_new_tokens=new)) for new in (4, 3000)]
    with pytest.raises(RequestError, match=rf"row 1 needs .* 3008 tokens .* cuda has room for {fits} "):
        Resident.of(there).engine(there, rows)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "seed": 5, "top_p": 0.9},
        {"repetition_penalty": 1.4},
        {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": [25, 44]},
        {"num_beams": 3, "do_sample": True, "seed": 5},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7},
        {"guidance_scale": 1.5},
        {"prompt_lookup_num_tokens": 4},
        {"prefix_allowed_tokens_fn": lambda row, ids: [3 + row, 20, 33, int(ids[-1])]},
        {"use_cache": False},
    ],
    ids=",".join,
)
def test_cuda_gives_what_the_cpu_gives(model, options):
    ids, mask = padded()
    there = copy.deepcopy(model).cuda()
    options = {"max_new_tokens": 16, **options}
    here = generate(model, ids, attention_mask=mask, **options)
    moved = generate(there, ids.cuda(), attention_mask=mask.cuda(), **options)
    assert moved.is_cuda and moved.tolist() == here.tolist()
    engine = Resident.of(there)._engine
    assert engine.pages.free == engine.pages.count
    again = generate(there, ids.cuda(), attention_mask=mask.cuda(), **options)  # from cached prefixes
    assert again.tolist() == here.tolist()
