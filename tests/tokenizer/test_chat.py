"""Chat templates render what transformers renders, straight to ids."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers

from taut.errors import TokenizerError
from taut.tokenizer import AutoTokenizer, Tokenizer
from taut.tokenizer.tools import tool_schema

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Héllo 😀\n <b>&</b>  "}
ASSISTANT = {"role": "assistant", "content": " Yes. <|im_end|>"}
CHAT = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "Why?"}]
CALLS = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, None, True, 1.5]}}}]},
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "assistant", "reasoning": "hm", "content": "It is 3."},
]  # fmt: skip
PARTS = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}],
    }
]

TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim }}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "turns": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
        {%- set system = messages[0]['content'].strip() + '\n\n' %}{% set rest = messages[1:] %}
    {%- else %}{% set system = '' %}{% set rest = messages %}{% endif %}
    {%- for message in rest %}
        {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
            {{- raise_exception('roles must alternate') }}
        {%- endif %}
        {%- if message['role'] == 'user' %}
            {{- '[INST] ' ~ (system if loop.first else '') ~ message.content ~ ' [/INST]' }}
        {%- else %} {% generation %}{{ message['content']|trim + eos_token }}{% endgeneration %}
        {%- endif %}
    {%- endfor %}""",
    "tools": """{%- if tools %}
{{- '<|im_start|>system\n' }}{{ tools | tojson(indent=2) }}
    {%- for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, multi=true) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi and message.role == "user" and message.content is string %}
        {%- set ns.multi = false %}{% set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- macro show(value, name='x') %}
    {{- '<' + name + '>' }}{{ value if value is string else value|tojson }}</{{ name }}>
{%- endmacro %}
{%- for message in messages %}
    {%- if message.reasoning_content is defined and loop.last %}
        {{- show(message.reasoning_content, 'think') }}
    {%- endif %}
    {%- if message.content is defined %}{{ show(message.content, name=message.role) }}{% endif %}
    {%- for call in message.tool_calls or [] %}
        {%- for key, value in call.function.arguments.items() %}{{ key }}={{ value }};{% endfor %}
    {%- else %}-{% endfor %}
    {%- if loop.index0 > ns.last %}{% continue %}{% endif %}|
{% endfor %}
{%- if documents %}{{ documents|map(attribute='title')|join(', ')|upper }}{% endif %}
{{- strftime_now('%Y')|length }}{{ thinking|default('off') }}{{ dict(a=1)|items|list }}
{{- 'a,b'.split(',')[-1] }}""",
    "filters": "{{ [3, 1, 2]|sort|list }}{{ (1, 2)|sum }}{{ 'x'|replace('x', 'y') }}"
    "{{ '%s-%03d'|format('a', 7) }}{{ 'a{}b{:>4}'.format(1, 'z') }}{{ '%.2f' % 3.14159 }}"
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ 'ab'|center(6) }}{{ 'ab' * 3 }}"
    "{{ messages|map(attribute='role')|unique|join('/') }}{{ [1] + [2] }}{{ 2 ** 10 }}{{ -7 % 3 }}"
    "{{ 'abc'|indent(2, true) }}{{ 7 // 2 }}{{ 'x' in 'xyz' }}{{ {'a': [1, {'b': none}]} }}"
    "{{ 1.5|round|int }}"
    "{{ range(5)|batch(2)|list }}{{ messages|groupby('role')|length }}{{ 'Title case'|title }}"
    "{% for k, v in {'b': 1, 'a': 2}|dictsort %}{{ k }}{{ v }}{{ loop.cycle('+', '-') }}{% endfor %}"
    "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}"
    "{% set t %}a{{ 1 }}{% endset %}{{ t }}{% filter upper %}q{{ t }}{% endfilter %}{{ '<' |e }}"
    "{{ 'a' ~ 1 ~ none }}{{ loop is defined }}{{ 'a-b_c'.partition('-') }}{{ ' x '.strip() ~ 'y'.ljust(3) }}",
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(folders: dict[str, Path]) -> tuple[Tokenizer, Any]:
    folder = folders["byte_level"]
    return AutoTokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


def add(a: int, b: list[float] | None = None, *, how: Literal["fast", "slow"] = "fast") -> str:
    """Adds numbers.

    Nothing more.

    Args:
        a: The first,
            which matters.
        b: The rest (a list): maybe none.
        how: The way (choices: ["fast", "slow"])

    Returns:
        The sum.
    """
    return str(a)


