"""Hostile chat templates are stopped: no endless loop, no exhausted memory, no way out of the sandbox."""

from __future__ import annotations

import tracemalloc

import pytest

from taut.errors import TokenizerError
from taut.tokenizer import template as bounds
from taut.tokenizer.template import Limits, compile_template, render_template

MESSAGES = {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": True}
LIMITS = Limits(
    seconds=30, steps=20_000, value=1 << 20, total=1 << 23
)  # what stops is a count, not the clock


def chain(first: str, step: str, last: str = "{{ x }}") -> str:
    return first + step * 60 + last


NS = "{% set ns = namespace(x='aaaaaaaa', v=1) %}"
STOPPED = {
    # loops and calls
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "filtered loop": "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}"
    "{% endfor %}{% endfor %}",
    "loop over a string": "{% for i in 'a' * 99999 %}{% for j in 'a' * 99999 %}{% endfor %}{% endfor %}",
    "lazy loop": "{% for i in range(99999)|map('string') %}{% for j in range(99999)|map('int') %}"
    "{% endfor %}{% endfor %}",
    "select": "{% for i in range(9999) %}{{ range(9999)|select('odd')|list|length }}{% endfor %}",
    "sort": "{% set x = range(999)|list %}{% for i in range(99999) %}{% set y = x|sort %}{% endfor %}",
    "macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "caller": "{% macro f(n) %}{% if n %}{% call f(n - 1) %}{% endcall %}{% call f(n - 1) %}{% endcall %}"
    "{% endif %}{{ caller() }}{% endmacro %}{% call f(60) %}{% endcall %}",
    # growth
    "string times": "{{ 'a' * 10**9 }}",
    "times string": "{{ 10**9 * 'a' }}",
    "list times": "{{ ([0] * 10**8)|length }}",
    "power": "{{ (10 ** 100) ** 100 }}",
    "squares": "{% set ns = namespace(x=10) %}"
    "{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "doubling ~": NS + "{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling +": NS + "{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling join": NS + "{% for i in range(99) %}{% set ns.x = [ns.x, ns.x]|join %}{% endfor %}",
    "doubling format": NS + "{% for i in range(99) %}{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}",
    "doubling percent": NS + "{% for i in range(99) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "doubling replace": NS + "{% for i in range(99) %}{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
    "unrolled ~": chain("{% set x = 'aaaaaaaa' %}", "{% set x = x ~ x %}"),
    "unrolled block": chain("{% set x = 'aaaaaaaa' %}", "{% set x %}{{ x }}{{ x }}{% endset %}"),
    "nested lists": chain("{% set x = [1] %}", "{% set x = [x, x] %}"),
    "nested tuples": chain("{% set x = (1,) %}", "{% set x = (x, x) %}", "{{ x == x }}"),
    "nested dicts": chain("{% set x = {} %}", "{% set x = {'a': x, 'b': x} %}", "{{ x|tojson }}"),
    "nested calls": chain("{% set x = 1 %}", "{% set x = dict(a=x, b=x) %}"),
    "nested views": chain("{% set x = {} %}", "{% set x = {'a': x, 'b': x}.items() %}"),
    "nested sums": chain("{% set x = [1] %}", "{% set x = [x] + [x] %}"),
    "nested varargs": chain(
        NS + "{% macro f(n) %}{% set n.v = varargs %}{% endmacro %}", "{{ f(ns, ns.v, ns.v) }}"
    ),
    "nested kwargs": chain(
        NS + "{% macro f(n) %}{% set n.v = kwargs %}{% endmacro %}", "{{ f(ns, a=ns.v, b=ns.v) }}"
    ),
    "output": "{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
    "printed parts": "{% set x = range(9999)|list %}{% set y = x" + " ~ x" * 999 + " %}",
    "fields": "{% set x = range(9999)|list %}{% set y = ('{0}' * 999).format(x) %}",
    "named percent": "{% set y = ('%(a)s' * 9999) % {'a': 'a' * 9999} %}",
    "named format": "{% set y = ('%(a)s' * 9999)|format(a='a' * 9999) %}",
    "joined lists": "{% set x = range(9999)|list %}"
    "{% set y = range(9999)|map(attribute='a', default=x)|join %}",
    "printed lists": "{% set x = range(9999)|list %}{% set y %}" + "{{ x }}" * 999 + "{% endset %}",
    "slices": "{% set x = range(9999)|list %}" + "{% if x[1:] %}{% endif %}" * 999,
    # one operation whose result is large
    "center": "{{ 'a'|center(10**9) }}",
    "constant center": "{{ 'a'|center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ 'a\t'.expandtabs(10**9) }}",
    "format width": "{{ '{:>1000000000}'.format('a') }}",
    "computed width": "{{ '{:>{}}'.format('a', 10**9) }}",
    "format_map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent precision": "{{ '%.1000000000f' % 1.5 }}",
    "computed percent": "{{ '%*d' % (10**9, 1) }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "replace": "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
    "replace filter": "{{ ('a' * 9999)|replace('a', 'b' * 9999) }}",
    "replace nothing": "{{ ('a' * 9999).replace('', 'b' * 9999) }}",
    "join": "{{ ('a' * 9999).join('b' * 9999) }}",
    "join filter": "{{ ('b' * 9999)|join('a' * 9999) }}",
    "joined by name": "{{ ('b' * 9999)|join(d='a' * 9999) }}",
    "indent": "{{ ('\n' * 9999)|indent(1000) }}",
    "indent text": "{{ ('\n' * 9999)|indent('a' * 9999) }}",
    "wide indent": "{{ 'a'|indent(10**9) }}",
    "slice filter": "{{ [1]|slice(10**9)|list }}",
    "batch": "{{ [1]|batch(10**9, 0)|list }}",
    "JSON indent": "{{ [1]|tojson(indent=10**9) }}",
    "JSON separator": "{{ ([1] * 9999)|tojson(separators=('a' * 9999, ':')) }}",
    "deep JSON": "{% set ns = namespace(x=[1]) %}{% for i in range(400) %}{% set ns.x = [ns.x] + [1] * 9 %}"
    "{% endfor %}{{ ns.x|tojson(indent=100) }}",
    "round": "{{ 1.5|round(10**9, 'ceil') }}",
    "sum": "{{ [[1]]|sum(start=[]) }}",
    "strip": "{{ ('a' * 9999).strip('b' * 9999) }}",
    "trim": "{{ ('a' * 9999)|trim('b' * 9999) }}",
    "date": "{{ strftime_now('%Y' * 9999) }}",
}  # fmt: skip

FAILING = {
    "range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "endless macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "endless block": ("{% block a %}{{ self.a() }}{% endblock %}", "RecursionError"),
    "endless loop": ("{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}", "RecursionError"),
    "deep value": (
        "{% set ns = namespace(x=[]) %}{% for i in range(2000) %}{% set ns.x = [ns.x] %}{% endfor %}"
        "{{ ns.x }}",
        "RecursionError|memory",
    ),
    "include": ("{% include '/etc/passwd' %}", "not available"),
    "import": ("{% import '/etc/passwd' as x %}", "not available"),
    "extends": ("{% extends '/etc/passwd' %}", "not available"),
    "class": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "item": ("{{ ''['__class__']['__mro__'] }}", "unsafe"),
    "attr filter": ("{{ (''|attr('__class__')).__mro__ }}", "unsafe"),
    "map attribute": ("{{ (['']|map(attribute='__class__')|list)[0].x }}", "unsafe"),
    "format field": ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe"),
    "format_map field": ("{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}", "unsafe"),
    "stored format": ("{% set f = '{0.__class__.__mro__}'.format %}{{ f(1) }}", "unsafe"),
    "cycler": ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    "namespace": ("{{ namespace.__init__.__globals__ }}", "unsafe"),
    "namespace attribute": ("{% set x = namespace() %}{% set x.__class__ = 1 %}", "can't hold"),
    "namespace names": ("{% set x = namespace(_a=1) %}", "can't hold"),
    "function": ("{{ raise_exception.__globals__.os }}", "unsafe"),
    "dict function": ("{{ dict.__globals__.os }}", "unsafe"),
    "generator": ("{{ (messages|map('upper')).gi_frame.f_globals }}", "unsafe"),
    "loop": ("{% for x in [1] %}{{ loop._iterator.x }}{% endfor %}", "unsafe"),
    "self": ("{{ self._TemplateReference__context.environment }}", "unsafe"),
    "changing a list": ("{{ messages.append(1) }}", "unsafe"),
    "changing a dict": ("{{ messages[0].update({'role': 'system'}) }}", "unsafe"),
    "bytes": ("{{ 'a'.encode('idna') }}", "unsafe"),
    "int": ("{{ (1).to_bytes(10**9, 'big') }}", "unsafe"),
    "lipsum": ("{{ lipsum(n=10**6) }}", "undefined"),
    "own filter": ("{{ range(9)|_loop }}{{ 1 / 0 }}", "ZeroDivisionError"),
    "namespaces in each other": (
        chain("{% set x = namespace() %}", "{% set x = namespace(a=x, b=x) %}") + "{{ 1 / 0 }}",
        "ZeroDivisionError",
    ),
    "a namespace in itself": (
        "{% set n = namespace() %}{% set n.a = n %}{% set n.b = [n] %}{{ n }}{{ n.b }}{{ 1 / 0 }}",
        "ZeroDivisionError",
    ),
}  # fmt: skip

MALFORMED = {
    "brackets": ("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}", "RecursionError"),
    "lists": ("{{ " + "[" * 50_000 + "]" * 50_000 + " }}", "RecursionError"),
    "minus": ("{{ " + "-" * 100_000 + "1 }}", "RecursionError"),
    "sum": ("{{ 1" + "+1" * 50_000 + " }}", "RecursionError"),
    "blocks": ("{% for a in x %}" * 50 + "{% endfor %}" * 50, "too many statically nested blocks"),
    "length": ("a" * (bounds.MAX_SOURCE + 1), "has 262145 characters; at most 262144"),
    "open block": ("{% for x in y %}", "malformed in line 1"),
    "open string": ("\n{{ 'a", "malformed in line 2"),
    "open comment": ("{#" * 1000, "malformed in line 1"),
    "unknown tag": ("{% do x %}", "unknown tag 'do'"),
    "removed filter": ("{{ messages|pprint }}", "No filter named 'pprint'"),
}


def render(source: str, limits: Limits = LIMITS) -> str:
    return render_template(compile_template(source), MESSAGES, limits)[0]


@pytest.mark.parametrize("source", STOPPED.values(), ids=STOPPED)
def test_stopped(source: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TokenizerError, match=r"the chat template was stopped: .*It may be hostile"):
            render(source)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("source", "message"), FAILING.values(), ids=FAILING)
def test_failing(source: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=rf"the chat template (failed|was stopped): .*({message})"):
        render(source)


@pytest.mark.parametrize(("source", "message"), MALFORMED.values(), ids=MALFORMED)
def test_malformed(source: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        compile_template(source)


def test_the_clock_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr(bounds.time, "monotonic", lambda: next(ticks) / 100)
    with pytest.raises(TokenizerError, match="it runs longer than 5 seconds"):
        render("{% for i in range(9999) %}{% endfor %}", Limits())


def test_the_bounds_grow_with_the_input() -> None:
    source = "{% for m in messages %}{% set ns.x = ns.x ~ m.content %}{% endfor %}{{ ns.x }}"
    source = "{% set ns = namespace(x='') %}" + source
    tight = Limits(seconds=30, steps=100, value=100, total=100)
    variables = {"messages": [{"role": "user", "content": "word " * 50}] * 200}
    text, _ = render_template(compile_template(source), variables, tight)
    assert text == "word " * 10_000


def test_a_large_ordinary_chat_fits() -> None:
    source = "{% for m in messages %}{{ '<' + m.role + '>' + m['content'] | trim }}{% endfor %}"
    variables = {"messages": [{"role": "user", "content": "x" * 2000}] * 5000}
    assert len(render_template(compile_template(source), variables)[0]) == 5000 * 2006


def test_one_rendering_leaves_nothing_to_the_next() -> None:
    code = compile_template("{% for i in range(40) %}{% endfor %}{% generation %}a{% endgeneration %}")
    limits = Limits(seconds=30, steps=100)
    for _ in range(5):
        assert render_template(code, {}, limits) == ("a", [(0, 1)])
