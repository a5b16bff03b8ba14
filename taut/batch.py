"""`Batch`: sequences stored end to end as packed tokens, and the padded door (`pack` / `unpack`)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from taut.errors import RequestError
from taut.kernels.attention import Pages
from taut.kernels.padding import places, spread


@dataclass(frozen=True)
class PagedKV:
    """A view of the paged key-value cache for one batch.

    | field | shape | meaning |
    |---|---|---|
    | `keys`, `values` | one `[pages, page_size, kv_heads, head_dim]` a layer | the whole cache |
    | `pages` | `[rows, max_pages]` int32 | page numbers of each row, in order; the tail is unused |
    | `lengths` | `[rows]` int32 | keys each row holds once this batch's keys are written |
    | `slots` | `[tokens]` int64 or None | where each new key goes: `page * page_size + offset`; None: there \
are none (a source's, which are all there before) |
    | `longest` | int | largest of `lengths`, on the host |
    | `first` | int or None | a lone row whose pages lie one after the other: the first of them, on the host |
    | `fresh` | bool | every key of these rows is one of this batch's own: nothing was cached before |
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    pages: Tensor
    lengths: Tensor
    slots: Tensor | None
    longest: int
    first: int | None = None
    fresh: bool = False

    @property
    def page_size(self) -> int:
        return self.keys[0].shape[1]

    def layer(self, index: int) -> Pages:
        """The cache of one layer, as attention takes it."""
        return Pages(self.keys[index], self.values[index], self.pages, self.lengths, self.longest, self.first)


@dataclass(frozen=True)
class Source:
    """What a decoder's cross-attention attends to, where it isn't cached: hidden states of an encoder.

    | field | shape | meaning |
    |---|---|---|
    | `hidden` | `[tokens, dim]` | the states of all rows end to end, one row for each of the decoder's |
    | `starts` | `[rows + 1]` int32 | cumulative row boundaries |
    | `longest` | int | longest row, on the host |
    """

    hidden: Tensor
    starts: Tensor
    longest: int


# What the entries of a batch's tensors stand for, along dimension 0.
EACH_TOKEN, EACH_ROW, EACH_BOUNDARY = ({"each": kind} for kind in ("token", "row", "boundary"))


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
    | `features` | `[tokens, features]` int64 or None | the integers that come with each token, such as its \
type, as `config.features` lists them; None: all are 0 |
    | `kv` | `PagedKV` or None | None: the keys are this batch's own (encoding, training) |
    | `totals` | `[rows]` int32 or None | final length of each row's sequence where it is known to be \
longer than what this batch holds (chunked prefill); None: a row ends at its last token here |
    | `grid` | (int, int) or None | of rows that are pictures: rows and columns of the patches in each |
    | `source` | `Source`, `PagedKV` or None | what cross-attention attends to: an encoder's states, or the \
keys and values that were made of them |
    """

    ids: Tensor | None = field(metadata=EACH_TOKEN)
    positions: Tensor = field(metadata=EACH_TOKEN)
    starts: Tensor = field(metadata=EACH_BOUNDARY)
    longest: int
    kv: PagedKV | None = None
    embeds: Tensor | None = field(default=None, metadata=EACH_TOKEN)
    totals: Tensor | None = field(default=None, metadata=EACH_ROW)
    features: Tensor | None = field(default=None, metadata=EACH_TOKEN)
    grid: tuple[int, int] | None = None
    source: Source | PagedKV | None = None

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


@dataclass(frozen=True)
class Padding:
    """Where packed tokens stand in their padded `[rows, width]` grid: `index` `[tokens]` int64, flat; None
    where the grid is full. `token` `[rows * width]` int32: the reverse, where it is known."""

    index: Tensor | None
    rows: int
    width: int
    token: Tensor | None = None

    def pack(self, padded: Tensor) -> Tensor:
        """`[rows, width, ...]` -> `[tokens, ...]`."""
        flat = padded.flatten(0, 1)
        return flat if self.index is None else flat.index_select(0, self.index)

    def unpack(self, packed: Tensor) -> Tensor:
        """`[tokens, ...]` -> `[rows, width, ...]` with zeros where nothing was."""
        if self.index is not None:
            packed = spread(packed, self.index, self.token, self.rows * self.width)
        return packed.unflatten(0, (self.rows, self.width))

    def real(self, device: torch.device) -> Tensor:
        """Where the grid has tokens, boolean `[rows, width]`."""
        if self.index is None:
            return torch.ones(self.rows, self.width, dtype=torch.bool, device=device)
        flat = torch.zeros(self.rows * self.width, dtype=torch.bool, device=device)
        return flat.index_fill_(0, self.index, True).unflatten(0, (self.rows, self.width))

    def rows_of(self, padded: Tensor) -> tuple[list[list[int]], int]:
        """What stands in each row of integers `[rows, width]`, and the width."""
        if self.index is None:
            return padded.tolist(), self.width
        counts = torch.bincount(self.index // max(self.width, 1), minlength=self.rows)
        return [row.tolist() for row in self.pack(padded).split(counts.tolist())], self.width

    def last(self, packed: Tensor, columns: int) -> tuple[Tensor, Padding]:
        """What stands in the last `columns` columns of the grid, and where it stands in these."""
        columns = min(columns, self.width)
        if self.index is None:
            kept = packed.unflatten(0, (self.rows, self.width))[:, self.width - columns :].flatten(0, 1)
            return kept, Padding(None, self.rows, columns)
        column = self.index % self.width - (self.width - columns)
        keep = (column >= 0).nonzero().squeeze(1)
        index = (self.index // self.width * columns + column).index_select(0, keep)
        return packed.index_select(0, keep), Padding(index, self.rows, columns)


def pack(
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    features: Tensor | None = None,
) -> tuple[Batch, Padding]:
    """Packed batch of a padded one, and the way back.

    `input_ids` `[rows, width]` or `inputs_embeds` `[rows, width, dim]`; `features` `[rows, width, features]`.
    `attention_mask` `[rows, width]` marks real tokens wherever they stand: left, right or interior padding,
    and rows without any.
    `position_ids` `[rows, width]` (or `[1, width]`) default to 0, 1, 2 ... over each row's real tokens;
    where they stop increasing inside a row a new sequence begins there, as in batches that a padding-free
    collator flattened.
    """
    given = input_ids if inputs_embeds is None else inputs_embeds
    rows, width = given.shape[:2]
    device = given.device
    found = None
    longest = width if rows else 0
    if attention_mask is not None:
        if attention_mask.shape != (rows, width):
            shape = list(attention_mask.shape)
            raise RequestError(f"attention_mask has shape {shape}; expected {[rows, width]}, one a token")
        found = places(attention_mask.to(device))
        longest = found.longest
    padding = Padding(None, rows, width)
    if found is not None and len(found.index) < rows * width:  # otherwise there is nothing to gather
        padding = Padding(found.index, rows, width, found.token)
    if position_ids is not None:
        if position_ids.shape not in ((rows, width), (1, width), (width,)):
            raise RequestError(
                f"position_ids has shape {list(position_ids.shape)}; expected {[rows, width]}, one a token"
            )
        positions = padding.pack(position_ids.to(device).expand(rows, width))
        counts = _restarted(positions, None if found is None else found.starts.diff().long(), rows, width)
        longest = int(counts.max()) if len(counts) else 0
        starts = torch.zeros(len(counts) + 1, dtype=torch.int32, device=device)
        torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1:])
    elif found is not None:
        positions, starts = found.positions, found.starts  # rows without tokens stay rows
    else:
        positions = torch.arange(width, dtype=torch.int32, device=device).repeat(rows)
        starts = torch.arange(rows + 1, dtype=torch.int32, device=device) * width
    batch = Batch(
        ids=None if inputs_embeds is not None else padding.pack(input_ids),
        embeds=None if inputs_embeds is None else padding.pack(inputs_embeds),
        positions=positions.to(torch.int32),
        starts=starts,
        longest=longest,
        features=None if features is None else padding.pack(features.to(device)),
    )
    return batch, padding


def _restarted(positions: Tensor, counts: Tensor | None, rows: int, width: int) -> Tensor:
    """Tokens of each sequence, where rows hold so many (None: `width` each) and positions that stop
    increasing begin a new one."""
    if counts is None:
        counts = torch.full((rows,), width, device=positions.device)
    restarts = (positions[1:] <= positions[:-1]).nonzero().squeeze(1) + 1
    ends = counts.cumsum(0)
    begins = ends - counts
    bounds = torch.cat((begins, ends, restarts)).unique()
    return torch.cat((bounds, begins[counts == 0])).sort().values.diff()
