"""The engine over a real (tiny) decoder: each row's tokens are those it gets alone, whatever else happens."""

from __future__ import annotations

import asyncio
import threading
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taut.batch import Batch, PagedKV
from taut.engine import Engine, Request, SamplingParams
from taut.engine.beams import Beams
from taut.engine.graph import plain
from taut.engine.guidance import Guidance
from taut.engine.scheduler import pages_needed
from taut.errors import NumericsError, RequestError

from .checks import check_pages
from .guesses import Always, Prompter
from .tiny import VOCAB, Tiny

MODELS = {"plain": Tiny(), "longrope": Tiny(boundary=14), "dynamic": Tiny(dynamic=True)}


GROUPS = {
    "one row": lambda: None,
    "2 beams": lambda: Beams(2),
    "3 beams": lambda: Beams(3, returned=2, early_stopping=True, length_penalty=0.5),
    "4 beams in groups": lambda: Beams(4, groups=2, diversity_penalty=0.7),
    "guidance": lambda: Guidance(1.7, [9, 8, 7, 6, 5, 4]),
}


def request(prompt, new: int = 8, *, eos=(), time=None, greedy=True, seed=0, kind=None, **hooks) -> Request:
    params = SamplingParams(new, eos_token_ids=eos, max_time=time, greedy=greedy, seed=seed, temperature=1.5)
    return Request(list(prompt), params, group=GROUPS.get(kind, GROUPS["one row"])(), **hooks)


def engine(model="plain", **options) -> Engine:
    return Engine(MODELS.get(model, model), **{"page_size": 4, "cache_tokens": 128, **options})


class Chained:
    """Stands in for decode graphs where there is no GPU: a step is computed when it is launched, before the
    engine has read the tokens of the one before it."""

    def __init__(self, e: Engine):
        self.e, self.followed = e, 0

    def takes(self, work):
        return [w for w in work if w.count == 1 and w.ready and not w.drafts and plain(w.row.request)]

    def start(self, work):
        tokens, _ = self.e.sampler(self.e.runner(work), [w.row for w in work])
        return SimpleNamespace(work=work, tokens=lambda: tokens)

    def follow(self, pending, work):
        self.followed += 1
        for item, token in zip(pending.work, pending.tokens(), strict=True):
            item.row.output.append(token)  # the device knows it; the host does not yet
        try:
            return self.start(work)
        finally:
            for item in pending.work:
                item.row.output.pop()


@cache
def alone(
    model: str, prompt: tuple[int, ...], new: int, greedy: bool = True, seed: int = 0, kind: str = "one row"
) -> list[int]:
    """What a roomy engine gives with nobody beside the row."""
    (done,) = engine(model, cache_tokens=512).run([request(prompt, new, greedy=greedy, seed=seed, kind=kind)])
    return done.output


def drain(e: Engine) -> None:
    while e.has_work:
        assert e.step() is not None
        check_pages(e.scheduler)
    assert e.pages.free == e.pages.count


def logits(model: Tiny, ids: list[int]) -> torch.Tensor:
    """`[vocab]` after these tokens, without engine, scheduler or runner."""
    n = len(ids)
    config = model.config.layers[0].attn
    cache = [[torch.zeros(1, n, config.kv_heads, config.head_dim).double() for _ in "12"] for _ in "kv"]
    one, starts = torch.tensor([n], dtype=torch.int32), torch.tensor([0, n], dtype=torch.int32)
    at = torch.arange(n)
    kv = PagedKV(tuple(cache[0]), tuple(cache[1]), torch.zeros(1, 1, dtype=torch.int32), one, at, n)
    hidden = model.decoder(Batch(torch.tensor(ids), at.int(), starts, n, kv=kv, totals=one))
    return model.logits(hidden[-1:])[0]


