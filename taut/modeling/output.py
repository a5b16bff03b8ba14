"""`ModelOutput`: what a model's call returns."""

from __future__ import annotations

from typing import Any


class ModelOutput(dict):
    """A result whose fields are keys, attributes and, in order, items; fields that are None are absent."""

    def __init__(self, **fields: Any):
        super().__init__({name: value for name, value in fields.items() if value is not None})
        self._names = tuple(fields)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if not name.startswith("_") and name in self._names:
            return None
        raise AttributeError(f"{type(self).__name__} has no field {name!r}; it has: {', '.join(self._names)}")

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())
