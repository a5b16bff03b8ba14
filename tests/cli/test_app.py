"""Help is complete and cheap, and every error is one line and an exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from taut.cli.app import app

OPTIONS = {
    "generate": "--raw --system --max-new-tokens --temperature --top-p --top-k --min-p --repetition-penalty "
    "--stop --seed --dtype --device --revision --local-files-only --json --debug",
    "chat": "--system --max-new-tokens --temperature --top-p --top-k --min-p --repetition-penalty --stop "
    "--seed --dtype --device --revision --local-files-only --debug",
    "inspect": "--dtype --revision --local-files-only --json --debug",
    "bench": "--model --shape --what --lengths --batches --contexts --new-tokens --logits --dtype --device "
    "--peers --repeats --json --plot --revision --local-files-only --debug",
}


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom taut.cli import main\nsys.argv = ['taut', '--help']\n"
        "try:\n    main()\nexcept SystemExit as done:\n    assert done.code == 0\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'huggingface_hub', 'jinja2', 'gguf'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "generate" in done.stdout
    assert done.stdout.splitlines()[-1] == "HEAVY []"


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_is_there(command: str) -> None:
    import typer

    found = typer.main.get_command(app).commands[command].params
    names = {name for parameter in found for name in parameter.opts}
    assert set(OPTIONS[command].split()) <= names


def test_version(taut: Callable[..., Result]) -> None:
    result = taut("--version")
    assert result.exit_code == 0
    assert re.fullmatch(r"taut \d+\.\d+\.\d+\n", result.stdout)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A folder of things that are not models: `junk.gguf`, `lama/` (an unknown family), `empty/`."""
    (tmp_path / "junk.gguf").write_bytes(b"GGUF" + bytes(range(256)) * 8)
    (tmp_path / "text.gguf").write_text("not a checkpoint")
    (tmp_path / "empty").mkdir()
    (tmp_path / "lama").mkdir()
    (tmp_path / "lama" / "config.json").write_text(json.dumps({"model_type": "lama"}))
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    file = len(header).to_bytes(8, "little") + header + bytes(4)
    (tmp_path / "lama" / "model.safetensors").write_bytes(file)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "cut" / "model.safetensors").write_bytes(file[:-2])
    return tmp_path


# What is asked for, and what the one line must name.
ERRORS = [
    (["inspect", "DIR/nowhere.gguf"], "nowhere.gguf"),
    (["inspect", "DIR/junk.gguf"], "junk.gguf"),
    (["inspect", "DIR/text.gguf"], "text.gguf"),
    (["inspect", "DIR/empty"], "empty"),
    (["inspect", "DIR/lama"], "nearest: llama"),
    (["inspect", "DIR/cut"], "model.safetensors"),
    (["inspect", "--dtype", "int3"], "int3"),
    (["generate", "DIR/nowhere.gguf", "Hi"], "nowhere.gguf"),
    (["generate", "DIR/junk.gguf", "Hi"], "junk.gguf"),
    (["generate", "DIR/lama"], "DIR/lama -"),
    (["generate", "--temperature", "-1", "Hi"], "temperature is -1"),
    (["generate", "--temperature", "nan", "Hi"], "temperature is nan"),
    (["generate", "--top-p", "1.5", "Hi"], "top_p is 1.5"),
    (["generate", "--top-k", "-1", "Hi"], "top_k is -1"),
    (["generate", "--min-p", "2", "Hi"], "min_p is 2"),
    (["generate", "--max-new-tokens", "0", "Hi"], "max_new_tokens is 0"),
    (["generate", "--repetition-penalty", "0", "Hi"], "repetition_penalty is 0"),
    (["generate", "--stop", "", "Hi"], "stop_strings"),
    (["generate", "--raw", "--system", "Be brief.", "Hi"], "--system"),
    (["chat", "DIR/nowhere.gguf"], "nowhere.gguf"),
    (["chat", "--temperature", "-1"], "temperature is -1"),
]


@pytest.mark.parametrize(("arguments", "named"), ERRORS, ids=lambda value: " ".join(value)[:60])
def test_an_error_is_one_line(
    taut: Callable[..., Result], folders: Path, arguments: list[str], named: str
) -> None:
    result = taut(*(argument.replace("DIR", str(folders)) for argument in arguments))
    assert result.exit_code == 1
    assert result.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    assert named.replace("DIR", str(folders)) in result.stderr


def test_debug_shows_the_traceback(program: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    plain = program("inspect", "/nowhere/model.gguf")
    assert (plain.returncode, plain.stdout) == (1, "")
    assert "Traceback" not in plain.stderr
    debug = program("inspect", "/nowhere/model.gguf", "--debug")
    assert debug.returncode == 1
    assert "Traceback" in debug.stderr and "CheckpointError" in debug.stderr


def test_wrong_usage(taut: Callable[..., Result]) -> None:
    assert taut("generate", "--seed", "x", "Hi").exit_code == 2
    assert taut("no-such-command").exit_code == 2