def loop(model: Tiny, prompt: tuple[int, ...], new: int) -> list[int]:
    """Greedy tokens, the whole sequence again for every one."""
    ids = list(prompt)
    for _ in range(new):
        ids.append(int(logits(model, ids).argmax()))
    return ids[len(prompt) :]


def guided(model: Tiny, prompt: tuple[int, ...], new: int) -> list[int]:
    """Greedy tokens under the guidance of `GROUPS`."""
    output: list[int] = []
    for _ in range(new):
        row, negative = (
            logits(model, [*ids, *output]).log_softmax(-1) for ids in (prompt, (9, 8, 7, 6, 5, 4))
        )
        output.append(int((negative + 1.7 * (row - negative)).argmax()))
    return output


def searched(model: Tiny, prompt: tuple[int, ...], new: int, beams: int) -> list[int]:
    """The likeliest of the sequences of just `new` tokens that beam search finds."""
    found = [(0.0, ())]
    for _ in range(new):
        longer = [
            (score + value, (*tokens, token))
            for score, tokens in found
            for token, value in enumerate(logits(model, [*prompt, *tokens]).log_softmax(-1).tolist())
        ]
        found = sorted(longer, reverse=True)[:beams]
    return list(found[0][1])


PROMPTS = [(1,), (5, 6), tuple(range(2, 25)), (9, 9, 9, 9, 9), tuple(range(40, 53)), (3, 1, 4, 1, 5, 9, 2, 6)]


def test_the_tiny_model_sees_its_whole_history():
    """Otherwise none of these tests could fail."""
    base = [7, 3, 9, 11, 2, 30, 8, 5]
    outputs = {tuple(alone("plain", (*base[:at], 50, *base[at + 1 :]), 12)) for at in range(8)}
    assert len(outputs) == 8
    longer = [alone(name, tuple(range(2, 25)), 8) for name in MODELS]
    assert longer[0] != longer[1] and longer[0] != longer[2]


@pytest.mark.parametrize("model", ["plain", "longrope"])
def test_greedy_tokens_equal_the_plain_loops(model):
    for prompt in PROMPTS:
        assert alone(model, prompt, 12) == loop(MODELS[model], prompt, 12)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chunk": 3},
        {"chunk": 1, "page_size": 1},
        {"cache_tokens": 36},
        {"cache_tokens": 36, "chunk": 5, "page_size": 3},
        {"max_rows": 2},
        {"page_size": 64},
    ],
)
def test_a_row_of_a_batch_equals_the_row_alone(model, options):
    e = engine(model, **options)
    requests = e.run([request(prompt, 10 + at) for at, prompt in enumerate(PROMPTS)])
    for at, (r, prompt) in enumerate(zip(requests, PROMPTS, strict=True)):
        assert r.output == alone(model, prompt, 10 + at)
        assert r.finish_reason == "length" and r.pages == []
    assert e.pages.free == e.pages.count


@pytest.mark.parametrize("model", ["plain", "longrope"])
def test_rows_of_one_request_equal_loops_without_a_cache(model):
    """Beams branch off one another and drop out; a guided row has another beside it."""
    for prompt in PROMPTS:
        expected = {
            "2 beams": searched(MODELS[model], prompt, 9, 2),
            "guidance": guided(MODELS[model], prompt, 9),
        }
        for kind, tokens in expected.items():
            assert alone(model, prompt, 9, kind=kind) == tokens


def test_preemption_happened_in_these_tests():
    e = engine(cache_tokens=36)
    for prompt in PROMPTS:
        e.submit(request(prompt, 12))
    again = 0
    while e.has_work:
        before = {r: r.computed for r in e.scheduler.requests}
        e.step()
        again += sum(r.computed < computed for r, computed in before.items() if not r.finished)
    assert again > 0


