"""`taut chat`: turns, commands, and what Ctrl-C and Ctrl-D do in a real terminal."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from taut.cli.chat import Conversation
from tests.cli.conftest import ENVIRONMENT


def test_a_conversation_keeps_its_system_message_first(tmp_path: Path) -> None:
    talk = Conversation("Be brief.")
    talk.add("user", "Hi")
    talk.add("assistant", "Hello.")
    expected = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
    ]
    assert talk.messages == expected
    talk.save(tmp_path / "talk.json")
    assert json.loads((tmp_path / "talk.json").read_text()) == expected
    talk.save(tmp_path / "talk.md")
    assert (tmp_path / "talk.md").read_text() == (
        "**system**\n\nBe brief.\n\n**user**\n\nHi\n\n**assistant**\n\nHello.\n"
    )


def test_turns_and_commands(
    smollm: None, program: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    file = tmp_path / "talk.json"
    lines = [
        "/help",
        "My name is \\",  # goes on in the next line
        "Ada.",
        "What is my name?",
        f"/save {file}",
        "/save",
        f"/save {tmp_path}/no/such/folder.md",
        "/sytem x",
        "/system Answer in French.",
        "/reset",
        f"/save {tmp_path}/after.json",
        "/exit",
        "never reached",
    ]
    done = program("chat", "--max-new-tokens", "24", input="\n".join(lines))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    messages = json.loads(file.read_text())
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert messages[0]["content"] == "My name is \nAda."
    assert "Ada" in messages[3]["content"]  # it has seen the first turn
    assert messages[1]["content"] in done.stdout and messages[3]["content"] in done.stdout
    assert done.stderr.count("tok/s |") == 4  # a line of facts for each answer, two rates in it
    assert re.search(r"^/system TEXT", done.stderr, re.M)
    assert re.findall(r"^error: (.*)", done.stderr, re.M) == [
        "/save needs a file name: /save talk.md",
        f"can't write {tmp_path}/no/such/folder.md: No such file or directory",
        "'/sytem' is not a command; nearest: /system; /help lists them",
    ]
    after = json.loads((tmp_path / "after.json").read_text())
    assert after == [{"role": "system", "content": "Answer in French."}]


def test_a_question_too_long_leaves_no_trace(
    smollm: None, program: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    lines = ["word " * 9000, f"/save {tmp_path}/talk.json"]
    done = program("chat", input="\n".join(lines))
    assert done.returncode == 0
    assert re.search(r"^error: .*context", done.stderr, re.M)
    assert json.loads((tmp_path / "talk.json").read_text()) == []


class Terminal:
    """A program under a pseudo-terminal that it controls, so that Ctrl-C reaches it as a signal."""

    def __init__(self, descriptor: int, process: int):
        self.descriptor, self.process, self.seen = descriptor, process, ""

    def until(self, pattern: str, seconds: float = 240) -> str:
        """Reads until `pattern` is in what came since the last match; returns that."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self.descriptor], [], [], max(0, end - time.monotonic()))
            try:
                more = os.read(self.descriptor, 4096) if ready else b""
            except OSError:  # Linux's way to say that the other side has closed
                more = b""
            if not more:
                pytest.fail(f"{pattern!r} did not come; there was: {self.seen!r}")
            self.seen += more.decode("utf-8", "replace")
        found, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return found

    def type(self, text: str) -> None:
        os.write(self.descriptor, text.encode())

    def wait(self) -> int:
        """The exit code; what is still written is read, since a full terminal would block the program."""
        with contextlib.suppress(OSError):
            while os.read(self.descriptor, 4096):
                pass
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def run(*arguments: str) -> Terminal:
        import pty

        process, descriptor = pty.fork()
        if not process:
            os.execve(sys.executable, [sys.executable, "-m", "taut", *arguments], ENVIRONMENT)
        opened.append(Terminal(descriptor, process))
        return opened[-1]

    yield run
    for one in opened:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            if os.waitpid(one.process, os.WNOHANG) == (0, 0):
                os.kill(one.process, signal.SIGKILL)
                os.waitpid(one.process, 0)
        os.close(one.descriptor)


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(
    smollm: None, terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    chat = terminal("chat", "--max-new-tokens", "4000", "--stop", "no such text")
    chat.until(">>> ")
    chat.type("Write a very long story about a dragon, with many chapters.\n")
    chat.until(r"[a-z]+ [a-z]+ [a-z]+[^\n]*[a-z]+ [a-z]+")  # the echo, at least
    chat.until(r"\n[^\n]*[a-z]+ [a-z]+ [a-z]+")  # an answer that is under way
    chat.type("\x03")
    told = chat.until(r"decode (\d+) tokens")
    assert int(re.search(r"decode (\d+)", told).group(1)) < 1000
    chat.until(">>> ")
    time.sleep(0.5)  # readline shows its prompt a moment before it listens to signals
    chat.type("\x03")  # at the prompt, it clears the line
    chat.until("Ctrl-D or /exit leaves")
    chat.until(">>> ")
    chat.type(f"/save {tmp_path}/talk.json\n")  # the stopped answer is part of the conversation
    chat.until("saved to")
    chat.until(">>> ")
    chat.type("\x04")
    assert chat.wait() == 0
    roles = [m["role"] for m in json.loads((tmp_path / "talk.json").read_text())]
    assert roles == ["user", "assistant"]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
def test_ctrl_c_ends_generate(smollm: None, terminal: Callable[..., Terminal]) -> None:
    run = terminal("generate", "--raw", "1, 2, 3, 4, 5,", "--max-new-tokens", "4000")
    run.until(r"\d+, \d+")
    run.type("\x03")
    told = run.until("interrupted")
    assert "Traceback" not in told
    assert run.wait() == 130
