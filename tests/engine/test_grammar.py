"""Text that has to be of a form: it is, whoever draws or searches, and rows beside it are as ever."""

from __future__ import annotations

import copy
import json
import re
import sys

import pytest
import torch
import transformers

from taut.engine.drafts import Ledger
from taut.engine.engine import Engine
from taut.engine.grammar import Constraint, GrammarProcessor
from taut.engine.request import Request, SamplingParams
from taut.errors import RequestError
from taut.modeling import CausalLM
from tests.engine import letters as alphabet
from tests.engine.guesses import Always

pytest.importorskip("llguidance")
END, VOCAB = 0, 259
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,5}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["x", "yy"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
JSON = {"type": "json_schema", "schema": {**SCHEMA, "x-guidance": {"whitespace_flexible": False}}}
PROMPTS = [[5, 6, 7], [80, 90], [33] * 9]


@pytest.fixture(scope="module")
def letters():
    return alphabet.letters()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=160,
        eos_token_id=END,
        pad_token_id=1,
        bos_token_id=2,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    return theirs, CausalLM.from_pretrained(str(folder), dtype=torch.float32)


@pytest.fixture(scope="module")
def model(pair):
    return pair[1]


def texts(model, letters, response_format, **options):
    out = model.generate(
        PROMPTS,
        response_format=response_format,
        tokenizer=letters,
        return_dict_in_generate=True,
        **{"max_new_tokens": 100, **options},
    )
    new = out.sequences[:, 9:].tolist()
    return [letters.decode([t for t in row if t > 2]) for row in new], out.finish_reasons


WAYS = {
    "greedy": {},
    "drawn": {"do_sample": True, "num_return_sequences": 3, "seed": 4, "temperature": 3.0},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "looked up": {"prompt_lookup_num_tokens": 6, "max_matching_ngram_size": 1},
    "without an end token": {"eos_token_id": None},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_text_is_of_the_form(model, letters, way, monkeypatch):
    monkeypatch.setattr(Ledger, "affords", Always.affords)
    found, reasons = texts(model, letters, JSON, **WAYS[way])
    for text in found:
        value = json.loads(text)
        assert set(value) == {"name", "age", "tags"} and re.fullmatch("[a-z]{1,5}", value["name"])
        assert 0 <= value["age"] <= 150 and set(value["tags"]) <= {"x", "yy"}
    assert set(reasons) == {"stop"}
    for form, pattern in (
        ({"type": "regex", "regex": r"(ab|cd){2,4}[0-9]!"}, r"(ab|cd){2,4}[0-9]!"),
        ({"type": "grammar", "grammar": 'start: "(" (start | WORD) ")"\nWORD: /[a-c]{1,3}/'}, None),
        ({"type": "grammar", "grammar": 'root ::= "yes" | "no" [0-9]', "syntax": "gbnf"}, r"yes|no[0-9]"),
    ):
        found, reasons = texts(model, letters, form, **WAYS[way])
        for text, reason in zip(found, reasons, strict=True):
            if pattern is None and reason == "length":
                continue  # nested without end
            depth = f"{{{text.count('(')}}}"
            assert re.fullmatch(pattern or rf"\({depth}[a-c]{{1,3}}\){depth}", text), text


def test_an_object_is_any(model, letters):
    found, reasons = texts(model, letters, {"type": "json_object"}, max_new_tokens=60, do_sample=True, seed=1)
    for text, reason in zip(found, reasons, strict=True):
        assert text.lstrip().startswith("{")
        if reason == "stop":
            assert isinstance(json.loads(text), dict)


def test_where_a_text_may_go_on_its_end_is_drawn(model, letters):
    options = {
        "do_sample": True,
        "num_return_sequences": 20,
        "seed": 2,
        "temperature": 5.0,
        "max_new_tokens": 30,
    }
    found, reasons = texts(model, letters, {"type": "regex", "regex": "a+"}, **options)
    assert all(set(text) == {"a"} for text in found) and len({len(text) for text in found}) > 2
    assert "stop" in reasons


def test_as_a_logits_processor_here_and_in_transformers(pair, letters):
    theirs, model = pair
    options = {"max_new_tokens": 60, "do_sample": False}
    for prompt in PROMPTS:
        row = model.generate([prompt], response_format=JSON, tokenizer=letters, **options)
        own = model.generate([prompt], logits_processor=[GrammarProcessor(letters, JSON)], **options)
        other = theirs.generate(
            torch.tensor([prompt]),
            logits_processor=transformers.LogitsProcessorList([GrammarProcessor(letters, JSON)]),
            **options,
        )
        text = letters.decode(row[0, len(prompt) :].tolist())
        assert json.loads(text)
        assert own.tolist() == other.tolist() and own[0, -1] == END
        assert own[0, :-1].tolist() == row[0].tolist()  # which needs no end token to end
    with pytest.raises(RequestError, match="follows the prompt that it was first called with"):
        model.generate(PROMPTS, logits_processor=[GrammarProcessor(letters, JSON)], **options)


def test_neighbours_are_as_ever(model, letters):
    def asked(constraint: bool) -> Request:
        made = Constraint(letters, JSON, vocab=VOCAB, ends=(END,)) if constraint else None
        return Request([5, 6, 7], SamplingParams(60, eos_token_ids=(END,)), constraint=made)

    alone, plain = asked(True), asked(False)
    Engine(model, cache_tokens=1024).run([alone])
    Engine(model, cache_tokens=1024).run([plain])
    e = Engine(model, cache_tokens=160)
    rows = [asked(True), asked(False), asked(True)]
    e.run(rows)
    assert [row.output for row in rows] == [alone.output, plain.output, alone.output]
    whole = "".join(model.stream([[5, 6, 7]], response_format=JSON, tokenizer=letters, max_new_tokens=60))
    assert whole == letters.decode(alone.output) and whole.startswith('{"name":"')


def test_a_text_that_leads_nowhere_ends_its_request_alone(model):
    """`ax` where there is no x: seen once the a is there."""
    few = alphabet.letters("abc")
    dead = Constraint(few, {"type": "regex", "regex": "ax|aax"}, vocab=VOCAB)
    bad = Request([5], SamplingParams(9), constraint=dead)
    good = Request([5], SamplingParams(9))
    Engine(model, cache_tokens=160).run([bad, good])
    assert isinstance(bad.error, RequestError) and "goes on with such a text" in str(bad.error)
    assert good.finish_reason == "length"


def test_forced_tokens_are_guessed(model, letters, monkeypatch):
    monkeypatch.setattr(Ledger, "affords", Always.affords)
    calls = []
    watched = copy.deepcopy(model)
    watched.model.layers[0].register_forward_hook(lambda _m, given, _out: calls.append(given[0].shape[0]))
    schema = {"type": "object", "properties": {"a_long_name_of_a_property": {"type": "boolean"}}}
    schema |= {"required": ["a_long_name_of_a_property"], "additionalProperties": False}
    form = {"type": "json_schema", "schema": {**schema, "x-guidance": {"whitespace_flexible": False}}}
    (text, *_), _ = texts(watched, letters, form)
    assert json.loads(text)["a_long_name_of_a_property"] in (True, False)
    assert len(calls) < 12 < len(text)


def test_a_copy_of_the_tokenizer_takes_nothing_along(letters):
    Constraint(letters, JSON, vocab=VOCAB)
    assert letters.made_of_it and copy.deepcopy(letters).made_of_it == {}


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("json", r"response_format is 'json'; expected a dict whose 'type' is one of: 'text'"),
        ({"type": "yaml"}, r"response_format is 'yaml'"),
        ({"type": "json_schema"}, r"the schema is None; expected a JSON schema"),
        ({"type": "json_schema", "schema": "{"}, r"the schema is not JSON"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}, r"Invalid type: strin"),
        ({"type": "json_schema", "schema": False}, r"compiled: Unsatisfiable schema: schema is false"),
        (
            {"type": "json_schema", "schema": {"type": "string", "minLength": 5, "maxLength": 2}},
            r"Unsatisfiable schema: minLength \(5\) is greater than maxLength \(2\)",
        ),
        ({"type": "json_schema", "schema": {"if": {"type": "object"}}}, r"Unimplemented keys"),
        ({"type": "regex"}, r"of type 'regex' needs a text 'regex', not None"),
        ({"type": "regex", "regex": "(a"}, r"unclosed group"),
        ({"type": "grammar", "grammar": 'start: "x" foo'}, r'unknown name: "foo"'),
        ({"type": "grammar", "grammar": "x", "syntax": "ebnf"}, r"syntax is 'ebnf'; known: lark, gbnf"),
    ],
)  # fmt: skip
def test_forms_that_cannot_be_are_named_before_the_first_step(model, letters, form, message):
    with pytest.raises(RequestError, match=message):
        model.generate(PROMPTS, response_format=form, tokenizer=letters, max_new_tokens=5)


def test_what_is_missing_is_named(model, letters, monkeypatch):
    with pytest.raises(RequestError, match=r"response_format is about text\. Next step: pass tokenizer="):
        model.generate(PROMPTS, response_format=JSON, max_new_tokens=5)
    with pytest.raises(RequestError, match="tokenizer is a str; expected a tokenizer of Taut"):
        model.generate(PROMPTS, response_format=JSON, tokenizer="gpt2", max_new_tokens=5)
    with pytest.raises(
        RequestError, match="no token of the tokenizer goes on with such a text after 0 tokens"
    ):
        few = alphabet.letters("abc")
        Constraint(few, {"type": "regex", "regex": "x"}, vocab=6)
    plain = model.generate(PROMPTS, max_new_tokens=5)
    text = {"type": "text"}
    assert (
        model.generate(PROMPTS, response_format=text, tokenizer=letters, max_new_tokens=5).tolist()
        == plain.tolist()
    )
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"needs llguidance, which is not installed. .* 'taut\[grammar\]'"):
        model.generate(PROMPTS, response_format=JSON, tokenizer=letters, max_new_tokens=5)
