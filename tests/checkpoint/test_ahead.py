"""Reading ahead: the bytes of the files in order, however late the device is; errors where they belong."""

from __future__ import annotations

import threading
import time
from collections import deque

import pytest
import torch

from taut.checkpoint import ahead
from taut.checkpoint.ahead import ReadAhead
from taut.checkpoint.base import Span, read_bytes
from taut.errors import CheckpointError


class Late:
    """A device that makes each copy, in order, when it is waited for and not before."""

    def __init__(self):
        self.buffers, self._queue, self._lock = 0, deque(), threading.Lock()

    def buffer(self, size):
        self.buffers += 1
        return torch.empty(size, dtype=torch.uint8)

    def empty(self, size):
        return torch.empty(size, dtype=torch.uint8)

    def copy(self, to, buffer):
        job = (to, buffer)
        self._queue.append(job)
        return lambda: self.finish(job)

    def finish(self, until=None):
        with self._lock:
            while self._queue and (until is None or any(job is until for job in self._queue)):
                to, buffer = self._queue.popleft()
                to.copy_(buffer)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two files, and spans of them: of no bytes, of less than a buffer, of one, and of many."""
    monkeypatch.setattr(ahead, "CHUNK", 64)
    monkeypatch.setattr(ahead, "BUFFERS", 5)
    monkeypatch.setattr(ahead, "THREADS", 3)
    generator = torch.Generator().manual_seed(0)
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(bytes(torch.randint(256, (3000,), generator=generator).tolist()))
    counts = [0, 1, 64, 65, 700, 3, 3, 128, 1500, 7]
    return [Span(paths[i % 2], 11 * i, count) for i, count in enumerate(counts * 3)]


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("taut-read")]


def test_a_buffer_is_filled_again_only_when_the_device_has_read_it(files):
    device = Late()
    reads = ReadAhead(files, device)
    found = [reads.read(span) for span in files]
    reads.close()
    device.finish()
    for span, got in zip(files, found, strict=True):
        assert torch.equal(got, read_bytes(span.path, span.offset, span.count)), span
    assert device.buffers == 5 and not threads()


def test_reads_that_end_out_of_order_are_given_in_order(files, monkeypatch):
    def uneven(out, path, offset):
        time.sleep((offset * 7 % 5) / 2000)
        read(out, path, offset)

    read = ahead.read_into
    monkeypatch.setattr(ahead, "read_into", uneven)
    test_a_buffer_is_filled_again_only_when_the_device_has_read_it(files)


@pytest.mark.parametrize("at", [0, 4, 25])
def test_a_read_that_fails_raises_where_it_is_asked_for(files, at):
    broken = files[0].path.with_name("short")
    broken.write_bytes(b"short")
    spans = [*files[:at], Span(broken, 2, 900), *files[at:]]
    device = Late()
    reads = ReadAhead(spans, device)
    for span in spans[:at]:
        reads.read(span)
    with pytest.raises(CheckpointError) as alone:
        read_bytes(broken, 2, min(ahead.CHUNK, 900))
    with pytest.raises(CheckpointError) as found:
        reads.read(spans[at])
    assert str(found.value) == str(alone.value) and "ended at byte 5" in str(found.value)
    reads.close()
    assert not threads()


def test_what_is_not_asked_for_is_left(files):
    reads = ReadAhead(files, Late())
    reads.read(files[0])
    with pytest.raises(RuntimeError, match="was to be next"):
        reads.read(files[3])
    reads.close()
    assert not threads()