def test_draws_do_not_depend_on_the_batch_or_on_preemption():
    requests = [request(prompt, 12, greedy=False, seed=at) for at, prompt in enumerate(PROMPTS)]
    engine(cache_tokens=36, chunk=4).run(requests)
    for at, r in enumerate(requests):
        assert r.output == alone("plain", PROMPTS[at], 12, greedy=False, seed=at)
    assert requests[0].output != alone("plain", PROMPTS[0], 12)


@pytest.mark.parametrize(
    ("options", "reason", "length"),
    [
        (lambda full: {"new": 6}, "length", 6),
        (lambda full: {"new": 9, "eos": (full[3],)}, "stop", None),
        (lambda full: {"new": 9, "eos": (60, full[0])}, "stop", 1),
        (lambda full: {"new": 9, "should_stop": lambda r: len(r.output) == 4}, "stop_string", 4),
        (lambda full: {"new": 4, "should_stop": lambda r: len(r.output) == 4}, "stop_string", 4),
        (lambda full: {"new": 9, "time": 1e-9}, "time", 1),
    ],
)
def test_how_a_row_ends(options, reason, length):
    full = alone("plain", (4, 2), 9)
    options = options(full)
    length = full.index(full[3]) + 1 if length is None else length
    e = engine()
    events = []
    r = e.submit(request((4, 2), **options))
    while e.has_work:
        events += e.step()
    assert (r.output, r.finish_reason, r.error) == (full[:length], reason, None)
    assert [token for event in events for token in event.tokens] == r.output
    assert all(event.request is r for event in events)
    assert e.step() == []


def test_time_runs_out_in_the_queue_and_in_a_prefill_too():
    e = engine(max_rows=1, chunk=2)
    first, late = request((1, 2, 3, 4, 5), time=1e-9), request((1, 2), time=1e-9)
    events = [(e.submit(first), []), (e.submit(late), [])]
    assert e.step() == events
    assert first.finish_reason == late.finish_reason == "time" and first.output == []
    drain(e)


def test_kept_scores_and_logits_are_ordinary_tensors_of_each_step():
    kept, plain = request((1, 2), 5, keep_scores=True, keep_logits=True), request((3, 4, 5), 5)
    engine().run([kept, plain])
    assert (len(kept.scores), len(kept.logits), plain.scores, plain.logits) == (5, 5, [], [])
    for tensor, token in zip(kept.logits, kept.output, strict=True):
        assert tensor.shape == (VOCAB,) and tensor.argmax() == token
        assert not tensor.is_inference()
    for scores, logits in zip(kept.scores, kept.logits, strict=True):
        assert torch.equal(scores, logits) and not scores.is_inference()


def test_processors_see_the_row_and_change_it_alone():
    seen = []

    def ban_odd(ids, scores):
        seen.append(ids.tolist())
        scores[:, 1::2] = float("-inf")
        return scores

    even, other = request((1, 2), 5, logits_processors=(ban_odd,)), request((1, 2), 5)
    engine().run([even, other])
    assert other.output == alone("plain", (1, 2), 5)
    assert all(token % 2 == 0 for token in even.output)
    assert seen == [[[1, 2, *even.output[:at]]] for at in range(5)]


class Broken(Exception):
    pass


def broken(*_):
    raise Broken("hook")


def ban_all(ids, scores):
    return scores.fill_(float("-inf"))


@pytest.mark.parametrize(
    ("hooks", "error"),
    [
        ({"logits_processors": (broken,)}, Broken),
        ({"logits_processors": (lambda ids, scores: None,)}, RequestError),
        ({"logits_processors": (ban_all,)}, RequestError),
        ({"should_stop": broken}, Broken),
    ],
)
def test_an_error_in_a_hook_ends_that_request_alone(hooks, error):
    e = engine()
    bad, good = request((1, 2), **hooks), request((3, 4, 5))
    e.run([good, bad])
    assert bad.finish_reason == "error" and isinstance(bad.error, error)
    assert good.output == alone("plain", (3, 4, 5), 8) and good.error is None
    assert e.pages.free == e.pages.count
    with pytest.raises(error):
        list(e.stream(request((1, 2), **hooks)))


