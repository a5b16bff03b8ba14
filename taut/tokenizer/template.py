"""Runs an untrusted Jinja chat template inside bounds on time, memory and output.

A chat template comes with a checkpoint, so it is code written by a stranger. It can't be stopped from
outside once it runs (a thread can't be killed, and a process per message is too slow), therefore every
operation that costs something goes through a `Budget` from inside:

* The sandbox of Jinja keeps templates away from Python's internals; on top of it only named methods of
  strings, lists and dicts can be reached.
* Every loop iteration, call, filter, test, comparison, arithmetic operator and output counts as a step,
  and a step looks at the clock. What runs between two steps is one operation on values of bounded size.
* A value that a template makes (string, list, dict) is measured when it is made, with shared parts
  counted each time they appear, so no value can be exponential to print or compare. Operations whose
  result is larger than their operands (`*`, `**`, `%`, `replace`, `join`, widths) are checked before
  they run. All values together are bounded too.

All bounds grow with the input, so that a long conversation is never refused for its length.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from types import CodeType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.tests import TESTS
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from taut.errors import TokenizerError

MAX_SOURCE = 256 * 1024  # characters of a template; the largest in use have about 40 thousand
ITEM = 16  # the size of one item of a list or dict, where a character has size 1
MAX_WIDTH = 1000  # columns that padding, indentation and number formatting may ask for


@dataclass(frozen=True)
class Limits:
    """What one rendering may use before it is stopped, for an empty input.

    `seconds` of wall time; `steps` (loop iterations, calls, operators); `value`, the size of one value
    and of the output; `total`, the size of all values made. Sizes are in characters; an item of a list
    or dict counts as ITEM of them.
    """

    seconds: float = 5.0
    steps: int = 2_000_000
    value: int = 1 << 22
    total: int = 1 << 26


class OverLimitError(jinja2.TemplateError):
    """The template asked for more time or memory than its limits allow."""


class Budget:
    """What is left of the limits of one rendering; raises OverLimitError when nothing is."""

    def __init__(self, limits: Limits, inputs: Any = None):
        size = _weigh(inputs, None)
        self._limits = limits
        self._steps = limits.steps + 4 * size
        self._deadline = time.monotonic() + limits.seconds
        self._value = limits.value + 8 * size
        self._total = limits.total + 256 * size

    def step(self) -> None:
        self._steps -= 1
        if self._steps < 0:
            raise OverLimitError(f"it takes more than {self._limits.steps} steps")
        if time.monotonic() > self._deadline:
            raise OverLimitError(f"it runs longer than {self._limits.seconds:g} seconds")

    def fits(self, size: int) -> None:
        """Refuses a value of that size before it is made."""
        if size > self._value:
            raise OverLimitError(f"it makes a value of more than {self._value} characters")

    def charge(self, size: int) -> None:
        """Counts a value of that size, which was made."""
        self.fits(size)
        self._total -= size
        if self._total < 0:
            raise OverLimitError("the values it makes take too much memory")

    def size(self, value: Any) -> int:
        """The size of `value`; anything larger than a value may be has one size."""
        return len(value) if isinstance(value, str) else _weigh(value, self._value)

    def own(self, value: Any) -> Any:
        """`value`, measured and counted."""
        self.charge(self.size(value))
        return value


_VIEWS = (type({}.keys()), type({}.values()), type({}.items()))


def _weigh(value: Any, limit: int | None) -> int:
    """The size of `value` with everything it contains: one for a character and ITEM for anything else, a
    shared part counted as often as it appears. Stops counting beyond `limit`."""
    size, stack = 0, [value]
    while stack:
        item = stack.pop()
        size += ITEM
        if isinstance(item, (str, bytes)):
            size += len(item)
        elif isinstance(item, dict):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset, *_VIEWS)):
            stack.extend(item)
        if limit is not None and size + ITEM * len(stack) > limit:
            return limit + 1
    return size


class _Counted:
    """What a `for` goes over: each iteration is a step."""

    def __init__(self, iterable: Iterable[Any], budget: Budget):
        self._iterable, self._budget = iterable, budget

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable:
            self._budget.step()
            yield item

    def __len__(self) -> int:
        return len(self._iterable)  # type: ignore[arg-type]  # a TypeError tells Jinja to count itself


class _Guard(NodeTransformer):
    """Passes everything that could cost much through the filters `_loop`, `_own`, `_step`, `_slice` and
    `_concat` of the environment below."""

    def _through(self, name: str, node: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        node = self.generic_visit(node)
        node.iter = self._through("_loop", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        node = self.generic_visit(node)
        return self._through("_concat", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        return self._through("_step", self.generic_visit(node))

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._through("_own", self.generic_visit(node))

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        node = self.generic_visit(node)
        return self._through("_own", node) if node.ctx == "load" else node

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        packed = node.ctx == "load" and node.name in ("varargs", "kwargs")  # a tuple or dict that a call made
        return self._through("_own", node) if packed else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        node = self.generic_visit(node)
        return self._through("_slice", node) if isinstance(node.arg, nodes.Slice) else node


class _Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}` around what the assistant wrote; notes its place."""

    tags = frozenset({"generation"})

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        self.spans: list[tuple[int, int]] = []
        self.written = 0  # characters of output so far

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("note"), [], [], body).set_lineno(line)

    def note(self, caller: Callable[[], str]) -> str:
        text = caller()
        self.spans.append((self.written, self.written + len(text)))
        return text


