"""`PagePool`: who holds which page of the cache, and which pages can be had."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from taut.engine.prefix import PrefixIndex
from taut.errors import RequestError


class PagePool:
    """Pages 0 .. `count - 1` of `size` tokens each. Several rows may hold the same page. One that nobody
    holds any more but that `prefixes` knows is kept, idle, for the next row that begins with its tokens,
    until its room is needed: the one that was idle longest goes first.

    Unused pages are handed out lowest first, but a row's next page is the one after its last where that is
    unused: so a row alone in the cache lies in it end to end. Holds no tensors.
    """

    def __init__(self, count: int, size: int):
        for name, value in (("count", count), ("size", size)):
            if not isinstance(value, int) or value < 1:
                raise RequestError(f"page {name} is {value!r}; expected an integer of at least 1")
        self.count, self.size = count, size
        self.prefixes = PrefixIndex()
        self._holders = [0] * count
        self._unused = list(range(count))  # ascending
        self._idle: OrderedDict[int, None] = OrderedDict()  # the longest idle first

    @property
    def free(self) -> int:
        """Pages that can be had now: unused and idle ones."""
        return len(self._unused) + len(self._idle)

    @property
    def tokens(self) -> int:
        """Tokens that the whole pool holds."""
        return self.count * self.size

    def needed(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.size)

    def holders(self, page: int) -> int:
        """How many rows hold a page."""
        return self._holders[page]

    def idle(self, pages: Iterable[int]) -> int:
        """How many of these are idle."""
        return sum(page in self._idle for page in pages)

    def extend(self, pages: list[int], count: int) -> None:
        """Append `count` pages that nobody else holds to a row's `pages`; the caller has seen that `free`
        suffices."""
        if count > self.free:
            raise RequestError(f"{count} pages asked for, {self.free} of {self.count} free")
        for _ in range(count - len(self._unused)):
            page, _ = self._idle.popitem(last=False)
            self.prefixes.evict(page)
            insort(self._unused, page)
        for _ in range(count):
            at = bisect_left(self._unused, pages[-1] + 1) if pages else 0
            adjacent = at < len(self._unused) and (not pages or self._unused[at] == pages[-1] + 1)
            page = self._unused.pop(at if adjacent else 0)
            self._holders[page] = 1
            pages.append(page)

    def exchange(self, pages: list[int], at: int) -> tuple[int, int]:
        """Give a row a page of its own in place of the one at `at`, which others hold too; gives both, the
        new one first."""
        old, new = pages[at], []
        self.extend(new, 1)
        pages[at] = new[0]
        self._holders[old] -= 1
        return new[0], old

    def share(self, pages: Sequence[int]) -> list[int]:
        """The same pages for one more row."""
        for page in pages:
            self._holders[page] += 1
            self._idle.pop(page, None)
        return list(pages)

    def release(self, pages: list[int]) -> None:
        """Give back a row's `pages`, leaving it none. The last ones become idle first, so that of a prefix
        the end goes before the beginning."""
        while pages:
            page = pages.pop()
            if not 0 <= page < self.count or not self._holders[page]:
                raise RequestError(f"page {page} of {self.count} is released but was not taken")
            self._holders[page] -= 1
            if not self._holders[page]:
                if page in self.prefixes:
                    self._idle[page] = None
                else:
                    insort(self._unused, page)

    def forget(self, pages: Iterable[int]) -> None:
        """Let no further row share these pages, nor any that continue them."""
        for page in self.prefixes.remove(pages):
            if page in self._idle:
                del self._idle[page]
                insort(self._unused, page)

    def forget_all(self) -> None:
        """Let no further row share any page that there is now."""
        self.prefixes.clear()
        self._unused = sorted((*self._unused, *self._idle))
        self._idle.clear()
