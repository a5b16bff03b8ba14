"""Turns a conversation into text through a chat template: checks the messages, renders them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

from taut.errors import TokenizerError, nearest
from taut.tokenizer.checks import show
from taut.tokenizer.template import plain, render_template
from taut.tokenizer.tools import tool_schema

_REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # names for the same field; templates read the first
_CONTINUE = "CONTINUE_FINAL_MESSAGE_TAG "  # ends in a space: a template that trims the message is noticed
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """One conversation as text, and the character spans `[start, stop)` that the assistant wrote."""

    text: str
    spans: list[tuple[int, int]]


def choose_template(templates: str | Mapping[str, str] | None, wanted: str | None, tools: Any) -> str:
    """The template to render: `wanted` (a template or the name of one), or the tokenizer's default one."""
    if isinstance(templates, str) or not templates:
        source = wanted if wanted is not None else templates
        if not source:
            raise TokenizerError(
                "this tokenizer has no chat template (none in tokenizer_config.json, chat_template.jinja, "
                "additional_chat_templates/ or GGUF metadata); pass chat_template=, set "
                "tokenizer.chat_template, or tokenize the prompt as plain text"
            )
        return source
    if wanted is not None:
        return templates.get(wanted, wanted)
    if tools is not None and "tool_use" in templates:
        return templates["tool_use"]
    if "default" in templates:
        return templates["default"]
    raise TokenizerError(
        "this tokenizer has several chat templates and none called 'default'; "
        f"pass chat_template= with one of: {', '.join(sorted(templates))}"
    )


def split_batch(conversation: Any) -> tuple[list[Any], bool]:
    """The conversations in `conversation`, and whether it was a batch of them."""
    conversation = getattr(conversation, "messages", conversation)
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise TokenizerError(
            "a conversation is a non-empty list of messages, {'role': ..., 'content': ...}; "
            f"got {show(conversation)}"
        )
    batched = isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
    conversations = [getattr(one, "messages", one) for one in conversation] if batched else [conversation]
    return conversations, batched


def render_chat(
    code: CodeType,
    source: str,
    conversation: Any,
    *,
    tools: Sequence[dict[str, Any] | Callable[..., Any]] | None,
    documents: Sequence[dict[str, str]] | None,
    variables: Mapping[str, Any],
    add_generation_prompt: bool,
    continue_final_message: bool | str,
    want_spans: bool,
) -> Rendered:
    """Renders one conversation with the compiled template `code` of `source`.

    Raises TokenizerError for messages that aren't dicts with a role and a content, and for a template that
    fails or is stopped (see `taut.tokenizer.template`).
    """
    if want_spans and not _GENERATION.search(source):
        raise TokenizerError(
            "return_assistant_tokens_mask needs a chat template with {% generation %} blocks"
        )
    messages = _messages(conversation)
    field, ending = "", ""
    if continue_final_message:
        field = continue_final_message if isinstance(continue_final_message, str) else "content"
        ending = _mark_final(messages[-1], field, source)
    try:
        inputs = {
            **plain(dict(variables)),
            "messages": messages,
            "tools": None if tools is None else [plain(_tool(tool)) for tool in _sequence("tools", tools)],
            "documents": None if documents is None else _documents(documents),
            "add_generation_prompt": bool(add_generation_prompt),
        }
    except RecursionError as error:
        raise TokenizerError("tools, documents and template variables can't contain themselves") from error
    text, spans = render_template(code, inputs)
    if continue_final_message:
        text = _cut_final(text, ending, field)
    return Rendered(text, spans)


def _messages(conversation: Any) -> list[dict[str, Any]]:
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise TokenizerError(f"a conversation is a non-empty list of messages; got {show(conversation)}")
    messages = []
    for index, given in enumerate(conversation):
        try:
            message = plain(given)
        except RecursionError as error:
            raise TokenizerError(f"message {index} contains itself") from error
        if not isinstance(message, dict):
            raise TokenizerError(
                f"message {index} must be a dict with 'role' and 'content', not {show(given)}; "
                "a plain prompt is [{'role': 'user', 'content': prompt}]"
            )
        # A null is what some servers send for "absent"; templates would print it as the word None.
        message = {key: value for key, value in message.items() if value is not None}
        _check_message(index, message)
        reasoning = next((message[key] for key in _REASONING if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        messages.append(message)
    return messages


def _check_message(index: int, message: dict[str, Any]) -> None:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise TokenizerError(
            f"message {index} needs a 'role' such as 'system', 'user' or 'assistant'; it has {show(role)}"
            f"{'' if 'role' in message else nearest('role', map(str, message))}"
        )
    if content is None:
        if message.get("tool_calls") or any(key in message for key in _REASONING):
            return  # an assistant that only calls tools says nothing
        raise TokenizerError(
            f"message {index} ({role}) needs a 'content'{nearest('content', map(str, message))}"
        )
    if isinstance(content, str):
        return
    if not isinstance(content, (list, tuple)) or not all(isinstance(part, (str, dict)) for part in content):
        raise TokenizerError(
            f"message {index} ({role}): 'content' must be a string or a list of parts "
            f"like {{'type': 'text', 'text': ...}}, not {show(content)}"
        )


def _mark_final(message: dict[str, Any], field: str, source: str) -> str:
    """Ends the final message with a mark that shows where to cut; the text before the mark."""
    final = message.get(field)
    if final is None:
        raise TokenizerError(f"continue_final_message: the final message has no {field!r} to continue")
    fields = [name for name in _REASONING if message.get(name) == final] if field in _REASONING else [field]
    if not any(name in source for name in fields):
        raise TokenizerError(f"continue_final_message: the chat template never reads {field!r}")
    if isinstance(final, str):
        for name in fields:
            message[name] = final + _CONTINUE
        return final
    for part in reversed(final if isinstance(final, (list, tuple)) else ()):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            final = part["text"]
            part["text"] = final + _CONTINUE
            return final
    raise TokenizerError("continue_final_message: the final message has no text part to continue")


def _cut_final(text: str, ending: str, field: str) -> str:
    place = text.rfind(_CONTINUE.strip())
    if place < 0 or ending.strip() not in text:
        raise TokenizerError(
            f"continue_final_message: the chat template does not print the final message's {field!r} as it "
            "is, so its end can't be found; use add_generation_prompt=True instead"
        )
    exact = text.startswith(_CONTINUE, place)
    return text[:place] if exact else text[:place].rstrip()


def _sequence(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise TokenizerError(f"{name} must be a list, not {show(value)}")
    return value


def _tool(tool: Any) -> dict[str, Any]:
    if isinstance(tool, Mapping):
        return dict(tool)
    if callable(tool):
        return tool_schema(tool)
    raise TokenizerError(f"a tool is a JSON schema (a dict) or a function with type hints; got {show(tool)}")


def _documents(documents: Any) -> list[dict[str, Any]]:
    for document in _sequence("documents", documents):
        if not isinstance(document, Mapping):
            raise TokenizerError(f"a document is a dict with 'title' and 'text'; got {show(document)}")
    return [plain(document) for document in documents]