def test_options_that_leave_no_token_end_that_request_alone():
    everything = tuple((token,) for token in range(VOCAB))
    e = engine()
    bad = Request([1], SamplingParams(4, bad_words=everything))
    good, other = request((3, 4, 5)), request((6,))
    e.run([good, bad, other])
    assert isinstance(bad.error, RequestError) and bad.output == []
    assert good.output == alone("plain", (3, 4, 5), 8)
    assert other.output == alone("plain", (6,), 8)


class Poisoned(Tiny):
    """Token 7 gives NaN."""

    def __init__(self):
        super().__init__()
        self.embed[7] = float("nan")

    def locate_nonfinite(self, batch) -> str:
        assert batch.rows == 1 and 7 in batch.ids
        return "embed_tokens"


def test_numbers_that_are_not_finite_end_their_request_alone_and_leave_no_trace():
    e = engine(Poisoned())
    bad, good = request((5, 7, 5, 5, 5, 5)), request((3, 4, 5))
    e.run([bad, good])
    assert bad.finish_reason == "error" and isinstance(bad.error, NumericsError)
    message = str(bad.error)
    assert "request 0" in message and "not finite, first in embed_tokens" in message and "float32" in message
    assert good.output == alone("plain", (3, 4, 5), 8)
    assert all(torch.isfinite(cache).all() for cache in (*e.runner.keys, *e.runner.values))
    with pytest.raises(NumericsError):
        list(e.stream(request((7,))))
    e.run([again := request(bad.prompt)])  # its pages are clean now, and must not pass for its keys
    assert isinstance(again.error, NumericsError)
    rows = [request((*STEM[6:], 50)), request((*STEM[6:], 7)), request((*STEM[6:], 51))]
    e = engine(Poisoned())
    e.run(rows)  # the second shares pages with the others
    assert [r.finish_reason for r in rows] == ["length", "error", "length"]
    rows.append(request((*STEM[6:], 50)))
    e.run(rows[3:])
    for r in (rows[0], rows[2], rows[3]):
        assert r.output == alone("plain", tuple(r.prompt), 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: request(()), "prompt is empty"),
        (
            lambda: request((1, VOCAB)),
            "prompt has token id 61 at index 1, but the model's ids are 0 to 60",
        ),
        (lambda: request((-1,)), "prompt has token id -1 at index 0"),
        (lambda: request((1,), 200), "201 tokens, but the model's context is 128"),
        (lambda: request((1,) * 60, 60), "needs 30 pages of 4 tokens, but the cache has 16"),
        (lambda: Request([1], SamplingParams(4, logit_bias={99: 1.0})), "logit_bias has token id 99"),
        (
            lambda: Request([1], SamplingParams(4, sequence_bias={(1, 99): 1.0})),
            "sequence_bias has token id 99",
        ),
        (lambda: Request([1], SamplingParams(4, bad_words=((1,), (99,)))), "bad_words has token id 99"),
        (
            lambda: Request([1], SamplingParams(4, min_new_tokens=1, eos_token_ids=(99,))),
            "eos_token_ids has token id 99",
        ),
    ],
)
def test_refusals(make, message):
    e = engine(cache_tokens=64)
    good = request((1, 2))
    for attempt in (e.submit, e.stream, lambda r: e.run([good, r])):
        with pytest.raises(RequestError, match=message):
            attempt(make())
    assert not e.has_work and good.id == -1
    assert e.run([good])[0].output == alone("plain", (1, 2), 8)
    with pytest.raises(RequestError, match="request 0 was submitted before"):
        e.submit(good)


