"""`PagePool`: which pages of the cache are free."""

from __future__ import annotations

from bisect import bisect_left, insort

from taut.errors import RequestError


class PagePool:
    """Pages 0 .. `count - 1` of `size` tokens each, handed out lowest first.

    A row's next page is the one after its last where that is free, so a row alone in the cache lies in it
    end to end. Holds no tensors.
    """

    def __init__(self, count: int, size: int):
        for name, value in (("count", count), ("size", size)):
            if not isinstance(value, int) or value < 1:
                raise RequestError(f"page {name} is {value!r}; expected an integer of at least 1")
        self.count, self.size = count, size
        self._free = list(range(count))  # ascending

    @property
    def free(self) -> int:
        """Pages free now."""
        return len(self._free)

    @property
    def tokens(self) -> int:
        """Tokens that the whole pool holds."""
        return self.count * self.size

    def needed(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.size)

    def extend(self, pages: list[int], count: int) -> None:
        """Append `count` free pages to a row's `pages`; the caller has seen that `free` suffices."""
        if count > len(self._free):
            raise RequestError(f"{count} pages asked for, {len(self._free)} of {self.count} free")
        for _ in range(count):
            at = bisect_left(self._free, pages[-1] + 1) if pages else 0
            adjacent = at < len(self._free) and (not pages or self._free[at] == pages[-1] + 1)
            pages.append(self._free.pop(at if adjacent else 0))

    def release(self, pages: list[int]) -> None:
        """Give back a row's `pages`, leaving it none."""
        while pages:
            page = pages.pop()
            at = bisect_left(self._free, page)
            if not 0 <= page < self.count or (at < len(self._free) and self._free[at] == page):
                raise RequestError(f"page {page} of {self.count} is released but was not taken")
            insort(self._free, page)
