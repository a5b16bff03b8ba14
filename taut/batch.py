"""`Batch`: sequences stored end to end as packed tokens, and the padded door (`pack` / `unpack`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taut.errors import RequestError


@dataclass(frozen=True)
class PagedKV:
    """A view of the paged key-value cache for one batch.

    | field | shape | meaning |
    |---|---|---|
    | `keys`, `values` | one `[pages, page_size, kv_heads, head_dim]` a layer | the whole cache |
    | `pages` | `[rows, max_pages]` int32 | page numbers of each row, in order; the tail is unused |
    | `lengths` | `[rows]` int32 | keys each row holds once this batch's keys are written |
    | `slots` | `[tokens]` int64 | where each new key goes: `page * page_size + offset` |
    | `longest` | int | largest of `lengths`, on the host |
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    pages: Tensor
    lengths: Tensor
    slots: Tensor
    longest: int

    @property
    def page_size(self) -> int:
        return self.keys[0].shape[1]


@dataclass(frozen=True)
class Batch:
    """Packed tokens of several rows. Exactly one of `ids` and `embeds` is given.

    | field | shape | meaning |
    |---|---|---|
    | `ids` | `[tokens]` int64 | token ids |
    | `embeds` | `[tokens, dim]` | inputs in place of ids |
    | `positions` | `[tokens]` int32 | position of each token in its own sequence |
    | `starts` | `[rows + 1]` int32 | cumulative row boundaries (`cu_seqlens`) |
    | `longest` | int | longest row of this batch, on the host |
    | `kv` | `PagedKV` or None | None: the keys are this batch's own (encoding, training) |
    | `totals` | `[rows]` int32 or None | final length of each row's sequence where it is known to be \
longer than what this batch holds (chunked prefill); None: a row ends at its last token here |
    """

    ids: Tensor | None
    positions: Tensor
    starts: Tensor
    longest: int
    kv: PagedKV | None = None
    embeds: Tensor | None = None
    totals: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.ids is None) == (self.embeds is None):
            raise RequestError("a batch needs exactly one of ids and embeds")

    @property
    def rows(self) -> int:
        return self.starts.shape[0] - 1

    @property
    def tokens(self) -> int:
        return self.positions.shape[0]

    @staticmethod
    def of(rows: list[list[int]], device: torch.device | str = "cpu") -> Batch:
        """A batch without cache from token id lists, one a row; rows may be empty."""
        lengths = [len(row) for row in rows]
        flat = [token for row in rows for token in row]
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        return Batch(
            ids=torch.tensor(flat, dtype=torch.int64, device=device),
            positions=torch.tensor([p for n in lengths for p in range(n)], dtype=torch.int32, device=device),
            starts=torch.tensor(starts, dtype=torch.int32, device=device),
            longest=max(lengths, default=0),
        )
