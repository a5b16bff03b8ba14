"""Sources of an encoder-decoder in the engine: encoded once, in pages of their own, and given up in time."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch

from taut import AutoModelForSeq2SeqLM
from taut.engine import Engine, Request, SamplingParams
from taut.engine.beams import Beams
from taut.engine.draft_model import Assistant, DraftModel
from taut.errors import NumericsError, RequestError

from .checks import check_pages
from .guesses import Always
from .test_engine import Chained

VOCAB, CONTEXT = 61, 64
CONFIGS = {
    "bart": {
        "model_type": "bart",
        "vocab_size": VOCAB,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": CONTEXT,
        "pad_token_id": 0,
        "eos_token_id": 1,
    },
    "t5": {
        "model_type": "t5",
        "vocab_size": VOCAB,
        "d_model": 32,
        "num_layers": 1,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "d_kv": 8,
        "d_ff": 32,
        "pad_token_id": 0,
        "eos_token_id": 1,
    },
}


@cache
def model(kind: str):
    """In float64, so that greedy ties can't flip."""
    torch.manual_seed(3)
    made = AutoModelForSeq2SeqLM.from_config(CONFIGS[kind], dtype=torch.float64).init_weights(std=0.35)
    return made.eval()


def engine(kind: str = "bart", **options) -> Engine:
    return Engine(model(kind), **{"page_size": 4, "num_pages": 40, "max_rows": 8, "chunk": 16, **options})


def request(source, new: int = 8, prompt=(2,), beams: int = 1, **options) -> Request:
    group = Beams(beams) if beams > 1 else None
    return Request(list(prompt), SamplingParams(new), source=source, group=group, **options)


def drawn(generator: random.Random, longest: int = 30) -> tuple[int, ...]:
    return tuple(generator.randrange(2, VOCAB) for _ in range(generator.randint(1, longest)))


def alone(kind: str, like: Request) -> list[int]:
    """What a fresh and roomy engine gives for the same request."""
    beams = 1 if like.group is None else like.group.width
    twin = request(like.source, like.params.max_new_tokens, like.prompt, beams)
    return engine(kind, num_pages=200, chunk=2048).run([twin])[0].output


@pytest.mark.parametrize("chained", [False, True], ids=["plain", "chained"])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("seed", range(3))
def test_rows_get_what_they_get_alone_and_no_page_is_lost(seed, kind, chained):
    """Too few pages for all, sources that come twice or are longer than a chunk, beams, cancellations."""
    generator, e = random.Random(seed), engine(kind, num_pages=22)
    if chained:
        e.graphs = Chained(e)
    sources = [drawn(generator) for _ in range(4)]
    asked: list[Request] = []
    for _ in range(60):
        if len(asked) < 12 and generator.random() < 0.5:
            prompt = drawn(generator, 6) if generator.random() < 0.3 else (2,)
            beams = generator.choice((1, 1, 3))
            asked.append(request(generator.choice(sources), generator.randint(1, 9), prompt, beams))
            e.submit(asked[-1])
        if asked and generator.random() < 0.06:
            e.cancel(generator.choice(asked))
        e.step()
        check_pages(e.scheduler)
    e.run(asked)
    check_pages(e.scheduler)
    assert not any(row.pages for r in asked for row in r.rows) and not any(r.source_pages for r in asked)
    assert e.pages.free == e.pages.count
    finished = [r for r in asked if r.finish_reason != "cancelled"]
    assert len(finished) > 6
    for r in finished:
        assert r.output == alone(kind, r)


def encoded(e: Engine, requests: list[Request]) -> list[int]:
    """Tokens that the encoder is given, a step each."""
    seen: list[int] = []
    hook = e.model.encoder.register_forward_pre_hook(lambda _m, given: seen.append(given[0].tokens))
    try:
        e.run(requests)
    finally:
        hook.remove()
    return seen


