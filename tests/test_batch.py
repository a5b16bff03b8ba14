"""The padded door: packing and unpacking with padding anywhere."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taut.batch import Batch, pack
from taut.errors import RequestError


@given(st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=5))
def test_pack_keeps_each_rows_real_tokens_in_order_and_unpack_puts_them_back(mask):
    mask = torch.tensor(mask)
    ids = torch.arange(1, mask.numel() + 1).view(mask.shape)
    batch, padding = pack(ids, mask.long())
    want = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    assert batch.rows == len(want)
    bounds = batch.starts.tolist()
    for row, expected in enumerate(want):
        begin, end = bounds[row], bounds[row + 1]
        assert batch.ids[begin:end].tolist() == expected
        assert batch.positions[begin:end].tolist() == list(range(len(expected)))
    assert batch.longest == max(map(len, want))
    assert torch.equal(padding.unpack(batch.ids), ids * mask)
    same = Batch.of(want)
    assert torch.equal(same.ids, batch.ids) and torch.equal(same.starts, batch.starts)
    assert torch.equal(same.positions, batch.positions) and same.longest == batch.longest


@pytest.mark.parametrize(
    ("positions", "mask", "starts"),
    [
        ([[0, 1, 2, 0, 1, 0]], None, [0, 3, 5, 6]),  # a flattened batch
        ([[0, 1, 2, 3, 4, 5]], None, [0, 6]),
        ([[1, 1, 0, 1, 0, 1]], [[0, 0, 1, 1, 1, 1]], [0, 2, 4]),  # left padding, then two sequences
        ([[4, 5, 6, 7, 8, 9]], None, [0, 6]),  # positions need not begin at 0
        ([[0, 1, 2, 3, 4, 5], [0, 1, 2, 0, 1, 2]], None, [0, 6, 9, 12]),
        ([[0, 1], [0, 1], [0, 1]], [[0, 0], [1, 1], [0, 0]], [0, 0, 2, 2]),  # rows without tokens stay rows
    ],
)
def test_positions_that_restart_mark_rows(positions, mask, starts):
    positions = torch.tensor(positions)
    batch, _ = pack(
        torch.ones_like(positions), None if mask is None else torch.tensor(mask), position_ids=positions
    )
    assert batch.starts.tolist() == starts
    assert batch.longest == max(b - a for a, b in itertools.pairwise(starts))


def test_shapes_that_do_not_match_are_named():
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(RequestError, match=r"attention_mask has shape \[2, 4\]; expected \[2, 3\]"):
        pack(ids, torch.ones(2, 4))
    with pytest.raises(RequestError, match=r"position_ids has shape \[3, 3\]"):
        pack(ids, position_ids=torch.ones(3, 3))
    with pytest.raises(RequestError, match="exactly one of ids and embeds"):
        Batch(None, torch.zeros(0), torch.zeros(1), 0)