def test_the_cache_is_sized_one_way():
    with pytest.raises(RequestError, match="num_pages=3 and cache_tokens=9"):
        Engine(MODELS["plain"], num_pages=3, cache_tokens=9)
    assert Engine(MODELS["plain"], num_pages=3).pages.count == 3
    assert Engine(MODELS["plain"], cache_tokens=33, page_size=16).pages.count == 3
    assert Engine(MODELS["plain"], max_rows=2, page_size=16).pages.tokens == 2 * 128
    huge = Tiny(context=1 << 40)
    assert Engine(huge).pages.tokens * 2 * 2 * 2 * 8 * 8 == 1 << 30  # layers, k and v, heads, dim, bytes


def test_a_failed_step_can_be_repeated():
    """Also for rows that share pages which the failed step was to fill."""

    class Fails(Tiny):
        calls_left, fails = 0, 0

        def decoder(self, batch):
            if self.fails and not self.calls_left:
                self.fails -= 1
                raise MemoryError("no room")
            self.calls_left -= 1
            return super().decoder(batch)

    prompts = [*PROMPTS, *((*STEM, tail) for tail in (1, 2))]
    for after in range(5):
        for chunk in (4, 64):
            model = Fails()
            e = engine(model, chunk=chunk, cache_tokens=256, max_rows=8)
            model.calls_left, model.fails = after, 3
            rows = [e.submit(request(prompt, 9)) for prompt in prompts]
            if after % 2:
                e.cancel(rows[2])  # the first row of the stem
            for _ in range(200):
                try:
                    e.step()
                except MemoryError:
                    check_pages(e.scheduler)
            assert model.fails == 0
            for r in rows:
                ended = r.finish_reason == "length"
                assert r.output == (alone("plain", tuple(r.prompt), 9) if ended else [])


def test_an_interrupted_run_leaves_nothing_behind():
    def interrupt(r):
        raise KeyboardInterrupt

    e = engine()
    rows = [request((1, 2), 50), request((3,), 50, should_stop=interrupt)]
    with pytest.raises(KeyboardInterrupt):
        e.run(rows)
    assert [r.finish_reason for r in rows] == ["cancelled", "cancelled"]
    assert not e.has_work and e.pages.free == e.pages.count


def test_a_stream_gives_the_tokens_and_closing_it_frees_its_pages():
    e = engine()
    other = e.submit(request((3, 4, 5), 12))
    r = request((1, 2), 12)
    stream = e.stream(r)
    assert r.id == -1  # nothing happens before the first token is asked for
    assert [next(stream) for _ in range(3)] == alone("plain", (1, 2), 12)[:3]
    assert len(other.output) == 3  # moves along
    held = len(r.pages)
    free = e.pages.free
    stream.close()
    assert r.finish_reason == "cancelled" and held > 0 and e.pages.free == free + held
    drain(e)
    assert other.output == alone("plain", (3, 4, 5), 12)
    e.stream(request((1, 2))).close()
    assert not e.has_work
    assert list(e.stream(request((1, 2), 12))) == alone("plain", (1, 2), 12)


def test_streams_of_one_engine_interleave():
    e = engine(max_rows=2)
    streams = [e.stream(request(prompt, 7)) for prompt in PROMPTS]
    assert [list(row) for row in zip(*streams, strict=True)] == [
        list(row) for row in zip(*(alone("plain", prompt, 7) for prompt in PROMPTS), strict=True)
    ]
    assert e.pages.free == e.pages.count


def test_a_stream_of_another_engines_request_is_refused():
    r = engine().submit(request((1,)))
    with pytest.raises(RequestError, match="not one of this engine's"):
        next(engine().stream(r))


