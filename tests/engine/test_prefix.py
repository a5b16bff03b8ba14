"""The index of shared prefixes and the pool that keeps their pages, without a model."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taut.engine.pages import PagePool
from taut.engine.prefix import PrefixIndex
from taut.errors import RequestError


def blocks(tokens, size=2):
    return [tokens[at : at + size] for at in range(0, len(tokens) - len(tokens) % size, size)]


def test_a_page_stands_for_its_block_and_all_before_it():
    index = PrefixIndex()
    assert index.add("a", None, [1, 2], 5) and index.add("a", 5, [3, 4], 7)
    assert index.add("a", None, [3, 4], 2) and index.add("b", None, [1, 2], 3)
    assert index.find("a", blocks([1, 2, 3, 4, 9])) == [5, 7]
    assert index.find("a", blocks([3, 4, 1, 2])) == [2]
    assert index.find("b", blocks([1, 2, 3, 4])) == [3]
    assert index.find("a", blocks([2, 1])) == index.find("c", blocks([1, 2])) == []
    assert not index.add("a", None, [1, 2], 8)  # 5 stands for these
    assert index.add("a", None, [1, 2], 5)
    assert not index.add("a", 8, [1, 2], 9)  # 8 is nobody's page
    assert sorted(index.remove([5, 8])) == [5, 7] and 2 in index and len(index) == 2
    assert index.find("a", blocks([1, 2, 3, 4])) == []


def fill(pool: PagePool, tokens: list[int]) -> list[int]:
    """A row of these tokens, all of whose full pages are known."""
    found = pool.prefixes.find((), blocks(tokens, pool.size))
    pages = pool.share(found)
    pool.extend(pages, pool.needed(len(tokens)) - len(pages))
    for at, block in enumerate(blocks(tokens, pool.size)):
        pool.prefixes.add((), pages[at - 1] if at else None, block, pages[at])
    return pages


def test_idle_pages_go_when_their_room_is_needed_the_end_of_the_longest_idle_first():
    pool = PagePool(6, 2)
    first = fill(pool, [1, 2, 3, 4, 5])
    second = fill(pool, [1, 2, 7, 8])
    assert (first, second, pool.holders(0)) == ([0, 1, 2], [0, 3], 2)
    pool.release(first)
    assert pool.free == 4 and pool.idle([0, 1, 2, 3]) == 1  # 2 was never full
    pool.release(second)
    assert pool.free == 6 and pool.idle(range(6)) == 3
    third = []
    pool.extend(third, 3)
    assert third == [2, 4, 5]  # what was unused
    pool.extend(third, 1)
    assert third[-1] == 1 and pool.prefixes.find((), blocks([1, 2, 7, 8])) == [0, 3]
    pool.extend(third, 1)
    assert third[-1] == 3 and pool.prefixes.find((), blocks([1, 2, 7, 8])) == [0]
    again = fill(pool, [1, 2])
    assert again == [0] and pool.free == 0
    with pytest.raises(RequestError, match="1 pages asked for, 0 of 6 free"):
        pool.extend(third, 1)


def test_what_is_forgotten_is_shared_no_more():
    pool = PagePool(6, 2)
    held, gone = fill(pool, [1, 2, 3, 4]), fill(pool, [1, 2, 5, 6])
    pool.release(gone)
    pool.forget([0])
    assert len(pool.prefixes) == 0 and pool.idle(range(6)) == 0 and pool.free == 4
    pool.release(held)
    fill(pool, [9, 9])
    pool.forget_all()
    assert pool.free == 5 and fill(pool, [9, 9]) == [1]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_found_page_was_filled_with_just_those_tokens(data):
    """Against a list of what each page was filled with."""
    pool = PagePool(data.draw(st.integers(2, 12)), 2)
    filled: dict[int, tuple[int, ...]] = {}
    rows: list[list[int]] = []
    for action in data.draw(st.lists(st.sampled_from(["row", "row", "release", "forget"]), max_size=40)):
        if action == "row":
            tokens = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=10))
            found = pool.prefixes.find((), blocks(tokens))
            for at, page in enumerate(found):
                assert filled[page] == tuple(tokens[: 2 * at + 2])
            if pool.needed(len(tokens)) - len(found) > pool.free - pool.idle(found):
                continue
            pages = fill(pool, tokens)
            assert pages[: len(found)] == found
            for at in range(len(found), len(pages)):
                assert all(pages[at] not in row for row in rows)
                filled[pages[at]] = tuple(tokens[: 2 * at + 2])
            rows.append(pages)
        elif action == "release" and rows:
            pool.release(rows.pop(data.draw(st.integers(0, len(rows) - 1))))
        elif action == "forget":
            pool.forget([data.draw(st.integers(0, pool.count - 1))])
        assert pool.free == pool.count - len({page for row in rows for page in row})
    for row in rows:
        pool.release(row)
    assert pool.free == pool.count