class _Namespace(Namespace):
    """Jinja's `namespace()`, without names that start with an underscore. It prints as a constant: two
    that hold one another would print for ever."""

    def __init__(*args: Any, **kwargs: Any):
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _check_attribute(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace can't hold {name!r}")


_STR_METHODS = frozenset(
    [
        "capitalize",
        "casefold",
        "center",
        "count",
        "endswith",
        "expandtabs",
        "find",
        "format",
        "format_map",
        "index",
        "isalnum",
        "isalpha",
        "isascii",
        "isdecimal",
        "isdigit",
        "isidentifier",
        "islower",
        "isnumeric",
        "isprintable",
        "isspace",
        "istitle",
        "isupper",
        "join",
        "ljust",
        "lower",
        "lstrip",
        "partition",
        "removeprefix",
        "removesuffix",
        "replace",
        "rfind",
        "rindex",
        "rjust",
        "rpartition",
        "rsplit",
        "rstrip",
        "split",
        "splitlines",
        "startswith",
        "strip",
        "swapcase",
        "title",
        "upper",
        "zfill",
    ]
)
_METHODS: tuple[tuple[type | tuple[type, ...], frozenset[str]], ...] = (
    (str, _STR_METHODS),
    (dict, frozenset({"get", "items", "keys", "values"})),
    ((list, tuple), frozenset({"copy", "count", "index"})),
    ((bytes, bytearray, int, float, complex, range, set, frozenset, *_VIEWS), frozenset()),
)
_REMOVED_FILTERS = frozenset({"pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr"})
_SAME_VALUE_FILTERS = frozenset(
    {"attr", "d", "default", "first", "last", "max", "min"}
)  # nothing new is made
_WIDTH_FILTERS = frozenset({"batch", "center", "indent", "round", "slice"})


class _Formatter(SandboxedFormatter):
    """`str.format` that refuses wide columns and counts each field."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        _check_widths(format_spec)
        return self._env.budget.own(super().format_field(value, format_spec))


def _check_widths(text: str) -> None:
    for number in re.findall(r"\d+", text):
        if len(number) > 6 or int(number) > MAX_WIDTH:
            raise OverLimitError(f"it formats to a width of {number[:12]}; at most {MAX_WIDTH}")


def _check_percent(budget: Budget, text: str, values: Any) -> None:
    budget.fits(len(text) + text.count("%") * budget.size(values))
    for conversion in re.findall(r"%(?:\([^)]*\))?[-#0 +]*([\d.*]*)", text):
        if "*" in conversion:
            raise OverLimitError("it formats to a width that it computes")
        _check_widths(conversion)


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_WIDTH:
            raise OverLimitError(f"it formats to a width of {value:.3g}; at most {MAX_WIDTH}")


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, budget: Budget):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            finalize=_print,
            cache_size=0,
            optimized=False,
        )
        self.budget = budget
        self.filters = {name: _filter(name, f) for name, f in FILTERS.items() if name not in _REMOVED_FILTERS}
        self.filters["tojson"] = _filter("tojson", partial(_to_json, budget))
        self.filters["_loop"] = _internal(lambda value: _Counted(value, budget))
        self.filters["_own"] = _internal(budget.own)
        self.filters["_step"] = _internal(lambda value: value)
        self.filters["_slice"] = _internal(self._sliced)
        self.filters["_concat"] = _internal(self._joined)
        self.tests = {name: _filter(name, f) for name, f in TESTS.items()}
        del self.globals["lipsum"]
        self.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = _now

    @property
    def generation(self) -> _Generation:
        return self.extensions[_Generation.identifier]  # type: ignore[return-value]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Guard().visit(super()._parse(source, name, filename))

    def _load_template(self, name: Any, globals: Any) -> Any:
        raise jinja2.TemplateError("include, import and extends are not available in a chat template")

    def concat(self, pieces: Iterable[str]) -> str:  # type: ignore[override]
        pieces = list(pieces)
        size = sum(map(len, pieces))
        self.budget.charge(size)
        return "".join(pieces)

    def _joined(self, parts: list[Any]) -> str:
        return self.concat([part if type(part) is str else self.budget.own(str(part)) for part in parts])

    def _sliced(self, value: Any) -> Any:
        if isinstance(value, (str, list, tuple)):
            self.budget.charge(len(value) * (1 if isinstance(value, str) else ITEM))
        return value

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, methods in _METHODS:
            if isinstance(obj, kind):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        text, mapped = value.__self__, value.__name__ == "format_map"

        def bounded(*args: Any, **kwargs: Any) -> str:
            return _Formatter(self).vformat(text, () if mapped else args, args[0] if mapped else kwargs)

        return bounded

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = __self.budget
        budget.step()
        if isinstance(__obj, LoopContext) and args:  # `loop(children)` of a recursive loop
            args = (_Counted(args[0], budget), *args[1:])
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            args = _check_str_method(budget, owner, __obj.__name__, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        same = isinstance(owner, dict)  # what it returns, the dict has
        return result if same else budget.own(result)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = self.budget
        budget.step()
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, (str, bytes, list, tuple)) and isinstance(times, int):
                    budget.fits(len(many) * max(times, 0) * (1 if isinstance(many, (str, bytes)) else ITEM))
        if operator == "%" and isinstance(left, str):
            _check_percent(budget, left, right)
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = (
                left.bit_length() * max(right, 1)
                if operator == "**"
                else left.bit_length() + right.bit_length()
            )
            if bits > 4096:
                raise OverLimitError(f"it makes a number of {bits} bits")
        return budget.own(super().call_binop(context, operator, left, right))


def _check_str_method(budget: Budget, text: str, name: str, args: tuple, kwargs: dict) -> tuple:
    """Refuses a method call whose result would be too large; the arguments to call it with."""
    if name == "join" and args:
        args = (list(args[0]), *args[1:])
        _check_join(budget, text, args[0])
    elif name == "replace" and len(args) >= 2:
        _check_replace(budget, text, args[0], args[1])
    elif name in ("center", "expandtabs", "ljust", "rjust", "zfill"):
        _check_numbers((*args, *kwargs.values()))
        budget.fits(len(text) + MAX_WIDTH * (1 + text.count("\t")))
    elif name.endswith("strip") and args:
        _check_strip(args[0])
    return args


def _check_join(budget: Budget, separator: str, parts: list) -> None:
    budget.fits(len(separator) * len(parts) + budget.size(parts))


def _check_replace(budget: Budget, text: str, old: Any, new: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        budget.fits(len(text) + text.count(old) * len(new))


def _check_strip(characters: Any) -> None:
    if isinstance(characters, str) and len(characters) > 256:
        raise OverLimitError(f"it strips a set of {len(characters)} characters; at most 256")


def _check_filter(budget: Budget, name: str, value: Any, args: tuple, kwargs: dict) -> Any:
    """Refuses a filter whose result would be too large; the value to filter."""
    options = (*args, *kwargs.values())
    if name in _WIDTH_FILTERS:
        _check_numbers(options)
        widest = max(
            (
                len(option) if isinstance(option, str) else abs(option)
                for option in options
                if isinstance(option, (int, str))
            ),
            default=4,
        )
        if name == "indent" and isinstance(value, str):
            budget.fits(len(value) + (1 + value.count("\n")) * widest)
    elif name == "format" and isinstance(value, str):
        _check_percent(budget, value, (*args, kwargs))
    elif name == "join":
        value = list(value)
        separator = next((option for option in options if isinstance(option, str)), "")
        _check_join(budget, separator, value)
    elif name == "replace" and len(options) >= 2:
        _check_replace(budget, str(value), options[0], options[1])
    elif name == "trim" and options:
        _check_strip(options[0])
    elif name == "sum" and any(isinstance(option, (list, tuple)) for option in options):
        raise OverLimitError("it sums lists; only numbers can be summed")
    elif name == "tojson":
        _check_numbers(options)
        for option in options:
            if _weigh(option, MAX_WIDTH) > 128:
                raise OverLimitError("it asks for a JSON separator or indentation that is too long")
    return value


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test of Jinja that counts as a step and whose result is bounded. As it asks for the
    context, Jinja never evaluates it while compiling."""
    wanted = getattr(function, "jinja_pass_arg", None)

    @jinja2.pass_context
    def bounded(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = context.environment.budget
        budget.step()
        value = _check_filter(budget, name, value, args, kwargs)
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        leading = () if wanted is None else (first[wanted.name],)
        result = function(*leading, value, *args, **kwargs)
        return result if name in _SAME_VALUE_FILTERS else budget.own(result)

    return bounded


def _internal(function: Callable[[Any], Any]) -> Callable[..., Any]:
    @jinja2.pass_context
    def stepped(context: Any, value: Any) -> Any:
        context.environment.budget.step()
        return function(value)

    return stepped


@jinja2.pass_context
def _print(context: Any, value: Any) -> str:
    """The text of an output expression; counted, as a list can print longer than it is."""
    budget = context.environment.budget
    budget.step()
    if type(value) is str:
        return value
    return budget.own(str(value))


def _to_json(
    budget: Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which no chat format wants.
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    pieces, size = [], 0
    for piece in encoder.iterencode(value):
        pieces.append(piece)
        size += len(piece)
        budget.fits(size)
    return "".join(pieces)


class _RefusedError(jinja2.TemplateError):
    """The template called `raise_exception`."""


def _raise(message: Any) -> None:
    raise _RefusedError(str(message))


def _now(form: str) -> str:
    if len(form) > 200:
        raise OverLimitError("its date format has more than 200 characters")
    return datetime.now().strftime(form)


def plain(value: Any) -> Any:
    """`value` rebuilt from dicts, lists, tuples, strings, numbers and None, so that a template meets no
    object with methods of its own. What is none of these becomes its type's name, `"<ndarray>"`."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind, base in ((str, str.__str__), (int, int.__int__), (float, float.__float__)):
        if isinstance(value, kind):  # a subclass, such as an enum, whose own __str__ may be another
            return base(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if callable(getattr(value, "model_dump", None)):  # pydantic
        return plain(value.model_dump())
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return plain(value.item())
    return f"<{type(value).__name__}>"


def compile_template(source: str) -> CodeType:
    """Compiles a template; raises TokenizerError with the line where it is malformed."""
    if not isinstance(source, str):
        raise TokenizerError(f"a chat template must be a string, not {type(source).__name__}")
    if len(source) > MAX_SOURCE:
        raise TokenizerError(
            f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are accepted"
        )
    try:
        return _Environment(Budget(Limits())).compile(source)
    except jinja2.TemplateSyntaxError as error:
        raise TokenizerError(
            f"the chat template is malformed in line {error.lineno}: {error.message}"
        ) from error
    except Exception as error:  # whatever a hostile source does to the parser
        raise TokenizerError(f"the chat template can't be compiled: {_describe(error)}") from error


def render_template(
    code: CodeType, variables: Mapping[str, Any], limits: Limits | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """Renders a compiled template with `variables`, which must be plain data (see `plain`).

    Returns the text and the character spans of its `{% generation %}` blocks. Raises TokenizerError when
    the template fails, refuses the input (`raise_exception`) or exceeds `limits`.
    """
    try:
        budget = Budget(limits or Limits(), dict(variables))
        environment = _Environment(budget)
        template = jinja2.Template.from_code(environment, code, environment.make_globals(None))
        generation = environment.generation
        pieces = []
        for piece in template.generate(variables):
            budget.step()
            pieces.append(piece)
            generation.written += len(piece)
            budget.fits(generation.written)
        return "".join(pieces), generation.spans
    except OverLimitError as error:
        raise TokenizerError(
            f"the chat template was stopped: {error}. It may be hostile; pass another with chat_template="
        ) from error
    except _RefusedError as error:
        raise TokenizerError(f"the chat template refuses these messages: {error}") from error
    except Exception as error:  # a template can raise anything: its errors are one error to the caller
        raise TokenizerError(f"the chat template failed: {_describe(error)}") from error


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}".removesuffix(": ")
