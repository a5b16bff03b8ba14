"""What must be so of a scheduler's pages after every step."""

from __future__ import annotations

from collections import Counter

from taut.engine.request import Status
from taut.engine.scheduler import Scheduler


def check_pages(s: Scheduler) -> None:
    """Every page is held, unused, or idle and known by its tokens; rows hold what they need, and none but
    running rows hold any; shared pages are full."""
    pool, tree = s.pages, s.pages.prefixes
    rows = [row for r in s.running for row in r.rows]
    held = Counter(page for row in rows for page in row.pages)
    held.update(page for r in s.running for page in r.source_pages)
    assert pool._holders == [held[page] for page in range(pool.count)]
    assert pool._unused == sorted(pool._unused)
    assert sorted((*held, *pool._unused, *pool._idle)) == list(range(pool.count))
    assert set(pool._idle) == set(tree._keys) - set(held)
    assert not any(page in tree for page in pool._unused)
    for page, (parent, block) in tree._keys.items():
        assert tree._pages[parent, block] == page and len(block) == pool.size
        assert isinstance(parent, tuple) or parent in tree
    assert len(tree._pages) == len(tree._keys)
    for r in s.running:
        assert r.status is Status.RUNNING
        for row in r.rows:
            assert row.request is r and len(row.pages) >= pool.needed(row.computed)
            assert len(set(row.pages)) == len(row.pages)
            own = Counter(page for other in r.rows for page in other.pages)
            for page in row.pages[row.computed // pool.size :]:  # where the row writes next
                assert held[page] == own[page]  # branches of one request get their own when they do
        if r.source_pages:
            assert len(r.source_pages) == pool.needed(len(r.source))
    for r in s.waiting:
        assert r.status is Status.WAITING and r.source_pages == []
        assert all(row.pages == [] and row.computed == 0 for row in r.rows)
