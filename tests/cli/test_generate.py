"""`taut generate` on the default model: text, JSON, standard input, stopping."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable

import pytest
from typer.testing import Result

pytestmark = pytest.mark.usefixtures("smollm")

QUESTION = "What is the capital of France? Answer in one sentence."
FACTS = (
    r"load [\d.]+ s \| prompt (\d+) tokens, [\d.]+ tok/s \| decode (\d+) tokens, [\d.]+ tok/s "
    r"\| peak memory [\d.]+ [MG]B\n"
)


def test_an_answer_and_its_facts(program: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = program("generate", QUESTION, "--max-new-tokens", "40")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert done.stdout.endswith("\n") and "<|im_end|>" not in done.stdout
    assert re.fullmatch(FACTS, done.stderr), done.stderr  # nothing else: no warnings, no bars


def test_json(taut: Callable[..., Result]) -> None:
    result = taut("generate", QUESTION, "--max-new-tokens", "40", "--json", "--dtype", "float32")
    assert result.exit_code == 0 and result.stderr == ""
    found = json.loads(result.stdout)
    assert "Paris" in found["text"]
    assert found["finish_reason"] == "stop"
    assert (found["dtype"], found["device"], found["prompt"]) == ("float32", "cpu", QUESTION)
    assert found["facts"]["new_tokens"] == len(found["token_ids"])
    assert found["facts"]["prompt_tokens"] > 10
    assert all(value > 0 for value in found["facts"].values())


def test_standard_input_is_the_prompt(taut: Callable[..., Result]) -> None:
    from taut.hub import default_model

    options = ("--json", "--max-new-tokens", "5")
    expected = json.loads(taut("generate", QUESTION, *options).stdout)
    for arguments in ((), ("-",), (default_model(), "-")):
        found = json.loads(taut("generate", *arguments, *options, input=QUESTION + "\n").stdout)
        assert (found["prompt"], found["text"]) == (QUESTION, expected["text"])
        assert found["model"] == expected["model"]
    assert expected["finish_reason"] == "length"


def test_raw_and_system_change_the_prompt(taut: Callable[..., Result]) -> None:
    def prompt_tokens(*options: str) -> int:
        result = taut("generate", "The capital of France is", "--json", "--max-new-tokens", "4", *options)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)["facts"]["prompt_tokens"]

    raw = prompt_tokens("--raw")
    assert raw == 5
    assert prompt_tokens() > raw
    assert prompt_tokens("--system", "Be a pirate. " * 20) > prompt_tokens()


def test_stop_text_ends_the_answer_and_is_left_out(taut: Callable[..., Result]) -> None:
    count = ("generate", "--raw", "1, 2, 3, 4, 5, 6,", "--max-new-tokens", "40", "--json")
    free = json.loads(taut(*count).stdout)
    assert ", 9," in free["text"]
    stopped = json.loads(taut(*count, "--stop", "never", "--stop", ", 9,").stdout)
    assert stopped["text"] == free["text"].partition(", 9,")[0]
    assert stopped["finish_reason"] == "stop_string"
    assert len(stopped["token_ids"]) < len(free["token_ids"])


def test_a_seed_repeats_and_another_does_not(taut: Callable[..., Result]) -> None:
    def text(seed: int) -> str:
        options = ("--temperature", "1.5", "--top-k", "0", "--max-new-tokens", "12", "--raw", "--json")
        return json.loads(taut("generate", "Once upon a time", *options, "--seed", str(seed)).stdout)["text"]

    assert text(1) == text(1)
    assert len({text(1), text(2), text(3)}) > 1


def test_a_prompt_beyond_the_context(taut: Callable[..., Result]) -> None:
    result = taut("generate", "--raw", "-", input="word " * 9000)
    assert result.exit_code == 1
    assert re.fullmatch(r"error: [^\n]*context[^\n]*\n", result.stderr), result.stderr


@pytest.mark.parametrize("prompt", [("generate", "--raw", ""), ("generate", "--raw", "-")])
def test_an_empty_prompt(taut: Callable[..., Result], prompt: tuple[str, ...]) -> None:
    result = taut(*prompt)
    assert result.exit_code == 1
    assert re.fullmatch(r"error: [^\n]*empty[^\n]*\n", result.stderr), result.stderr


def test_a_closed_pipe_is_no_error(program: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    import sys

    from tests.cli.conftest import ENVIRONMENT

    command = [sys.executable, "-m", "taut", "generate", "--raw", "1, 2, 3,", "--max-new-tokens", "60"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as child:
        child.stdout.read(1)
        child.stdout.close()
        assert "Traceback" not in child.stderr.read()


def test_an_answer_of_a_form(taut: Callable[..., Result], tmp_path) -> None:
    schema = tmp_path / "schema.json"
    properties = {"city": {"type": "string", "maxLength": 20}}
    schema.write_text(
        json.dumps({"type": "object", "properties": properties, "required": ["city"], "maxProperties": 1})
    )
    result = taut("generate", QUESTION, "--json-schema", str(schema), "--max-new-tokens", "60")
    assert result.exit_code == 0, result.stderr
    assert "Paris" in json.loads(result.stdout)["city"]
    result = taut("generate", QUESTION, "--regex", "[A-Z][a-z]{2,6}")
    assert re.fullmatch("[A-Z][a-z]{2,6}\n", result.stdout)
    for options, message in (
        (("--regex", "("), "response_format can't be compiled"),
        (("--json-schema", str(tmp_path / "none.json")), "No such file"),
        (("--json-schema", str(schema), "--regex", "x"), "--json-schema and --regex each say what"),
    ):
        result = taut("generate", QUESTION, *options)
        assert result.exit_code == 1 and message in result.stderr
