"""Describes a Python function to a chat template as a JSON schema, from its type hints and docstring."""

from __future__ import annotations

import enum
import inspect
import json
import re
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from taut.errors import TokenizerError

_NAMES = {
    int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null",
    list: "array", tuple: "array", dict: "object",
}  # fmt: skip
_SECTION = re.compile(r"^\s*(Args|Arguments|Returns|Raises|Yields|Examples?):\s*$")
_ARGUMENT = re.compile(r"^(\s*)\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The schema of `function` in the form that chat templates read, `{"type": "function", "function": ...}`.

    Every argument needs a type hint (int, float, str, bool, list, tuple, dict, Literal, an Enum, unions of
    these) and a description in a Google-style docstring; `(choices: ["a", "b"])` at its end lists values.
    Raises TokenizerError that names the function and what is missing.
    """
    name = getattr(function, "__name__", type(function).__name__)
    docstring = inspect.getdoc(function)
    if not docstring:
        raise TokenizerError(f"tool {name}: it needs a docstring that describes it and its arguments")
    sections = _sections(docstring.strip())
    described = _descriptions(sections.get("Args") or sections.get("Arguments") or [])
    try:
        hints = get_type_hints(function)
    except Exception as error:  # a hint that names what can't be imported
        raise TokenizerError(f"tool {name}: its type hints can't be read: {error}") from error
    properties, required = {}, []
    for argument, parameter in inspect.signature(function).parameters.items():
        if argument not in hints:
            raise TokenizerError(f"tool {name}: argument {argument!r} needs a type hint")
        if argument not in described:
            raise TokenizerError(f"tool {name}: argument {argument!r} needs a description under 'Args:'")
        schema, text = _type(name, argument, hints[argument]), described[argument]
        if choices := _CHOICES.search(text):
            schema["enum"], text = _choices(name, argument, choices), text[: choices.start()].strip()
        properties[argument] = {**schema, "description": text}
        if parameter.default is inspect.Parameter.empty:
            required.append(argument)
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    described_function = {
        "name": name,
        "description": "\n".join(sections[""]).strip(),
        "parameters": parameters,
    }
    if "return" in hints:
        returns = _returned(name, hints["return"])
        if returns is not None:
            if text := " ".join(line.strip() for line in sections.get("Returns", [])).strip():
                returns["description"] = text
            described_function["return"] = returns
    return {"type": "function", "function": described_function}


def _sections(docstring: str) -> dict[str, list[str]]:
    """The lines under each heading of a Google-style docstring; those before the first under ''."""
    sections: dict[str, list[str]] = {"": []}
    current = sections[""]
    for line in docstring.splitlines():
        if heading := _SECTION.match(line):
            current = sections.setdefault(heading[1], [])
        else:
            current.append(line)
    return sections


def _descriptions(lines: list[str]) -> dict[str, str]:
    """`argument: text`, where the lines of one text after its first are indented deeper."""
    described: dict[str, str] = {}
    indent, current = None, None
    for line in lines:
        found = _ARGUMENT.match(line)
        if found and (indent is None or len(found[1]) <= indent):
            indent, current = len(found[1]), found[2]
            described[current] = found[3].strip()
        elif current is not None and line.strip():
            described[current] = f"{described[current]} {line.strip()}".strip()
    return described


def _choices(name: str, argument: str, found: re.Match[str]) -> list[Any]:
    try:
        choices = json.loads(found[1])
    except ValueError as error:
        raise TokenizerError(
            f"tool {name}: the choices of {argument!r} must be a JSON list: {error}"
        ) from error
    return [choice.strip() if isinstance(choice, str) else choice for choice in choices]


def _returned(name: str, hint: Any) -> dict[str, Any] | None:
    try:
        return _type(name, "return", hint)
    except TokenizerError:
        return None  # templates hardly ever show it, so an unusual one is no reason to refuse the tool


def _type(name: str, argument: str, hint: Any) -> dict[str, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if hint in _NAMES:
        return {"type": _NAMES[hint]}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _values(name, argument, [member.value for member in hint])
    if origin is Literal:
        return _values(name, argument, list(arguments))
    if origin in (Union, types.UnionType):
        return _union(name, argument, arguments)
    if origin is list:
        return {"type": "array", "items": _type(name, argument, arguments[0])}
    if origin is tuple and Ellipsis not in arguments and len(arguments) > 1:
        return {"type": "array", "prefixItems": [_type(name, argument, item) for item in arguments]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(name, argument, arguments[1])}
    raise TokenizerError(
        f"tool {name}: the type hint of {argument!r}, {hint!r}, has no JSON schema; known: int, float, str, "
        "bool, list, tuple, dict, Literal, Enum and unions of these; or pass the tool as a JSON schema"
    )


def _values(name: str, argument: str, values: list[Any]) -> dict[str, Any]:
    kinds = list(dict.fromkeys(_NAMES.get(type(value)) for value in values))
    if not values or None in kinds or "array" in kinds or "object" in kinds:
        raise TokenizerError(
            f"tool {name}: the values of {argument!r} must be numbers, strings or None: {values}"
        )
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _union(name: str, argument: str, members: tuple[Any, ...]) -> dict[str, Any]:
    schemas = [_type(name, argument, member) for member in members if member is not type(None)]
    if len(schemas) == 1:
        union = schemas[0]
    elif all(schema.keys() == {"type"} and isinstance(schema["type"], str) for schema in schemas):
        kinds = sorted({schema["type"] for schema in schemas})
        union = {"type": kinds[0] if len(kinds) == 1 else kinds}
    else:
        union = {"anyOf": schemas}
    return {**union, "nullable": True} if type(None) in members else union
