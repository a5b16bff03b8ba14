"""The front of an engine: requests from loops and threads, errors that stay where they are, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

import pytest

from taut.engine.async_engine import AsyncEngine
from taut.engine.request import Request
from taut.errors import RequestError
from tests.engine.test_engine import GROUPS, PROMPTS, Broken, alone, broken, engine, request
from tests.engine.tiny import Tiny


@pytest.fixture
def front():
    with AsyncEngine(engine(cache_tokens=112)) as made:
        yield made
    assert made.engine.pages.free == made.engine.pages.count and not made.engine.has_work
    assert not made._thread.is_alive() and made._tickets == {}


def test_streams_of_loops_and_threads_side_by_side(front):
    async def read(at: int) -> list[int]:
        return [token async for tokens in front.stream(request(PROMPTS[at], 10)) for token in tokens]

    async def together() -> list[list[int]]:
        return await asyncio.gather(*(read(at) for at in range(len(PROMPTS))))

    results: dict[int, list] = {}

    def from_a_loop(at: int) -> None:
        results[at] = asyncio.run(together())

    def from_a_thread(at: int) -> None:
        tickets = [front.submit(request(prompt, 10)) for prompt in PROMPTS]
        results[at] = [[token for tokens in ticket for token in tokens] for ticket in tickets]

    threads = [
        threading.Thread(target=one, args=(at,)) for at, one in enumerate([from_a_loop, from_a_thread] * 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert list(results.values()) == [[alone("plain", prompt, 10) for prompt in PROMPTS]] * 4


def test_a_whole_request_and_beams(front):
    done = asyncio.run(front.run(request((1, 2), 9)))
    assert done.output == alone("plain", (1, 2), 9) and done.finish_reason == "length"
    beams = front.submit(request((1, 2), 9, kind="2 beams"))
    assert list(beams) == [alone("plain", (1, 2), 9, kind="2 beams")]
    assert "2 beams" in GROUPS


def test_a_reader_that_leaves_cancels_its_request(front):
    async def leave() -> list[Request]:
        first = request((1, 2), 100)
        async with contextlib.aclosing(front.stream(first)) as tokens:
            async for _ in tokens:
                break
        second = request((1, 2), 100)

        async def read() -> None:
            async for _ in front.stream(second):
                pass

        task = asyncio.create_task(read())
        while not second.output:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while front._tickets:
            await asyncio.sleep(0.001)
        return [first, second]

    for left in asyncio.run(leave()):
        assert left.finish_reason == "cancelled" and 0 < len(left.output) < 100
    third = front.submit(request((1, 2), 100))
    next(iter(third))
    third.cancel()
    assert third.result().finish_reason == "cancelled"
    gone = front.submit(request((1, 2), 3))
    assert gone.result().finish_reason == "length"
    gone.cancel()


def test_an_error_ends_its_request_alone(front):
    bad, good = request((1, 2), should_stop=broken), request((3, 4, 5))
    tickets = front.submit(bad), front.submit(good)
    with pytest.raises(Broken):
        tickets[0].result()
    assert tickets[1].result().output == alone("plain", (3, 4, 5), 8)

    async def read() -> None:
        async for _ in front.stream(request((1, 2), logits_processors=(broken,))):
            pass

    with pytest.raises(Broken):
        asyncio.run(read())
    with pytest.raises(RequestError, match="prompt has token id 61"):
        front.submit(request((61,)))
    with pytest.raises(RequestError, match="submitted before"):
        front.submit(good)


def test_an_error_of_a_whole_step_ends_the_newest_request():
    class Small(Tiny):
        """Has room for two rows."""

        def decoder(self, batch):
            if batch.rows > 2:
                raise MemoryError("no room for so many rows")
            return super().decoder(batch)

    with AsyncEngine(engine(Small(), cache_tokens=200)) as front:
        tickets = [front.submit(request(prompt, 10)) for prompt in PROMPTS]
        ended = []
        for ticket in tickets:
            with contextlib.suppress(MemoryError):
                ticket.result()
            ended.append(ticket.request.finish_reason)
        served = [t.request for t in tickets if t.request.finish_reason == "length"]
        assert len(served) >= 2 and set(ended) == {"length", "error"}
        for done in served:
            assert done.output == alone("plain", tuple(done.prompt), 10)
        assert front.submit(request((5, 6), 9)).result().output == alone("plain", (5, 6), 9)


def test_a_full_queue_refuses():
    class Slow(Tiny):
        def decoder(self, batch):
            time.sleep(0.02)
            return super().decoder(batch)

    with AsyncEngine(engine(Slow(), max_rows=1), max_waiting=2) as front:
        tickets = []
        with pytest.raises(RequestError, match=r"2 requests wait already \(max_waiting=2\)"):
            for _ in range(9):
                tickets.append(front.submit(request((1, 2), 4)))
        assert [t.result().output for t in tickets] == [alone("plain", (1, 2), 4)] * len(tickets)


def test_closing_serves_what_there_is_or_cancels_it_after_a_while():
    front = AsyncEngine(engine())
    tickets = [front.submit(request(prompt, 10)) for prompt in PROMPTS]
    front.close()
    assert [t.result().finish_reason for t in tickets] == ["length"] * len(PROMPTS)
    with pytest.raises(RequestError, match="the engine is closing and takes no further request"):
        front.submit(request((1,)))
    front.close()

    class Endless(Tiny):
        def decoder(self, batch):
            time.sleep(0.01)
            return super().decoder(batch)

    async def run() -> list[Request]:
        requests = [request((1, 2), 100), request((3, 4), 100)]
        front = AsyncEngine(engine(Endless()))

        async def read(r: Request) -> None:
            async for _ in front.stream(r):
                pass

        tasks = [asyncio.create_task(read(r)) for r in requests]
        while not all(r.output for r in requests):
            await asyncio.sleep(0.001)
        started = time.monotonic()
        await front.aclose(timeout=0.05)
        assert time.monotonic() - started < 1
        await asyncio.gather(*tasks)
        return requests

    for cut in asyncio.run(run()):
        assert cut.finish_reason == "cancelled" and len(cut.output) < 100
    with pytest.raises(KeyError), AsyncEngine(engine(Endless())) as front:
        left = front.submit(request((1, 2), 100))
        raise KeyError
    assert left.result().finish_reason == "cancelled"


def test_a_loop_that_is_gone_is_no_error(front):
    r = request((1, 2), 60)

    async def start() -> None:
        await front.stream(r).__anext__()

    asyncio.run(start())  # the loop ends with the stream open
    other = front.submit(request((3, 4, 5), 8))
    assert other.result().output == alone("plain", (3, 4, 5), 8)
    front.cancel(r)
