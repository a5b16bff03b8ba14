"""`taut run`: a pipeline over the inputs of a command line, or of the lines of standard input."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from taut.cli.facts import Facts
from taut.errors import RequestError
from taut.pipelines import ItemError, Pipeline, pipeline
from taut.quant.config import named

TEXTS = ("generated_text", "summary_text", "translation_text", "text")


def run(
    task: str,
    model: str,
    inputs: Sequence[str],
    *,
    context: str | None,
    labels: str | None,
    settings: Sequence[str],
    batch_size: int | None,
    as_json: bool,
    load_in: str | None,
    dtype: str,
    device: str,
    revision: str | None,
    local_files_only: bool,
) -> bool:
    """Prints a result for each input as soon as it is there; whether all of them could be used."""
    options = dict(map(_setting, settings))
    if labels is not None:
        options["candidate_labels"] = labels
    loading = {} if load_in is None else {"quantization_config": named(load_in)}
    started = time.perf_counter()
    pipe = pipeline(
        task,
        model,
        dtype=dtype,
        device=device,
        revision=revision,
        local_files_only=local_files_only,
        batch_size=batch_size,
        window=1 if "-" in inputs and sys.stdin.isatty() else None,
        progress=False,
        model_kwargs=loading,
        **options,
    )
    loaded = time.perf_counter() - started
    shown: list[str] = []  # what the pipeline has taken and not yet answered
    if "-" in inputs:
        inputs = list(_lines(inputs)) if pipe.task == "sentence-similarity" else inputs
    items = _items(pipe, inputs, context, shown.append)
    header, fine = len(inputs) > 1 or inputs == ["-"], True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "item \\d+: ")  # said here by its name
        for result in pipe(items):
            name, failed = shown.pop(0), isinstance(result, ItemError)
            fine = fine and not failed
            if as_json:
                value = {"error": str(result.error)} if failed else {"result": result}
                print(json.dumps({"input": name, **value}, ensure_ascii=False))
            elif failed:
                print(f"error: {_about(name, str(result.error))}", file=sys.stderr)
            else:
                if pipe.task == "sentence-similarity":
                    result = {"sequence": name, "labels": inputs[1:], "scores": result}
                _show(name if header else None, result)
            sys.stdout.flush()
    print(Facts.of(loaded, str(pipe.device)).line(), file=sys.stderr)
    return fine


def _about(name: str, error: str) -> str:
    """An error behind the input that it is about, unless it begins with it."""
    named = name and error.startswith((f"{name}: ", f"{name} is not ", f"{name} can't be "))
    return error if named else f"{_short(name)}: {error}"


def _short(name: str) -> str:
    """An input as one short line, of an empty one its quotes."""
    line = " ".join(name.split())
    return (line if len(line) <= 80 else f"{line[:77]}...") or '""'


def _setting(text: str) -> tuple[str, Any]:
    """`key=value`, where the value is JSON, or a text that isn't."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise RequestError(f"--set {text!r}: expected key=value, such as --set top_k=3")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, {"True": True, "False": False, "None": None}.get(value, value)


def _items(
    pipe: Pipeline, inputs: Sequence[str], context: str | None, taken: Callable[[str], None]
) -> Iterator[Any]:
    """What the pipeline takes of each input, `taken` by its name; `-` stands for the lines of standard
    input."""
    if pipe.task == "sentence-similarity":
        if len(inputs) < 2:
            raise RequestError("sentence-similarity compares the first input with others; give two at least")
        taken(inputs[0])
        yield {"source_sentence": inputs[0], "sentences": inputs[1:]}
        return
    if (context is None) == (pipe.task == "question-answering"):
        raise RequestError(
            "--context is the text that holds the answers, for question-answering and only that"
        )
    for line in _lines(inputs):
        taken(line)
        yield line if context is None else {"question": line, "context": context}


def _lines(inputs: Sequence[str]) -> Iterator[str]:
    for text in inputs:
        if text == "-":
            yield from (line.rstrip("\n") for line in sys.stdin)
        else:
            yield text


def _show(name: str | None, result: Any) -> None:
    """A result as text, behind the name of its input where there are several."""
    lines = list(_rows(result))
    if name is None:
        print("\n".join(lines))
    elif len(lines) == 1 and "\n" not in lines[0]:
        print(f"{_short(name)}: {lines[0]}")
    else:
        print(f"{_short(name)}:")
        for line in lines:
            print("  " + line.replace("\n", "\n  "))


def _rows(result: Any) -> Iterator[str]:
    """The lines that say a result."""
    if isinstance(result, Mapping) and "sequence" in result and "labels" in result:
        for label, score in zip(result["labels"], result["scores"], strict=True):
            yield f"{score:.4f}  {label}"
    elif isinstance(result, Mapping) and (key := next((key for key in TEXTS if key in result), None)):
        yield str(result[key])
        for chunk in result.get("chunks", ()):
            begin, end = ("" if at is None else f"{at:.2f}" for at in chunk["timestamp"])
            yield f"{begin:>8} {end:>8}  {chunk['text'].strip()}"
    elif isinstance(result, Mapping):
        rest = [
            f"{key}={value}" for key, value in result.items() if key in ("start", "end") and value is not None
        ]
        said = next((result[key] for key in ("sequence", "answer", "word") if key in result), None)
        kind = next((result[key] for key in ("label", "entity_group", "entity") if key in result), None)
        parts = [kind, None if said is None else json.dumps(said, ensure_ascii=False), *rest]
        yield "  ".join([f"{result['score']:.4f}", *(part for part in parts if part is not None)])
    elif isinstance(result, list) and any(isinstance(one, (Mapping, list)) for one in result):
        if isinstance(result[0], list) and isinstance(result[0][0], (float, list)):  # vectors
            yield json.dumps(result)
            return
        for one in result:
            yield from _rows(one)
    elif isinstance(result, list) and all(isinstance(one, float) for one in result):
        for score in result:
            yield f"{score:.4f}"
    else:
        yield json.dumps(result, ensure_ascii=False)
