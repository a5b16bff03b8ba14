"""What must be so of a scheduler's pages after every step."""

from __future__ import annotations

from collections import Counter

from taut.engine.request import Status
from taut.engine.scheduler import Scheduler


def check_pages(s: Scheduler) -> None:
    """Every page is held, unused, or idle and known by its tokens; rows hold what they need, and none but
    running rows hold any; shared pages are full."""
    pool, tree = s.pages, s.pages.prefixes
    held = Counter(page for r in s.running for page in r.pages)
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
        assert r.status is Status.RUNNING and len(r.pages) >= pool.needed(r.computed)
        assert len(set(r.pages)) == len(r.pages)
        for page in r.pages[r.computed // pool.size :]:  # where the row writes next
            assert held[page] == 1
    for r in s.waiting:
        assert r.status is Status.WAITING and r.pages == [] and r.computed == 0
