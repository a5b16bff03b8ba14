"""`ModelOutput`: what a model's call returns."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Later:
    """A field that is computed when somebody looks at it."""

    make: Callable[[], Any]


class ModelOutput(dict):
    """A result whose fields are keys, attributes and, in order, items; fields that are None are absent, and
    one given as `Later` is computed the first time it is asked for. What is `aside` is no field, but there
    for who asks for it by name."""

    def __init__(self, *, aside: Mapping[str, Later] = MappingProxyType({}), **fields: Any):
        super().__init__({name: value for name, value in fields.items() if value is not None})
        self._names, self._aside = tuple(fields), dict(aside)

    def __getattr__(self, name: str) -> Any:
        if name in self or name in self.__dict__.get("_aside", ()):
            return self[name]
        if not name.startswith("_") and name in self._names:
            return None
        raise AttributeError(f"{type(self).__name__} has no field {name!r}; it has: {', '.join(self._names)}")

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return self.to_tuple()[key]
        name = key if isinstance(key, str) else list(self)[key]
        if name in self._aside and name not in self:
            if isinstance(self._aside[name], Later):
                self._aside[name] = self._aside[name].make()
            return self._aside[name]
        value = super().__getitem__(name)
        if isinstance(value, Later):
            value = self[name] = value.make()
        return value

    # All that reads every field does it through `__getitem__`, `dict(output)` too, given an `__iter__` here.

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self or key in self._aside else default

    def items(self) -> ItemsView[str, Any]:
        self.to_tuple()
        return super().items()

    def values(self) -> ValuesView[Any]:
        self.to_tuple()
        return super().values()

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self[name] for name in self)