def test_a_source_is_encoded_once_for_all_who_read_it():
    source, other = tuple(range(2, 12)), tuple(range(5, 9))
    assert encoded(engine(), [request(source, beams=4)]) == [10]
    assert encoded(engine(), [request(source), request(source, prompt=(3,)), request(other)]) == [14]
    # Its pages go with the last who reads it; a request that shares nothing has its own.
    e = engine()
    assert encoded(e, [request(source)]) + encoded(e, [request(source)]) == [10, 10]
    assert encoded(engine(chunk=64), [request(source, scope=None) for _ in range(2)]) == [20]


def test_what_a_decoder_begins_with_is_shared_within_one_source_alone():
    prompt = range_of(13)  # three pages and a token
    e, one, other = engine(num_pages=60), range_of(9), range_of(10)
    done = [e.run([request(source, prompt=prompt)])[0] for source in (one, other, one)]
    assert [r.found for r in done] == [0, 0, 12]
    assert [r.output for r in done] == [alone("bart", r) for r in done]


def test_sources_share_a_step_as_far_as_a_chunk_goes():
    lengths = (30, 9, 4, 8)  # the first alone is more than a chunk of 16
    requests = [request(range_of(n)) for n in lengths]
    assert encoded(engine(), requests) == [30, 13, 8]
    assert [r.output for r in requests] == [alone("bart", r) for r in requests]


def range_of(count: int) -> tuple[int, ...]:
    return tuple(2 + index % 50 for index in range(count))


@pytest.mark.parametrize("pages", [6, 20, 80])
def test_a_draft_model_reads_sources_where_it_has_room(pages):
    generator, e = random.Random(1), engine(num_pages=60)
    e.ledger = Always()
    drafts = DraftModel(model("bart"), num_pages=pages, page_size=4)
    asked = [request(drawn(generator), 9) for _ in range(6)]
    for one in asked:
        one.drafter = Assistant(drafts, model("bart"), 4)
    seen = encoded(e, asked)
    own = sum(len(one.source) for one in asked)
    assert (own < sum(seen) < 2 * own) if pages == 6 else sum(seen) == 2 * own  # once each
    assert [one.output for one in asked] == [alone("bart", one) for one in asked]
    assert drafts.pages.free == pages and not drafts.has_work and e.pages.free == e.pages.count


def test_states_are_a_source_too():
    source = range_of(11)
    with torch.no_grad():
        given = torch.tensor([source])
        states = model("bart")(given, decoder_input_ids=given).encoder_last_hidden_state[0]
    both = [request(states), request(source), request(states, beams=3)]
    engine().run(both)
    assert both[0].output == both[1].output == alone("bart", both[1])
    assert both[2].output == alone("bart", request(source, beams=3))


def test_a_step_that_fails_leaves_nothing_behind():
    e, requests = engine(), [request(range_of(9)), request(range_of(9), prompt=(4,)), request(range_of(4))]
    for r in requests:
        e.submit(r)
    fail = e.model.encoder.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        e.step()
    fail.remove()
    check_pages(e.scheduler)
    e.run(requests)
    assert [r.output for r in requests] == [alone("bart", r) for r in requests]


def test_numbers_that_are_not_finite_end_their_request_alone():
    states = torch.full((5, 32), float("nan"), dtype=torch.float64)
    e, bad, good = engine(), request(states), request(range_of(7))
    e.run([bad, good])
    assert isinstance(bad.error, NumericsError) and "encoder_attn" in str(bad.error)
    assert good.output == alone("bart", good)
    assert all(torch.isfinite(cache).all() for cache in (*e.runner.keys, *e.runner.values))


def test_bad_sources_are_named():
    e = engine()
    for source, message in (
        (None, "the request has no source"),
        ((), "the source is empty"),
        ((3, VOCAB), f"the source has token id {VOCAB}, but the encoder's ids are 0 to {VOCAB - 1}"),
        (range_of(CONTEXT + 1), f"has {CONTEXT + 1} tokens, and the encoder's context is {CONTEXT}"),
        (torch.zeros(3, 5), r"the source has shape \[3, 5\]; expected \[length, 32\]"),
    ):
        with pytest.raises(RequestError, match=message):
            e.submit(request(source))
    with pytest.raises(RequestError, match=r"of up to 9 tokens and a source of 30 need 10 pages of 4"):
        engine(num_pages=9).submit(request(range_of(30)))
