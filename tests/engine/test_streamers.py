"""Streamers: what they show and when, with Taut's and with transformers' protocol."""

from __future__ import annotations

import asyncio
import queue
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taut.engine.streamers import AsyncTextIteratorStreamer, TextIteratorStreamer, TextStreamer
from taut.errors import RequestError
from tests.engine.letters import letters, words


class Collected(TextStreamer):
    def on_finalized_text(self, text, stream_end=False):
        self.__dict__.setdefault("pieces", []).append((text, stream_end))

    @property
    def text(self):
        return "".join(piece for piece, _ in self.pieces)


def feed(streamer, tokenizer, prompt: str, new: str) -> None:
    """Puts what `generate` puts: the prompt as [1, length], each new token as [1], and the end."""
    streamer.put(torch.tensor([tokenizer.encode(prompt)]))
    for token in tokenizer.encode(new):
        streamer.put(torch.tensor([token]))
    streamer.end()


@pytest.mark.parametrize(("skip", "shown"), [(False, "abc def"), (True, " def")])
def test_printed_text(capsys, skip, shown):
    tokenizer = letters()
    feed(TextStreamer(tokenizer, skip_prompt=skip), tokenizer, "abc", " def")
    assert capsys.readouterr().out == shown + "\n"


def test_pieces_come_with_their_tokens_and_the_end_once():
    tokenizer = letters()
    streamer = Collected(tokenizer, skip_prompt=True)
    feed(streamer, tokenizer, "abc", "de")
    assert streamer.pieces == [("d", False), ("e", False), ("", True)]


def test_incomplete_characters_are_held_back():
    tokenizer = letters()
    streamer = Collected(tokenizer, skip_prompt=True)
    feed(streamer, tokenizer, "a", "é\N{GRINNING FACE}日")
    assert [piece for piece, _ in streamer.pieces] == ["é", "\N{GRINNING FACE}", "日", ""]


def test_special_tokens_are_skipped_unless_asked_for():
    tokenizer = letters()
    for skip, text in ((True, "xy"), (False, "x<end>y")):
        streamer = Collected(tokenizer, skip_prompt=True, skip_special_tokens=skip)
        feed(streamer, tokenizer, "a", "x<end>y")
        assert streamer.text == text


@given(new=st.text(alphabet="abé ", max_size=25), stops=st.lists(st.text("abé ", min_size=1, max_size=4)))
def test_a_stop_string_is_never_shown(new, stops):
    tokenizer = letters()
    streamer = Collected(tokenizer, skip_prompt=True)
    streamer.stop_at(stops)
    feed(streamer, tokenizer, "".join(stops), new)  # the prompt may hold them
    ends = [new.find(stop) + len(stop) for stop in stops if stop in new]
    if ends:
        shortest = new[: min(ends)]
        found = max((stop for stop in stops if shortest.endswith(stop)), key=len)
        assert streamer.text == shortest[: len(shortest) - len(found)]
    else:
        assert streamer.text == new


TEXT = "the theatre stops; the top stopper \N{GRINNING FACE}\N{ROCKET} stays at the station, 日本語の文 " * 8
BPE = words(TEXT)


@given(
    tokens=st.lists(st.integers(0, BPE.vocab_size - 1), max_size=30),
    places=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=3),
)
def test_stop_strings_across_tokens_of_any_length(tokens, places):
    """Random tokens (characters of several tokens, tokens of several characters), stops cut out of their
    own text: what is shown is the text up to the stop string that is complete first."""
    text = BPE.decode(tokens, skip_special_tokens=True)
    stops = [text[at : at + size] for at, size in places if text[at : at + size]]
    streamer = Collected(BPE, skip_prompt=True)
    streamer.stop_at(stops)
    streamer.put([5])
    for token in tokens:
        streamer.put([token])
    streamer.end()
    ends = [text.find(stop) + len(stop) for stop in stops]
    if not ends:
        assert streamer.text == text
    else:
        upto = text[: min(ends)]
        assert streamer.text == upto[: -max(len(stop) for stop in stops if upto.endswith(stop))]


def test_a_streamer_can_be_used_again():
    tokenizer = letters()
    streamer = Collected(tokenizer, skip_prompt=True)
    streamer.stop_at(["c"])
    feed(streamer, tokenizer, "zz", "abcd")
    feed(streamer, tokenizer, "zz", "abcd")
    assert streamer.text == "ab" + "abcd"


def test_lists_are_taken_and_several_rows_are_not():
    tokenizer = letters()
    streamer = Collected(tokenizer)
    streamer.put(tokenizer.encode("ab"))
    assert streamer.text == "ab"
    with pytest.raises(RequestError, match="shows one row; it was given 2"):
        streamer.put(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(RequestError, match="TextStreamer got skip_spaces; supported: skip_prompt"):
        TextStreamer(tokenizer, skip_spaces=True)


def test_iterator_in_another_thread():
    tokenizer = letters()
    streamer = TextIteratorStreamer(tokenizer, True, 10.0)
    thread = threading.Thread(target=feed, args=(streamer, tokenizer, "abc", "defg"))
    thread.start()
    assert list(streamer) == ["d", "e", "f", "g"]
    thread.join()


def test_iterator_gives_up_after_its_timeout_and_raises_what_generate_raised():
    streamer = TextIteratorStreamer(letters(), timeout=0.01)
    with pytest.raises(queue.Empty):
        next(streamer)
    streamer.fail(RequestError("too long"))
    with pytest.raises(RequestError, match="too long"):
        next(streamer)


def test_a_closed_iterator_ends():
    streamer = TextIteratorStreamer(letters(), timeout=5)
    streamer.put([70, 71])
    streamer.close()
    assert streamer.closed and list(streamer) == []


def test_async_iterator():
    tokenizer = letters()

    async def main():
        streamer = AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=10.0)
        thread = threading.Thread(target=feed, args=(streamer, tokenizer, "abc", "déf"))
        thread.start()
        pieces = [piece async for piece in streamer]
        thread.join()
        with pytest.raises(TimeoutError, match=r"no text within 0\.01 seconds"):
            streamer.timeout = 0.01
            await anext(streamer)
        streamer.fail(RequestError("too long"))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="too long"):
            await anext(streamer)
        streamer.close()
        assert [piece async for piece in streamer] == []
        return pieces

    assert asyncio.run(main()) == ["d", "é", "f"]


def test_an_async_iterator_whose_loop_is_gone_closes():
    async def main():
        return AsyncTextIteratorStreamer(letters())

    streamer = asyncio.run(main())
    assert not streamer.closed
    streamer.put([70])
    assert streamer.closed


def test_async_iterator_needs_a_loop():
    with pytest.raises(RequestError, match="make it inside a coroutine"):
        AsyncTextIteratorStreamer(letters())
