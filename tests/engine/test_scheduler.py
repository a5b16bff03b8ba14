"""Pages and scheduling, without a model."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taut.engine.beams import Beams
from taut.engine.guidance import Guidance
from taut.engine.pages import PagePool
from taut.engine.request import Request, SamplingParams, Status
from taut.engine.scheduler import Scheduler, pages_needed
from taut.errors import RequestError

from .checks import check_pages

FRESH = itertools.count(1)


def request(prompt: int, new: int = 4) -> Request:
    """One of so many tokens that no other has."""
    return Request([next(FRESH) for _ in range(prompt)], SamplingParams(max_new_tokens=new))


def scheduler(pages: int = 8, size: int = 4, **options) -> Scheduler:
    return Scheduler(PagePool(pages, size), **{"max_rows": 4, "chunk": 16, **options})


def run(s: Scheduler) -> list[tuple[Request, int, int]]:
    """One step: every row that is ready gets a token and ends at its limit. Gives what was computed."""
    work = s.schedule()
    for item in work:
        s.commit(item, 7 if item.ready else None)
        if len(item.row.output) == item.row.request.params.max_new_tokens:
            s.finish(item.row.request, "length")
    return [(item.row, item.start, item.count) for item in work]


def test_pages_lie_end_to_end_where_possible_and_lowest_first():
    pool = PagePool(8, 4)
    first, second = [], []
    pool.extend(first, 3)
    pool.extend(second, 2)
    assert (first, second, pool.free) == ([0, 1, 2], [3, 4], 3)
    pool.extend(first, 1)  # 3 is taken
    pool.extend(second, 1)  # 5 is taken
    assert (first, second) == ([0, 1, 2, 5], [3, 4, 6])
    pool.release(first)
    pool.extend(second, 2)
    assert (first, second, pool.free) == ([], [3, 4, 6, 7, 0], 3)


@pytest.mark.parametrize("pages", [[3], [0, 0], [8], [-1]])
def test_pages_that_were_not_taken_are_not_released(pages):
    pool = PagePool(8, 4)
    pool.extend([], 2)
    with pytest.raises(RequestError, match="was not taken"):
        pool.release(pages)


def test_more_pages_than_are_free():
    with pytest.raises(RequestError, match="3 pages asked for, 2 of 2 free"):
        PagePool(2, 4).extend([], 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PagePool(0, 4), "page count is 0"),
        (lambda: PagePool(4, 0), "page size is 0"),
        (lambda: scheduler(max_rows=0), "max_rows is 0"),
        (lambda: scheduler(chunk=-1), "chunk is -1"),
        (lambda: scheduler().add(request(0)), "prompt is empty"),
        (
            lambda: scheduler().add(request(30, 4)),
            r"prompt of 30 tokens \+ max_new_tokens=4 needs 9 pages of 4 tokens, but the cache has 8; "
            r"ask for at most 33 tokens in all, or make an engine with cache_tokens=33 or more",
        ),
        (
            lambda: scheduler(context=20).add(request(15, 6)),
            r"prompt of 15 tokens \+ max_new_tokens=6 is 21 tokens, but the model's context is 20; "
            "max_new_tokens can be at most 5",
        ),
        (lambda: scheduler(context=20).add(request(20, 1)), "context is 20; shorten the prompt"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(RequestError, match=message):
        make()


def test_a_request_that_fits_exactly_is_taken_and_finishes():
    s = scheduler(context=33)
    exact = request(30, 3)  # 32 keys: nothing attends to the last token
    s.add(exact)
    while s.has_work:
        run(s)
        check_pages(s)
    assert len(exact.output) == 3 and s.pages.free == 8


def test_decodes_come_first_and_prefills_share_the_rest_of_the_chunk():
    s = scheduler(pages=32, chunk=8)
    a, b, c = request(3), request(12), request(9)
    s.add(a)
    assert run(s) == [(a, 0, 3)]
    s.add(b)
    s.add(c)
    assert run(s) == [(a, 3, 1), (b, 0, 7)]
    assert run(s) == [(a, 4, 1), (b, 7, 5), (c, 0, 2)]  # uneven rows in one batch
    assert run(s) == [(a, 5, 1), (b, 12, 1), (c, 2, 6)]
    assert (len(a.output), len(b.output), len(c.output)) == (4, 2, 0)
    assert a.status is Status.FINISHED


def test_a_prefill_advances_however_many_rows_decode():
    s = scheduler(pages=32, chunk=2, max_rows=8)
    rows = [request(1, 20) for _ in range(4)]
    for r in rows:
        s.add(r)
    while len(s.running) < 4:
        run(s)
    late = request(6, 1)
    s.add(late)
    for _ in range(6):
        assert len([work for work in run(s) if work[0] in rows]) == 4
    assert late.finished and len(late.output) == 1


def test_few_rows_that_began_have_to_give_way():
    """Rows of mixed lengths in a cache that holds half of them: what they will generate is thought of."""
    s = scheduler(pages=300, size=4, max_rows=64, chunk=64)
    draw = random.Random(0)
    rows = [request(draw.randint(1, 80), draw.randint(1, 60)) for _ in range(64)]
    for r in rows:
        s.add(r)
    computed = sum(sum(count for *_, count in run(s)) for _ in range(400))
    assert not s.has_work
    assert computed <= 1.03 * sum(len(r.prompt) + r.params.max_new_tokens - 1 for r in rows)


def test_a_step_follows_another_unless_a_request_could_begin():
    s = scheduler(pages=8, max_rows=2, chunk=64)
    a, b, late = request(10, 20), request(3, 20), request(8, 4)
    s.add(a)
    s.add(b)
    run(s)
    work = s.schedule()
    assert [w.row for w in s.ahead(work)] == [a, b]
    s.add(late)  # there is no row for it
    assert [w.row for w in s.ahead(work)] == [a, b]
    s.finish(b, "cancelled")
    work = [w for w in work if w.row is a]
    assert s.ahead(work) is None


def test_rows_are_limited_and_the_queue_is_never_jumped():
    s = scheduler(pages=8, max_rows=2)
    a, big, small = request(14, 6), request(20, 2), request(2, 2)
    for r in (a, big, small):
        s.add(r)
    run(s)
    assert s.running == [a] and list(s.waiting) == [big, small]  # small would fit, but big came before
    while not a.finished:
        run(s)
    assert run(s) == [(big, 0, 16)]
    assert s.running == [big]


def test_the_newest_gives_way_keeps_its_output_and_comes_back_first():
    s = scheduler(pages=4, size=2, chunk=64)
    a, b, c = request(3, 6), request(3, 3), request(1, 2)
    for r in (a, b, c):
        s.add(r)
    run(s)
    assert s.running == [a, b] and len(s.pages._unused) == 0
    run(s)  # both stay within the pages they have
    assert run(s) == [(a, 4, 1)]  # a needs a third page: b gives up its two
    assert s.running == [a] and list(s.waiting) == [b, c]
    assert b.output == [7, 7] and b.pages == [] and b.computed == 0
    check_pages(s)
    while not a.finished:
        run(s)
    assert run(s) == [(b, 0, 5), (c, 0, 1)]  # b's output is computed again with its prompt
    assert b.finished and b.output == [7, 7, 7]


@pytest.mark.parametrize("chunk", [2, 5, 64])
def test_passing_the_boundary_computes_a_row_again_once(chunk):
    s = scheduler(pages=16, chunk=chunk, recompute_at=8)
    short, long = request(6, 6), request(12, 3)
    seen = {short: [], long: []}
    for r in (short, long):
        s.add(r)
    while s.has_work:
        for r, start, count in run(s):
            seen[r] += range(start, start + count)
        check_pages(s)
    # Keys 0..7 belong to a row of at most 8 tokens; all of them again when the row has 9.
    assert seen[short] == [*range(8), *range(11)]
    assert seen[long] == [*range(14)]


def test_finishing_frees_pages_wherever_the_request_is():
    s = scheduler(pages=4)
    running, waiting, unknown = request(10), request(10), request(1)
    s.add(running)
    s.add(waiting)
    run(s)
    for r in (waiting, running, unknown, running):
        s.finish(r, "cancelled")
        check_pages(s)
        assert r.finished and r.finish_reason == "cancelled"
    assert s.pages.free == 4 and not s.has_work
    with pytest.raises(RequestError, match="is finished; make a new one"):
        s.add(running)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_everything_finishes_in_order_whatever_arrives(data):
    size = data.draw(st.integers(1, 4), "page size")
    s = scheduler(
        pages=data.draw(st.integers(2, 9), "pages"),
        size=size,
        max_rows=data.draw(st.integers(1, 4), "rows"),
        chunk=data.draw(st.integers(1, 9), "chunk"),
        recompute_at=data.draw(st.none() | st.integers(1, 12), "recompute_at"),
    )
    coming = [
        request(prompt, new)
        for prompt, new in data.draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), max_size=12))
        if prompt + new - 1 <= s.pages.tokens
    ]
    order = {r: at for at, r in enumerate(coming)}
    todo, cancelled = coming[::-1], set()

    def step() -> None:
        busy, done = s.has_work, run(s)
        assert bool(done) == busy
        check_pages(s)
        assert len(s.running) <= s.max_rows
        places = [order[r] for r in s.requests]
        assert places == sorted(places)
        assert sum(count for *_, count in done) <= max(s.chunk, len(done))

    for action in data.draw(st.lists(st.sampled_from(["add", "cancel", "step"]), max_size=40), "actions"):
        if action == "add" and todo:
            s.add(todo.pop())
        elif action == "cancel" and s.has_work:
            victim = data.draw(st.sampled_from(s.requests))
            s.finish(victim, "cancelled")
            cancelled.add(victim)
        else:
            step()
    while todo:
        s.add(todo.pop())
    # The oldest advances every step, so all the work (twice, for the boundary) bounds the steps.
    for _ in range(2 * sum(len(r.prompt) + r.params.max_new_tokens for r in coming)):
        step()
    assert not s.has_work
    assert s.pages.free == s.pages.count
    for r in coming:
        assert r in cancelled or len(r.output) == r.params.max_new_tokens


class Keys:
    """The cache as a table of what each key was made of: the tokens up to its own, and their angles."""

    def __init__(self, s: Scheduler):
        self.s, self.slots = s, {}

    def made_of(self, row, drafts=()) -> list[int]:
        """Of every token of a row."""
        long = self.s.recompute_at is not None and row.length > self.s.recompute_at
        chain, last = [], hash((row.request.scope, long))
        for token in (*row.tokens(), *drafts):
            chain.append(last := hash((last, token)))
        return chain

    def run(self, work) -> None:
        """Copy pages, write all new keys, and then see that each row reads what it has to."""
        size, old = self.s.pages.size, dict(self.slots)
        for page, other in self.s.copies.items():
            for at in range(size):
                self.slots[page, at] = old.get((other, at))
        self.s.copies.clear()
        read = []
        for row, start, count, _, drafts in work:
            keys, stop = self.made_of(row, drafts), start + count + len(drafts)
            for at in range(start, stop):
                self.slots[row.pages[at // size], at % size] = keys[at]
            read.append((row, keys[:stop]))
        for row, keys in read:
            assert [self.slots.get((row.pages[at // size], at % size)) for at in range(len(keys))] == keys


@settings(max_examples=250, deadline=None)
@given(st.integers(0, 1 << 30))
def test_every_row_reads_keys_of_its_own_tokens_whoever_wrote_them(seed):
    """Shared prefixes, branches that copy on write, guesses, preemption, cancelled rows and failed steps."""
    draw = random.Random(seed)
    s = scheduler(
        pages=draw.randint(12, 30),
        size=draw.randint(1, 4),
        max_rows=draw.choice([3, 8]),
        chunk=draw.choice([2, 5, 30]),
        recompute_at=draw.choice([None, None, 9, 14]),
    )
    cache = Keys(s)
    groups = [
        lambda: None,
        lambda: None,
        lambda: Beams(draw.randint(2, 3)),
        lambda: Guidance(2.0, [1, 2, 1, 1, 2]),
    ]
    coming = []
    for _ in range(12):
        prompt = [draw.choice([1, 2]) for _ in range(draw.randint(1, 14))]
        made = Request(
            prompt,
            SamplingParams(draw.randint(1, 14)),
            group=draw.choice(groups)(),
            scope=draw.choice([(), (), None]),
        )
        if made.width <= s.max_rows and pages_needed(made, s.pages.size) <= s.pages.count:
            coming.append(made)
    asked = list(coming)
    for step in range(1000):
        while coming and draw.random() < 0.3:
            s.add(coming.pop())
        if s.has_work and step < 60 and draw.random() < 0.02:
            s.finish(draw.choice(s.requests), "cancelled")
        drafts = {
            r: [draw.choice([1, 2]) for _ in range(3)]
            for r in s.running
            if r.group is None and draw.random() < 0.4
        }
        work = s.schedule(drafts)
        if not work and not s.has_work and not coming:
            break
        if draw.random() < 0.1:
            s.abandon()
            check_pages(s)
            continue
        cache.run(work)
        for request, items in itertools.groupby(work, lambda item: item.row.request):
            items = list(items)
            if not items[0].ready or isinstance(request.group, Beams):
                for item in items:
                    s.commit(item)
                if items[0].ready:
                    rows = request.rows
                    s.branch(
                        request, [(draw.choice(rows), draw.choice([1, 2])) for _ in range(request.width)]
                    )
                    request.output = list(request.branches[0].output)
            else:
                for at, guess in enumerate((*items[0].drafts, None)):
                    token = draw.choice([1, 2])
                    for item in items:
                        s.commit(item._replace(count=item.count + at), token)
                    if token != guess or len(request.output) == request.params.max_new_tokens:
                        break
            if len(request.output) == request.params.max_new_tokens:
                s.finish(request, "length")
        check_pages(s)
    assert all(r.finished for r in asked) and s.pages.free == s.pages.count