def test_streams_from_threads():
    e = engine(cache_tokens=48)
    outputs: dict[int, list[int]] = {}

    def work(at: int) -> None:
        outputs[at] = list(e.stream(request(PROMPTS[at], 10)))

    threads = [threading.Thread(target=work, args=(at,)) for at in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert outputs == {at: alone("plain", prompt, 10) for at, prompt in enumerate(PROMPTS)}
    assert e.pages.free == e.pages.count


def test_async_streams_run_side_by_side_and_closing_one_frees_its_pages():
    e = engine(cache_tokens=48)

    async def collect(at: int) -> list[int]:
        return [token async for token in e.astream(request(PROMPTS[at], 10))]

    async def closed() -> Request:
        r = request((1, 2), 40)
        stream = e.astream(r)
        assert await anext(stream) == alone("plain", (1, 2), 10)[0]
        await stream.aclose()
        return r

    async def cancelled() -> Request:
        r = request((1, 2), 40)

        async def forever() -> None:
            async for _ in e.astream(r):
                pass

        task = asyncio.create_task(forever())
        while not r.output:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return r

    async def main():
        return await asyncio.gather(*(collect(at) for at in range(len(PROMPTS))), closed(), cancelled())

    *outputs, first, second = asyncio.run(main())
    assert outputs == [alone("plain", prompt, 10) for prompt in PROMPTS]
    assert first.finish_reason == second.finish_reason == "cancelled"
    assert e.pages.free == e.pages.count and not e.has_work


def test_a_batch_says_how_long_its_rows_are():
    model = Tiny()
    e = Engine(model, page_size=2, cache_tokens=40, chunk=6)
    e.submit(request((1, 2, 3), 3))
    e.submit(request(range(2, 12), 3))
    e.step()
    e.step()
    first, second = model.calls
    assert (first.ids.tolist(), first.positions.tolist()) == ([1, 2, 3, 2, 3, 4], [0, 1, 2, 0, 1, 2])
    assert (first.starts.tolist(), first.longest, first.totals.tolist()) == ([0, 3, 6], 3, [3, 10])
    assert (first.kv.lengths.tolist(), first.kv.longest) == ([3, 3], 3)
    assert first.kv.pages.tolist() == [[0, 1], [2, 3]]
    assert first.kv.slots.tolist() == [0, 1, 2, 4, 5, 6]
    assert (second.starts.tolist(), second.longest, second.totals.tolist()) == ([0, 1, 6], 5, [4, 10])
    assert (second.kv.lengths.tolist(), second.kv.longest) == ([4, 8], 8)
    assert second.kv.pages.tolist() == [[0, 1, 0, 0], [2, 3, 4, 5]]  # the tail is a page of its own
    assert second.kv.slots.tolist() == [3, 7, 8, 9, 10, 11]
    for batch in model.calls:
        assert batch.ids.dtype == batch.kv.slots.dtype == torch.int64
        for field in (batch.positions, batch.starts, batch.totals, batch.kv.lengths, batch.kv.pages):
            assert field.dtype == torch.int32


def computed(model: Tiny) -> int:
    """Tokens that went through the model since the last look."""
    calls, model.calls = model.calls, []
    return sum(batch.tokens for batch in calls)


STEM = tuple(range(2, 25))  # 5 whole pages of 4, and 3 tokens


def test_rows_that_begin_alike_compute_their_prefix_once():
    model = Tiny()
    e = engine(model)
    rows = [request((*STEM, *tail), 3) for tail in ((30,), (31, 32), (), (33, 34, 35, 36, 37))]
    e.run(rows)
    assert [r.output for r in rows] == [alone("plain", tuple(r.prompt), 3) for r in rows]
    assert [r.found for r in rows] == [0, 20, 20, 20]
    assert computed(model) == 24 + 5 + 3 + 8 + 2 * 4  # prompts, then two more tokens each
    later = request((*STEM, 30, 40), 3)  # with whole pages of the row that ended
    e.run([later])
    assert later.found == 24 and computed(model) == 1 + 2
    assert later.output == alone("plain", tuple(later.prompt), 3)
    answered = request((*rows[3].prompt, *rows[3].output, 8), 3)  # and with what a row has generated
    e.run([answered])
    assert answered.found == 28 and answered.output == alone("plain", tuple(answered.prompt), 3)
    again = request(STEM[:8], 3)  # a prompt that is known to its end still computes a last page
    e.run([again])
    assert again.found == 4 and again.output == alone("plain", STEM[:8], 3)


def test_what_must_not_be_shared_is_not():
    model = Tiny()
    for e in (engine(model, prefix_caching=False), engine("dynamic")):
        rows = [request((*STEM, tail), 3) for tail in (30, 31)]
        e.run(rows)
        assert [r.found for r in rows] == [0, 0]
    e = engine(model)
    scoped = [request((*STEM, 30), 3, scope=scope) for scope in ((), "mine", None, None, "mine", ())]
    e.run(scoped)
    assert [r.found for r in scoped] == [0, 0, 0, 0, 20, 20]
    e.reset_prefix_cache()
    e.run([last := request((*STEM, 30), 3)])
    assert last.found == 0


def test_keys_of_both_sides_of_a_boundary_are_not_mixed():
    e = engine("longrope")  # other angles for rows of more than 14 tokens
    for prompt, found in ((STEM[:12], 0), (STEM, 12), (STEM, 20), (STEM[:10], 8), ((*STEM[:12], 50), 12)):
        r = request(prompt, 6)  # the short ones pass the boundary
        e.run([r])
        assert r.found == found and r.output == alone("longrope", prompt, 6)


def test_prefixes_give_way_to_rows_and_preempted_rows_find_their_own():
    model = Tiny()
    e = engine(model, cache_tokens=36)
    rows = [request((*STEM[:12], tail), 9) for tail in (30, 31, 32)]
    e.run(rows)
    assert [r.output for r in rows] == [alone("plain", tuple(r.prompt), 9) for r in rows]
    other = request(range(30, 60), 4)
    e.run([other])
    assert other.output == alone("plain", tuple(range(30, 60)), 4)
    again = request((*STEM[:12], 30), 9)
    e.run([again])
    assert again.found == 0 and again.output == rows[0].output


@pytest.mark.parametrize("options", [{}, {"max_rows": 2}, {"cache_tokens": 40}], ids=str)
def test_steps_that_chain_give_the_tokens_of_steps_that_do_not(options):
    """Also where rows end by surprise while the next step is under way, and where one passes a boundary."""
    for model in MODELS:
        ends = {alone(model, prompt, 12)[6] for prompt in PROMPTS}
        for eos in ((), tuple(ends)):
            made = []
            for chained in (False, True):
                e = engine(model, **options)
                e.graphs = Chained(e) if chained else None
                asked = e.run([request(p, 12, eos=eos, greedy=i % 2 == 0) for i, p in enumerate(PROMPTS)])
                made.append([(r.output, r.finish_reason) for r in asked])
                assert e.pages.free == e.pages.count
            assert made[0] == made[1]
            assert e.graphs.followed > 0


def test_a_row_that_lacks_one_token_waits_for_the_prefill_whose_pages_it_begins_with():
    """Beside rows that decode on a graph, which runs before the prefill of its batch."""
    e = engine(cache_tokens=256)
    e.graphs = Chained(e)
    first = e.submit(request((7, 8, 9), 12))
    while len(first.output) < 3:
        e.step()
    e.reset_prefix_cache()
    asked = [e.submit(request(prompt, 6)) for prompt in ((*STEM[:12], 30, 31), (*STEM[:12], 32))]
    drain(e)
    assert [r.found for r in asked] == [0, 12]
    for r in (first, *asked):
        assert r.output == alone("plain", tuple(r.prompt), r.params.max_new_tokens)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_whatever_happens_no_page_is_lost_and_no_row_depends_on_its_neighbours(data):
    model = data.draw(st.sampled_from(sorted(MODELS)), "model")
    size = data.draw(st.integers(1, 5), "page size")
    e = engine(
        model,
        page_size=size,
        cache_tokens=data.draw(st.sampled_from([32, 40, 56]), "cache tokens"),
        chunk=data.draw(st.sampled_from([1, 2, 3, 7, 64]), "chunk"),
        max_rows=data.draw(st.sampled_from([3, 6, 1]), "rows"),
    )
    e.ledger = Always()
    if data.draw(st.booleans(), "steps chain"):
        e.graphs = Chained(e)
    tokens = st.lists(st.integers(1, VOCAB - 1), max_size=8).map(tuple)
    stems = st.sampled_from([(), (), STEM[:9], STEM[:16], (*STEM[:9], 60, 60, 60)])
    prompts = st.tuples(stems, tokens).map(lambda parts: parts[0] + parts[1] or (1,))
    submitted: list[Request] = []
    streams: dict[Request, object] = {}

    kinds: dict[Request, str] = {}

    def check(r: Request) -> None:
        if "beams" not in kinds[r]:
            kind = "guidance" if kinds[r] == "guidance" else "one row"
            full = alone(model, tuple(r.prompt), 16, r.params.greedy, r.params.seed, kind)
            assert r.output == full[: len(r.output)]
        elif r.finish_reason == "length":
            new = r.params.max_new_tokens
            assert r.output == alone(model, tuple(r.prompt), new, r.params.greedy, r.params.seed, kinds[r])
        if r.finished:
            assert r.pages == []
        if r.finish_reason == "length":
            assert len(r.output) == r.params.max_new_tokens
        elif r.finished:
            assert r.finish_reason == "cancelled"

    def step() -> None:
        before = {r: list(r.output) for r in submitted}
        events = e.step()
        assert {event.request: event.tokens for event in events} == {
            r: r.output[len(old) :] for r, old in before.items() if len(r.output) > len(old)
        }

    actions = ["submit", "stream", "step", "step", "next", "cancel", "close"]
    burst = ["submit"] * data.draw(st.sampled_from([0, 4, 8]), "at once")
    for action in burst + data.draw(st.lists(st.sampled_from(actions), max_size=40), "actions"):
        if action in ("submit", "stream"):
            greedy = data.draw(st.booleans())
            kind = data.draw(st.sampled_from(["one row", "guessed", *GROUPS]))
            r = request(
                data.draw(prompts),
                data.draw(st.sampled_from([1, 9, 16, 16])),
                greedy=greedy or "groups" in kind,
                seed=0 if greedy else data.draw(st.integers(0, 2)),
                kind=kind,
            )
            kinds[r] = kind
            if kind == "guessed":
                answer = alone(model, tuple(r.prompt), 16, r.params.greedy, r.params.seed)
                r.drafter = Prompter({tuple(r.prompt): answer}, 0.6, seed=len(submitted))
            needed = pages_needed(r, size, e.scheduler.share)
            if needed > e.pages.count or r.width > e.scheduler.max_rows:
                with pytest.raises(RequestError):
                    e.submit(r)
            elif action == "submit":
                submitted.append(e.submit(r))
            else:
                streams[r] = e.stream(r)
                submitted.append(r)
        elif action == "cancel" and submitted:
            victim = data.draw(st.sampled_from(submitted))
            e.cancel(victim)
            assert victim.finished and victim.pages == []
        elif action in ("next", "close") and streams:
            r = data.draw(st.sampled_from(list(streams)))
            if action == "next" and not (r.id < 0 and r.finished):
                next(streams[r], None)
            else:
                started = r.id >= 0
                streams.pop(r).close()
                assert r.finished or not started
                assert r.pages == []
        else:
            step()
        check_pages(e.scheduler)
    limit = 4 * sum(r.width * (len(r.prompt) + r.params.max_new_tokens) for r in submitted) + 1
    while e.has_work and limit:
        step()
        check_pages(e.scheduler)
        limit -= 1
    assert not e.has_work and e.pages.free == e.pages.count
    for r in submitted:
        check(r)
        assert r.finished or r.id < 0
