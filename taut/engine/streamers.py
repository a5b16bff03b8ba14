"""Streamers: objects that `generate` hands its tokens to as they come, under transformers' names."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor

from taut.engine.stops import StopMatcher, detokenizer
from taut.errors import RequestError


class Streamer(Protocol):
    """What `generate` needs of a streamer; transformers' streamers have it.

    `put` gets the prompt first (`[1, length]` int64 on the CPU), then each new token (`[1]`); `end` is
    called once after the last. Taut's own streamers further have `stop_at(stop_strings)`, called before
    the prompt, `fail(error)`, called in place of `end`, and `closed`, looked at after every token: True
    ends generation.
    """

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...


class TextStreamer:
    """Prints text as it comes.

    `skip_prompt`: leave out the prompt. Text is shown as soon as it can no longer change: not while a
    character is incomplete, and not while it may be the beginning of a stop string; neither a stop string
    nor what follows it is shown. Subclasses override `on_finalized_text`.
    """

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, *, skip_special_tokens: bool = True, **decode: Any
    ) -> None:
        if decode.pop("clean_up_tokenization_spaces", None) or decode:
            raise RequestError(
                f"{type(self).__name__} got {', '.join(decode) or 'clean_up_tokenization_spaces=True'}; "
                "supported: skip_prompt, skip_special_tokens, timeout (iterators)"
            )
        self.tokenizer = tokenizer
        self.skip_prompt, self.skip_special_tokens = skip_prompt, skip_special_tokens
        self.closed = False
        self._stops: tuple[str, ...] = ()
        self._start()

    def _start(self) -> None:
        self._text = detokenizer(self.tokenizer, self.skip_special_tokens)
        self._matcher = StopMatcher(self._stops)
        self._prompt_next = True

    def stop_at(self, stop_strings: Sequence[str]) -> None:
        """Hold back what may belong to one of these, and show nothing from the first of them on."""
        self._stops = tuple(stop_strings)
        self._matcher = StopMatcher(self._stops)

    def put(self, value: Tensor | Iterable[int]) -> None:
        """Takes the prompt (the first call) or new tokens: ids of one row."""
        ids = _row(value)
        if self._prompt_next:
            self._prompt_next = False
            shown = "" if self.skip_prompt else "".join(self._text.push(token) for token in ids)
        else:
            shown = "".join(self._matcher.push(self._text.push(token)) for token in ids)
        if shown:
            self.on_finalized_text(shown)

    def end(self) -> None:
        """Shows what was held back; the streamer can then be used again."""
        rest = self._matcher.push(self._text.finish()) + self._matcher.finish()
        self._stops = ()
        self._start()
        self.on_finalized_text(rest, stream_end=True)

    def fail(self, error: BaseException) -> None:
        """Generation ended with an error, which `generate` raises."""
        self._stops = ()
        self._start()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Gets each piece of text; the last one, possibly empty, with `stream_end`."""
        print(text, flush=True, end="\n" if stream_end else "")


class TextIteratorStreamer(TextStreamer):
    """An iterator over the text, for a thread other than the one that runs `generate`.

    Waiting longer than `timeout` seconds for the next piece raises `queue.Empty`; None waits for ever. An
    error in `generate` is raised by the iterator too. `close()` ends generation.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        timeout: float | None = None,
        *,
        skip_special_tokens: bool = True,
        **decode: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, skip_special_tokens=skip_special_tokens, **decode)
        self.timeout = timeout
        # Pieces of text; None at the end; an exception where generation failed.
        self.text_queue: queue.Queue[str | BaseException | None] = queue.Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.text_queue.put(text)
        if stream_end:
            self.text_queue.put(None)

    def fail(self, error: BaseException) -> None:
        super().fail(error)
        self.text_queue.put(error)

    def close(self) -> None:
        """Ends generation after the token it is at; the iterator then ends too."""
        self.closed = True
        self.text_queue.put(None)

    def __iter__(self) -> TextIteratorStreamer:
        return self

    def __next__(self) -> str:
        value = None if self.closed else self.text_queue.get(timeout=self.timeout)
        if value is None:
            raise StopIteration
        if isinstance(value, BaseException):
            raise value
        return value


class AsyncTextIteratorStreamer(TextStreamer):
    """An asynchronous iterator over the text; `generate` runs in a thread. To be made inside a coroutine.

    Waiting longer than `timeout` seconds for the next piece raises `TimeoutError`; None waits for ever. An
    error in `generate` is raised by the iterator too. `close()` ends generation.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        timeout: float | None = None,
        *,
        skip_special_tokens: bool = True,
        **decode: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, skip_special_tokens=skip_special_tokens, **decode)
        self.timeout = timeout
        self.text_queue: asyncio.Queue[str | BaseException | None] = asyncio.Queue()
        try:
            self.loop = asyncio.get_running_loop()
        except RuntimeError as error:
            raise RequestError(
                "AsyncTextIteratorStreamer needs a running event loop: make it inside a coroutine"
            ) from error

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._send(text)
        if stream_end:
            self._send(None)

    def fail(self, error: BaseException) -> None:
        super().fail(error)
        self._send(error)

    def close(self) -> None:
        """Ends generation after the token it is at; the iterator then ends too. Call it in the loop."""
        self.closed = True
        self.text_queue.put_nowait(None)

    def _send(self, value: str | BaseException | None) -> None:
        try:
            self.loop.call_soon_threadsafe(self.text_queue.put_nowait, value)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self.closed = True

    def __aiter__(self) -> AsyncTextIteratorStreamer:
        return self

    async def __anext__(self) -> str:
        if self.closed:
            raise StopAsyncIteration
        try:
            value = await asyncio.wait_for(self.text_queue.get(), self.timeout)
        except asyncio.TimeoutError:  # not the built-in one before Python 3.11
            raise TimeoutError(f"no text within {self.timeout} seconds") from None
        if value is None:
            raise StopAsyncIteration
        if isinstance(value, BaseException):
            raise value
        return value


def _row(value: Tensor | Iterable[int]) -> list[int]:
    """Token ids of one row, given as `[length]`, `[1, length]` or a list."""
    if not isinstance(value, Tensor):
        return list(value)
    if value.ndim > 1 and value.shape[0] != 1:
        raise RequestError(f"a text streamer shows one row; it was given {value.shape[0]}")
    return value.flatten().tolist()
