"""`PrefixIndex`: which page holds which block of tokens, after which others."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence


class PrefixIndex:
    """A tree of full pages: each holds the keys of one block of tokens behind the block of its parent, so a
    page stands for all tokens up to its end. Holds no tensors.

    Beneath a root lie the prefixes of one scope: keys of equal tokens differ where the scopes do. A page is
    in the tree once, and its parent is too.
    """

    def __init__(self) -> None:
        self._pages: dict[tuple[Hashable, tuple[int, ...]], int] = {}  # (parent, block) -> page
        self._keys: dict[int, tuple[Hashable, tuple[int, ...]]] = {}  # page -> (parent, block)

    def __contains__(self, page: int) -> bool:
        return page in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, scope: Hashable, blocks: Iterable[Sequence[int]]) -> list[int]:
        """Pages of as many of the blocks, from the first on, as there are."""
        found: list[int] = []
        parent: Hashable = (scope,)
        for block in blocks:
            page = self._pages.get((parent, tuple(block)))
            if page is None:
                break
            found.append(page)
            parent = page
        return found

    def add(self, scope: Hashable, parent: int | None, block: Sequence[int], page: int) -> bool:
        """Take in `page`, whose keys are those of `block` behind the block of `parent` (None: at the start).

        False where another page already stands for these tokens, or `parent` is not in the tree.
        """
        if parent is not None and parent not in self._keys:
            return False
        key = ((scope,) if parent is None else parent), tuple(block)
        if self._pages.setdefault(key, page) != page:
            return False
        self._keys[page] = key
        return True

    def remove(self, pages: Iterable[int]) -> list[int]:
        """Take out these pages, as far as they are in, and all behind them; gives what was taken out."""
        behind: dict[Hashable, list[int]] = {}
        for page, (parent, _) in self._keys.items():
            behind.setdefault(parent, []).append(page)
        left, gone = list(pages), []
        while left:
            page = left.pop()
            if page in self._keys:
                self.evict(page)
                gone.append(page)
                left += behind.get(page, ())
        return gone

    def evict(self, page: int) -> None:
        """Take out one page that no other stands behind."""
        del self._pages[self._keys.pop(page)]

    def clear(self) -> None:
        self._pages.clear()
        self._keys.clear()
