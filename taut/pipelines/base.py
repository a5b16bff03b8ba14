"""`Pipeline`: items in, results out in the same order, computed in packed batches of similar length."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from taut.errors import RequestError, TautError, nearest
from taut.modeling.base import PreTrainedModel
from taut.processor.image import ImageProcessor


@dataclass(frozen=True)
class Settings:
    """The options of one call; a task adds its own."""


@dataclass
class Piece:
    """What one pass of the model takes of an item: `inputs` of one row, `size` of them (tokens, samples or
    pixels), and what `finish` has to know about it."""

    inputs: dict[str, Any]
    size: int
    note: Any = None


class ItemError(TautError):
    """Stands in the results for the item at `index`, which failed with `error`, and raises it when used as a
    result."""

    def __init__(self, index: int, error: Exception):
        super().__init__(f"item {index}: {error}")
        self.index, self.error = index, error

    def __getitem__(self, key: Any) -> Any:
        raise self from self.error

    def __iter__(self) -> Any:
        raise self from self.error


class Pipeline:
    """A model for one task, with all that its inputs need; made by `pipeline`.

    Calling it takes an item and gives its result; a list gives a list; a generator, a dataset or any other
    iterable gives a generator that reads ahead by `window` items at most (1: none, for items that come one
    by one). Items are computed longest first in batches of as many tokens as `budget` says (None: all of a
    window), or of `batch_size` items, which changes no result: rows are packed, so none is padded to another.
    An item among several that can't be read or used gives an `ItemError` in its place, and a warning; alone,
    it raises.

    A task describes itself by `settings`, its options, which `check` looks at once a call, and three steps:
    `prepare` makes pieces of items, `compute` runs the model over some, `finish` makes a result of an item's
    outputs.
    """

    task: str
    settings: ClassVar[type[Settings]] = Settings
    window: int = 1024
    budget: ClassVar[Mapping[str, int] | None] = {"cpu": 2048, "cuda": 32768}

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        task: str | None = None,
        tokenizer: Any = None,
        processor: Any = None,
        batch_size: int | None = None,
        window: int | None = None,
        progress: bool | None = None,
        **options: Any,
    ):
        self.model, self.tokenizer, self.processor = model.eval(), tokenizer, processor
        self.task = self.task if task is None else task
        self.window = _count("window", self.window if window is None else window)
        self.batch_size, self.progress = batch_size, progress
        self.defaults = self.parse(options, self.settings())

    def __repr__(self) -> str:
        return f"{self.task} pipeline of a {self.model.architecture()} on {self.device}"

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def image_processor(self) -> Any:
        return self.processor if isinstance(self.processor, ImageProcessor) else None

    @property
    def feature_extractor(self) -> Any:
        return None if isinstance(self.processor, ImageProcessor) else self.processor

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model and all that its inputs need to a folder."""
        for part in (self.model, self.tokenizer, self.processor):
            if part is not None:
                part.save_pretrained(folder)

    # ------------------------------------------------------------------------------------ what a task says

    def is_item(self, inputs: Any) -> bool:
        """Whether `inputs` is one item; otherwise it is an iterable of them."""
        return isinstance(inputs, (str, bytes, Mapping, Tensor)) or not _iterates(inputs)

    def parse(self, options: Mapping[str, Any], defaults: Settings) -> Settings:
        """`defaults` with these options; `RequestError` for one that the task doesn't have."""
        known = [option.name for option in fields(self.settings)]
        if (odd := next((name for name in options if name not in known), None)) is not None:
            has = f"its options: {', '.join(known)}" if known else "it has no options"
            raise RequestError(f"{self.task} has no option {odd!r}{nearest(odd, known)}; {has}")
        return replace(defaults, **options)

    def check(self, settings: Settings) -> None:
        """Raises `RequestError` for options that no item can be used with."""

    def prepare(self, items: Sequence[Any], settings: Settings) -> list[list[Piece] | Exception]:
        """The pieces of each item, or the error that it gave."""
        return [attempt(lambda item=item: self.prepare_one(item, settings)) for item in items]

    def prepare_one(self, item: Any, settings: Settings) -> list[Piece]:
        """The pieces of one item; a task has this or its own `prepare`."""
        raise NotImplementedError

    def compute(self, pieces: Sequence[Piece], settings: Settings) -> Sequence[Any]:
        """One output for each piece, on the host."""
        raise NotImplementedError

    def watched(
        self, pieces: Sequence[Piece], settings: Settings, done: Callable[[float], None]
    ) -> Sequence[Any]:
        """`compute`; what takes long calls `done` meanwhile, with how many more items are."""
        return self.compute(pieces, settings)

    def finish(self, item: Any, pieces: Sequence[Piece], outputs: Sequence[Any], settings: Settings) -> Any:
        """The result of an item."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------ running

    def __call__(
        self,
        inputs: Any,
        *,
        batch_size: int | None = None,
        progress: bool | None = None,
        num_workers: int | None = None,
        **options: Any,
    ) -> Any:
        """The result of an item, a list of results, or a generator of them; see the class. `progress`: a bar
        on the terminal; default: for several items, if stderr is one. `num_workers` is transformers' and
        changes nothing here: there are no processes to set up."""
        settings = self.parse(options, self.defaults)
        size = self.batch_size if batch_size is None else batch_size
        size = None if size is None else _count("batch_size", size)
        self.check(settings)
        if self.is_item(inputs):
            result = next(self._run([inputs], settings, size, lambda _: None))
            if isinstance(result, ItemError):
                raise result.error
            return result
        progress = self.progress if progress is None else progress
        results = self._shown(inputs, settings, size, progress)
        return list(results) if isinstance(inputs, (list, tuple)) else results

    def _shown(
        self, items: Iterable[Any], settings: Settings, size: int | None, progress: bool | None
    ) -> Iterator[Any]:
        with _bar(progress, self.task, len(items) if hasattr(items, "__len__") else None) as advance:
            for result in self._run(_each(items), settings, size, advance):
                if isinstance(result, ItemError):
                    warnings.warn(str(result), stacklevel=2)
                yield result

    def _run(
        self,
        items: Iterable[Any],
        settings: Settings,
        size: int | None,
        advance: Callable[[float], None],
    ) -> Iterator[Any]:
        """The results, in order, a window at a time."""
        items, done = iter(items), 0
        while window := list(islice(items, self.window)):
            for result in self._window(window, settings, size, advance):
                yield ItemError(done, result) if isinstance(result, Exception) else result
                done += 1

    def _window(
        self, items: list[Any], settings: Settings, size: int | None, advance: Callable[[float], None]
    ) -> list[Any]:
        """The result of each item, or the error that it gave."""
        prepared = self.prepare(items, settings)
        places = [
            (item, place)
            for item, pieces in enumerate(prepared)
            if not isinstance(pieces, Exception)
            for place in range(len(pieces))
        ]
        outputs: list[list[Any]] = [[None] * (0 if isinstance(p, Exception) else len(p)) for p in prepared]
        left = [len(found) for found in outputs]
        advance(left.count(0))

        def piece(at: tuple[int, int]) -> Piece:
            return prepared[at[0]][at[1]]

        places.sort(key=lambda at: -piece(at).size)
        for group in self._groups(places, [piece(at).size for at in places], size):
            said = 0.0

            def done(count: float) -> None:
                nonlocal said
                said += count
                advance(count)

            found = self._compute([piece(at) for at in group], settings, done)
            for at, output in zip(group, found, strict=True):
                outputs[at[0]][at[1]] = output
                left[at[0]] -= 1
                said -= left[at[0]] == 0
            advance(-said)
        return [self._finish(*one, settings) for one in zip(items, prepared, outputs, strict=True)]

    def _groups(self, places: Sequence[Any], sizes: Sequence[int], size: int | None) -> Iterator[list[Any]]:
        """`places`, cut into batches of `size`, or of as many as the budget holds."""
        most = None if self.budget is None else self.budget.get(self.device.type, self.budget["cuda"])
        group, held = [], 0
        for place, count in zip(places, sizes, strict=True):
            full = size is None and most is not None and held + count > most
            if group and (len(group) == size or full):
                yield group
                group, held = [], 0
            group.append(place)
            held += count
        if group:
            yield group

    def _compute(
        self, pieces: Sequence[Piece], settings: Settings, done: Callable[[float], None]
    ) -> Sequence[Any]:
        """`watched`, where a batch that is too much for the memory is cut in two, and one that fails is
        computed one by one to find whose fault it is."""
        try:
            with torch.no_grad():
                return self.watched(pieces, settings, done)
        except torch.OutOfMemoryError:
            if len(pieces) == 1:
                raise
            torch.cuda.empty_cache()
        except TautError as error:
            if len(pieces) == 1:
                return [error]
        middle = len(pieces) // 2
        halves = pieces[:middle], pieces[middle:]
        return [output for half in halves for output in self._compute(half, settings, done)]

    def _finish(
        self, item: Any, pieces: list[Piece] | Exception, outputs: Sequence[Any], settings: Settings
    ) -> Any:
        if isinstance(pieces, Exception):
            return pieces
        if (error := next((output for output in outputs if isinstance(output, Exception)), None)) is not None:
            return error
        return attempt(lambda: self.finish(item, pieces, outputs, settings))


def _count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RequestError(f"{name} is {value!r}; expected an integer >= 1")
    return value


def attempt(what: Callable[[], Any]) -> Any:
    """`what()`, or the error that it raises about its input."""
    try:
        return what()
    except (TautError, OSError) as error:
        return error


def stacked(pieces: Sequence[Piece], device: torch.device) -> dict[str, Tensor]:
    """The inputs of pieces that are lists of integers, one a token, as tensors `[rows, width]`, padded at the
    end, with their `attention_mask`."""
    counts = [len(next(iter(piece.inputs.values()))) for piece in pieces]
    width = max(counts)
    tensors = {
        name: torch.tensor(
            [[*piece.inputs[name], *[0] * (width - len(piece.inputs[name]))] for piece in pieces]
        )
        for name in pieces[0].inputs
    }
    tensors["attention_mask"] = (torch.arange(width) < torch.tensor(counts)[:, None]).long()
    return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def _iterates(inputs: Any) -> bool:
    return hasattr(inputs, "__iter__") or (hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__"))


def _each(items: Any) -> Iterable[Any]:
    """The items of an iterable, or of a dataset that can only be indexed."""
    return items if hasattr(items, "__iter__") else (items[index] for index in range(len(items)))


@contextmanager
def _bar(wanted: bool | None, task: str, total: int | None) -> Iterator[Callable[[float], None]]:
    """What advances a bar over so many items (None: nobody knows), or does nothing."""
    if wanted is False or (wanted is None and (total == 1 or not sys.stderr.isatty())):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        shown = bar.add_task(task, total=total)
        yield lambda count: bar.advance(shown, count)
