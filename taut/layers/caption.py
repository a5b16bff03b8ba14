"""The encoder of texts that are compared with pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from taut.batch import Batch
from taut.config import ModelConfig
from taut.layers.encoder import Encoder
from taut.layers.linear import Linear


class CaptionEncoder(Encoder):
    """A text encoder whose `pooled` is the state of one token of each row, through `head` where there is
    one."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype | None = None):
        super().__init__(config, dtype=dtype)
        size = config.heads.pooler.size
        self.head = None if size is None else Linear(config.dim, size, bias=True, dtype=dtype)

    def pooled(self, hidden: Tensor, batch: Batch) -> Tensor:
        """`[tokens, dim] -> [rows, dim]`; zeros for a row without tokens."""
        counts = batch.starts.diff()
        last = (batch.starts[1:] - 1).clamp(min=0).long()
        at = last if self.config.heads.pooler.of == "last" else self._ends(batch)
        vectors = (
            hidden.index_select(0, at) if batch.tokens else hidden.new_zeros(batch.rows, hidden.shape[1])
        )
        if self.head is not None:
            vectors = self.head(vectors)
        return torch.where(counts[:, None] > 0, vectors, vectors.new_zeros(()))

    def _ends(self, batch: Batch) -> Tensor:
        """Where the text of each row ends: at its first end token, or the first of its highest ids; at its
        first token where there is none."""
        row = torch.repeat_interleave(batch.starts.diff().long(), output_size=batch.tokens)
        if self.config.heads.pooler.of == "eos":
            found = batch.ids == self.config.eos_token_ids[0]
        else:
            highest = batch.ids.new_zeros(batch.rows).scatter_reduce_(0, row, batch.ids, "amax")
            found = batch.ids == highest[row]
        none = batch.tokens  # beyond every place
        at = torch.arange(batch.tokens, device=row.device).masked_fill(~found, none)
        first = at.new_full((batch.rows,), none).scatter_reduce_(0, row, at, "amin")
        return torch.where(first == none, batch.starts[:-1].long(), first).clamp(max=max(none - 1, 0))
