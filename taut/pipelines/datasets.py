"""Views of a dataset that give one of its columns, or two: what a pipeline takes of it."""

from __future__ import annotations

from typing import Any


class KeyDataset:
    """The values of one key of each example; as in `transformers.pipelines.pt_utils`."""

    def __init__(self, dataset: Any, key: str):
        self.dataset, self.key = dataset, key

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index][self.key]


class KeyPairDataset:
    """`{"text", "text_pair"}` from two keys of each example."""

    def __init__(self, dataset: Any, key1: str, key2: str):
        self.dataset, self.key1, self.key2 = dataset, key1, key2

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.dataset[index]
        return {"text": example[self.key1], "text_pair": example[self.key2]}