DOCUMENTS = [{"title": "one", "text": "1"}, {"title": "two", "text": "2"}]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [[USER], CHAT, CALLS, PARTS], ids=["one", "chat", "calls", "parts"])
@pytest.mark.parametrize(
    "options",
    [
        {"tokenize": False}, {}, {"add_generation_prompt": True}, {"return_dict": False},
        {"tools": [add, {"type": "function", "function": {"name": "raw é"}}], "documents": DOCUMENTS,
         "tokenize": False, "thinking": True},
        {"return_tensors": "pt"}, {"bos_token": "BOS", "tokenize": False},
        {"truncation": True, "max_length": 9, "padding": "max_length",
         "tokenizer_kwargs": {"padding_side": "left"}},
    ],
    ids=lambda options: "+".join(options) or "defaults",
)  # fmt: skip
def test_rendering(name: str, messages: list, options: dict[str, Any], pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    options = {**options, "chat_template": TEMPLATES[name]}
    try:
        expected = theirs.apply_chat_template(messages, **options)
    except Exception:
        with pytest.raises(TokenizerError, match="chat template"):
            ours.apply_chat_template(messages, **options)
        return
    got = ours.apply_chat_template(messages, **options)
    if isinstance(got, dict):
        assert {k: v.tolist() if hasattr(v, "tolist") else v for k, v in got.items()} == {
            k: v.tolist() if hasattr(v, "tolist") else v for k, v in expected.items()
        }
    elif isinstance(got, torch.Tensor):
        assert got.tolist() == expected.tolist()
    else:
        assert got == expected


def test_every_template_renders_somewhere(pair: tuple[Tokenizer, Any]) -> None:
    for name, messages in {"chatml": CHAT, "turns": CHAT, "tools": CALLS, "filters": CHAT}.items():
        pair[1].apply_chat_template(messages, chat_template=TEMPLATES[name])


def test_batches(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    for options in (
        {},
        {"tokenize": False},
        {"padding": True, "return_tensors": "pt"},
        {"return_dict": False},
    ):
        got = ours.apply_chat_template([CHAT, [USER]], **options)
        expected = theirs.apply_chat_template([CHAT, [USER]], **options)
        if "return_tensors" in options:
            assert got.input_ids.tolist() == expected.input_ids.tolist()
            assert got.attention_mask.tolist() == expected.attention_mask.tolist()
        else:
            assert got == expected


@pytest.mark.parametrize("field", [True, "content", "reasoning_content", "thinking"])
@pytest.mark.parametrize(
    "template",
    [
        TEMPLATES["chatml"].replace(" | trim", ""),
        TEMPLATES["chatml"],
        "{% for m in messages %}{% if m.thinking %}<t>{{ m.thinking }}</t>{% endif %}"
        "{{ m.content }}<end>{% endfor %}",
    ],
)
@pytest.mark.parametrize(
    "content", ["Once upon a", "Once upon a  ", [{"type": "text", "text": "Once"}]], ids=str
)
def test_continuing_the_last_message(
    field: bool | str, template: str, content: Any, pair: tuple[Tokenizer, Any]
) -> None:
    ours, theirs = pair
    messages = [USER, {"role": "assistant", "content": content, "reasoning": "I think that "}]
    options = {"chat_template": template, "continue_final_message": field, "tokenize": False}
    try:
        expected = theirs.apply_chat_template(messages, **options)
    except Exception:
        with pytest.raises(TokenizerError):
            ours.apply_chat_template(messages, **options)
        return
    assert ours.apply_chat_template(messages, **options) == expected


def test_mask_of_what_the_assistant_wrote(pair: tuple[Tokenizer, Any]) -> None:
    messages = [SYSTEM, USER, ASSISTANT, USER, {"role": "assistant", "content": "Well, 世界."}]
    for options in ({}, {"return_tensors": "pt"}, {"truncation": True, "max_length": 90}):
        options = {**options, "chat_template": TEMPLATES["turns"], "return_assistant_tokens_mask": True}
        got, expected = (one.apply_chat_template(messages, **options) for one in pair)
        mask = torch.as_tensor(got.assistant_masks)
        assert mask.tolist() == torch.as_tensor(expected["assistant_masks"]).tolist()
        assert 0 < mask.sum() < mask.numel()
    batch = [
        one.apply_chat_template([messages, messages[:3]], **options | {"return_tensors": None})
        for one in pair
    ]
    assert batch[0].assistant_masks == batch[1]["assistant_masks"]
    # A span that begins with a space, which the offsets of its token leave out: transformers finds nothing.
    template = "{{ messages[0].role }}{% generation %}{{ ' ' + messages[0].content }}{% endgeneration %}!"
    got = pair[0].apply_chat_template([USER], chat_template=template, return_assistant_tokens_mask=True)
    marked = [index for index, mark in zip(got.input_ids, got.assistant_masks, strict=True) if mark]
    assert pair[0].decode(marked) == " " + USER["content"]


def test_bos_is_never_doubled(folders: dict[str, Path]) -> None:
    ours = AutoTokenizer.from_pretrained(
        folders["llama"], chat_template="{{ bos_token }}{{ messages[0].content }}"
    )
    ids = ours.apply_chat_template([{"role": "user", "content": "the"}])["input_ids"]
    assert ids.count(ours.bos_token_id) == 1
    assert ids[0] == ours.bos_token_id


def test_messages_of_other_types(pair: tuple[Tokenizer, Any]) -> None:
    @dataclass
    class Message:
        role: str
        content: str

    class Role(str, enum.Enum):
        user = "user"

    class Conversation:
        messages = (USER,)

    ours, _ = pair
    expected = ours.apply_chat_template([USER])
    assert ours.apply_chat_template(({"role": Role.user, "content": USER["content"]},)) == expected
    assert ours.apply_chat_template(Conversation()) == expected
    assert ours.apply_chat_template([Message("user", USER["content"])]) == expected
    given = [{"role": "user", "content": "x", "tool_calls": None}]
    ours.apply_chat_template(given, continue_final_message=True)
    assert given == [{"role": "user", "content": "x", "tool_calls": None}]  # the caller's messages stay
    assert ours.apply_chat_template([{**USER, "image": object()}]) == expected


SOURCES: list[tuple[dict[str, str], Any]] = [
    ({}, None),
    ({"tokenizer_config.json": json.dumps({"chat_template": "config"})}, "config"),
    ({"tokenizer_config.json": json.dumps({"chat_template": [
        {"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]})},
     {"default": "a", "tool_use": "b"}),
    ({"chat_template.jinja": "file"}, "file"),
    ({"chat_template.jinja": "file", "tokenizer_config.json": json.dumps({"chat_template": "config"})},
     "file"),
    ({"chat_template.jinja": "a", "additional_chat_templates/rag.jinja": "b"}, {"default": "a", "rag": "b"}),
    ({"additional_chat_templates/rag.jinja": "b"}, {"rag": "b"}),
]  # fmt: skip


@pytest.mark.parametrize(("files", "template"), SOURCES)
def test_sources(files: dict[str, str], template: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folders["no_pad"] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    ours, theirs = (
        AutoTokenizer.from_pretrained(tmp_path),
        transformers.AutoTokenizer.from_pretrained(tmp_path),
    )
    assert ours.chat_template == theirs.chat_template == template
    saved = tmp_path / "saved"
    ours.save_pretrained(saved)
    assert transformers.AutoTokenizer.from_pretrained(saved).chat_template == template
    assert AutoTokenizer.from_pretrained(saved).chat_template == template


def test_choice_among_named_templates(pair: tuple[Tokenizer, Any], folders: dict[str, Path]) -> None:
    ours = AutoTokenizer.from_pretrained(
        folders["byte_level"], chat_template={"default": "a", "tool_use": "b", "c": "cc"}
    )
    assert ours.apply_chat_template([USER], tokenize=False) == "a"
    assert ours.apply_chat_template([USER], tools=[add], tokenize=False) == "b"
    assert ours.apply_chat_template([USER], chat_template="c", tokenize=False) == "cc"
    assert ours.apply_chat_template([USER], chat_template="{{ 1 }}", tokenize=False) == "1"
    assert ours.get_chat_template() == "a"
    del ours.chat_template["default"]
    with pytest.raises(
        TokenizerError, match="none called 'default'; pass chat_template= with one of: c, tool_use"
    ):
        ours.apply_chat_template([USER])


class Unit(enum.Enum):
    METRE = "m"
    FOOT = "ft"


def units(
    x: int | str,
    y: Unit,
    z: tuple[int, str] | dict[str, float] | None,
    w: dict,
    v: Any,
    u: Literal[1, "a", None],
):
    """Does it.

    Args:
        x: X
        y: Y
        z: Z
        w: W: with colon
        v: V
        u: U
    """


def nothing() -> None:
    """Nothing at all."""


@pytest.mark.parametrize("function", [add, units, nothing])
def test_schema_of_a_function(function: Callable[..., Any]) -> None:
    assert tool_schema(function) == transformers.utils.get_json_schema(function)


def no_docstring(a: int): ...


def no_hint(a):
    """Text.

    Args:
        a: A
    """


def no_description(a: int):
    """Text."""


def odd_hint(a: object):
    """Text.

    Args:
        a: A
    """


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (no_docstring, "no_docstring: it needs a docstring"),
        (no_hint, "no_hint: argument 'a' needs a type hint"),
        (no_description, "no_description: argument 'a' needs a description under 'Args:'"),
        (odd_hint, "odd_hint: the type hint of 'a', <class 'object'>, has no JSON schema; known: int"),
        ("add", "a tool is a JSON schema .* or a function"),
    ],
)
def test_tools_that_are_none(tool: Any, message: str, pair: tuple[Tokenizer, Any]) -> None:
    with pytest.raises(TokenizerError, match=message):
        pair[0].apply_chat_template([USER], tools=[tool])
    with pytest.raises(TokenizerError, match="tools must be a list"):
        pair[0].apply_chat_template([USER], tools=add)


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "a conversation is a non-empty list of messages"),
        ("hello", "a conversation is a non-empty list of messages, .*got str 'hello'"),
        ([], "a conversation is a non-empty list"),
        ([[]], "a conversation is a non-empty list"),
        (["hello"], r"message 0 must be a dict .* not str 'hello'; a plain prompt is \[{'role': 'user'"),
        ([USER, None], "message 1 must be a dict"),
        ([{"content": "x"}], "message 0 needs a 'role' .*; it has None"),
        ([{"rol": "user", "content": "x"}], "needs a 'role' .*nearest: rol"),
        ([{"role": 1, "content": "x"}], "needs a 'role' .* it has int 1"),
        ([{"role": "user"}], r"message 0 \(user\) needs a 'content'"),
        ([{"role": "user", "content": None}], "needs a 'content'"),
        ([{"role": "user", "contents": "x"}], "needs a 'content'; nearest: contents"),
        ([{"role": "user", "content": 5}], "'content' must be a string or a list of parts .* not int 5"),
        ([{"role": "user", "content": [1]}], "'content' must be a string or a list of parts"),
        ([{"role": "user", "content": "x", "more": LOOP}], "message 0 contains itself"),
    ],
)
def test_messages_that_are_none(messages: Any, message: str, pair: tuple[Tokenizer, Any]) -> None:
    with pytest.raises(TokenizerError, match=message):
        pair[0].apply_chat_template(messages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chat_template": "{% if %}"}, "malformed in line 1"),
        ({"chat_template": "\n\n{{ 1|nope }}"}, "malformed in line 3: No filter named 'nope'"),
        ({"chat_template": "{{ raise_exception('only users') }}"}, "refuses these messages: only users"),
        ({"chat_template": "{{ messages[7].content }}"}, "failed: UndefinedError"),
        ({"chat_template": 5}, "must be a string"),
        ({"documents": ["x"]}, "a document is a dict"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "can't be combined"),
        ({"return_assistant_tokens_mask": True}, "needs a chat template with {% generation %}"),
        (
            {"return_assistant_tokens_mask": True, "tokenize": False},
            "needs tokenize=True and return_dict=True",
        ),
        ({"sanitize_control_tokens": True}, "not supported"),
        ({"x": LOOP}, "can't contain themselves"),
    ],
)
def test_options_that_fail(options: dict[str, Any], message: str, pair: tuple[Tokenizer, Any]) -> None:
    with pytest.raises(TokenizerError, match=message):
        pair[0].apply_chat_template([USER], **options)


def test_no_template(folders: dict[str, Path]) -> None:
    with pytest.raises(
        TokenizerError, match=r"no chat template .*pass chat_template=, set tokenizer.chat_template"
    ):
        AutoTokenizer.from_pretrained(folders["llama"]).apply_chat_template([USER])
