"""What the decoder of a model that hears begins with: its start, a language, a task, and whether times are
said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from taut.engine.generation import GenerationConfig
from taut.errors import RequestError
from taut.tokenizer.languages import code_of

TASKS = ("translate", "transcribe")
_OUTDATED = (
    "generation_config.json has no {key!r}, which {option}= needs. Next step: take the file of a newer "
    "revision of the checkpoint, or set model.generation_config.{key}"
)


def known(config: GenerationConfig, key: str) -> Any:
    """What a config says beside the options of all models; None where it says nothing."""
    return getattr(config, key, None)


def beginnings(
    config: GenerationConfig,
    rows: int,
    *,
    language: str | Sequence[str] | None,
    task: str | None,
    multilingual: bool | None,
    times: bool,
    forced: Sequence[Sequence[int | None]] | None,
    detect: Callable[[], list[int]],
) -> list[list[int]]:
    """The first tokens of each row. `forced`: pairs of a place, from 1 on, and its token, where neither
    language nor task is given. `detect` finds the language's token of each row, where nothing says it.

    Raises `RequestError` for a language or task that isn't known, and for one of a model that has none.
    """
    if multilingual is None:
        multilingual = known(config, "is_multilingual")
    if multilingual is False and (task is not None or language is not None):
        raise RequestError(
            "language= and task= are for multilingual models, and this one knows English alone. Next step: "
            "leave them out, or pass is_multilingual=True"
        )
    language = known(config, "language") if language is None else language
    task = known(config, "task") if task is None else task
    if task is not None and task not in TASKS:
        raise RequestError(f"task is {task!r}; known: {', '.join(TASKS)}")
    tasks, silent = known(config, "task_to_id"), known(config, "no_timestamps_token_id")
    if task is not None and not tasks:
        raise RequestError(_OUTDATED.format(key="task_to_id", option="task"))
    start = [config.decoder_start_token_id]
    if task is None and language is None:
        start += _forced(forced)
    found = [list(start) for _ in range(rows)]
    languages = _languages(config, rows, language)
    if languages is None and known(config, "lang_to_id") and (len(start) == 1 or start[1] is None):
        languages = detect()
    for row, token in zip(found, languages or (), strict=False):
        row[1:2] = [token]
    for row in found:
        if task is not None:
            row.append(tasks[task])
        elif language is not None and tasks and not {*tasks.values()} & {*row}:
            row.append(tasks["transcribe"])
        if silent is not None and row[-1] == silent and times:
            row.pop()
        elif silent is not None and row[-1] != silent and not times:
            row.append(silent)
    return [[token for token in row if token is not None] for row in found]


def _forced(pairs: Sequence[Sequence[int | None]] | None) -> list[int | None]:
    places = [place for place, _ in pairs or ()]
    if places and places[0] != 1:
        return []
    if places != list(range(1, len(places) + 1)):
        raise RequestError(
            f"forced_decoder_ids is {pairs!r}; expected pairs of a place and a token, the places 1, 2, 3 ..."
        )
    return [token for _, token in pairs or ()]


def _languages(config: GenerationConfig, rows: int, language: str | Sequence[str] | None) -> list[int] | None:
    """The token of each row's language; None where none is given."""
    if language is None:
        return None
    tokens = known(config, "lang_to_id")
    if not tokens:
        raise RequestError(_OUTDATED.format(key="lang_to_id", option="language"))
    named = [language] * rows if isinstance(language, str) else list(language)
    if len(named) != rows or not all(isinstance(one, str) for one in named):
        raise RequestError(f"language is {language!r}; expected a text, or one for each of {rows} clips")
    found = []
    for one in named:
        token = one.lower() if one.lower() in tokens else f"<|{code_of(one)}|>"
        if token not in tokens:
            raise RequestError(f"language is {one!r}, and the model has: {', '.join(tokens)}")
        found.append(tokens[token])
    return found
