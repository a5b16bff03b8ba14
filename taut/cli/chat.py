"""`taut chat`: a conversation in the terminal, with streaming, history and commands."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from taut.cli.session import Options, Session
from taut.errors import RequestError, TautError, nearest

DEFAULT_NEW_TOKENS = 1024

HELP = """\
/help          this list
/reset         forget the conversation (the system message stays)
/system TEXT   set the system message; without TEXT, remove it
/save FILE     write the conversation: JSON messages for a name in .json, otherwise Markdown
/exit          leave (Ctrl-D does too)
A line that ends with \\ goes on in the next. Ctrl-C stops an answer."""

COMMANDS = ("/help", "/reset", "/system", "/save", "/exit")


class Conversation:
    """Messages of a chat, in the role / content form of chat templates."""

    def __init__(self, system: str | None = None):
        self.system = system
        self.turns: list[dict[str, str]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.turns

    def add(self, role: str, content: str) -> None:
        self.turns.append({"role": role, "content": content})

    def save(self, file: Path) -> None:
        """Writes `file` as a JSON list of messages (`.json`) or as Markdown; OSError when it can't."""
        if file.suffix == ".json":
            text = json.dumps(self.messages, indent=2, ensure_ascii=False)
        else:
            text = "\n\n".join(f"**{m['role']}**\n\n{m['content'].strip()}" for m in self.messages)
        file.write_text(text + "\n", encoding="utf-8")


class Interrupt:
    """While open, Ctrl-C sets `set` in place of raising, so that an answer ends between two tokens and
    nothing is left half done; a second Ctrl-C raises KeyboardInterrupt, for when no token comes."""

    def __init__(self) -> None:
        self.set = False

    def _catch(self, number: int, frame: object) -> None:
        if self.set:
            raise KeyboardInterrupt
        self.set = True

    def __enter__(self) -> Interrupt:
        self._old = signal.signal(signal.SIGINT, self._catch)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self._old)


class Chat:
    """Reads lines, answers them, and keeps the conversation."""

    def __init__(self, session: Session, options: Options, system: str | None):
        self.session = session
        self.options = options
        self.conversation = Conversation(system)
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> None:
        """The loop, until /exit or the end of input."""
        if self.terminal:
            with contextlib.suppress(ImportError):  # not on Windows; input() is then without editing
                import readline  # noqa: F401  importing it gives input() editing and history
            self._note(f"{self.session.name}: /help lists the commands, Ctrl-D leaves")
        for line in self._lines():
            if line.startswith("/"):
                if not self._command(line):
                    return
            elif line.strip():
                self._answer(line)

    def _lines(self) -> Iterator[str]:
        """Each line the user enters, those ending in a backslash joined to the next."""
        held: list[str] = []
        while True:
            try:
                line = self._read("... " if held else ">>> ")
            except KeyboardInterrupt:
                held = []
                print()
                self._note("Ctrl-D or /exit leaves")
                continue
            except EOFError:
                if self.terminal:
                    print()
                return
            except UnicodeDecodeError as error:
                raise RequestError(f"the input is not text: {error}") from None
            if line.endswith("\\"):
                held.append(line[:-1])
                continue
            yield "\n".join([*held, line])
            held = []

    def _read(self, prompt: str) -> str:
        if not self.terminal:
            return input()
        # \1 and \2 tell readline that what they enclose takes no room on the line.
        return input(f"\1\033[1;36m\2{prompt}\1\033[0m\2")

    def _command(self, line: str) -> bool:
        """Carries out a /command; False to leave."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/exit":
            return False
        if name == "/help":
            self._note(HELP)
        elif name == "/reset":
            self.conversation = Conversation(self.conversation.system)
            self._note("forgotten")
        elif name == "/system":
            self.conversation.system = rest or None
            self._note("system message set" if rest else "system message removed")
        elif name == "/save" and rest:
            file = Path(rest).expanduser()
            try:
                self.conversation.save(file)
            except OSError as error:
                self._error(f"can't write {file}: {error.strerror}")
            else:
                self._note(f"saved to {file}")
        elif name == "/save":
            self._error("/save needs a file name: /save talk.md")
        else:
            self._error(f"{name!r} is not a command{nearest(name, COMMANDS)}; /help lists them")
        return True

    def _answer(self, text: str) -> None:
        """Streams the answer to `text`. A stopped answer stays in the conversation as far as it came; one
        that could not be given leaves no trace."""
        self.conversation.add("user", text)
        pieces: list[str] = []
        with Interrupt() as interrupt:
            try:
                ids = self.session.chat_ids(self.conversation.messages)
                answer = self.session.answer(ids, self.options, DEFAULT_NEW_TOKENS)
                with contextlib.closing(answer):
                    for piece in answer:
                        pieces.append(piece)
                        print(piece, end="", flush=True)
                        if interrupt.set:
                            break
            except TautError as error:
                self.conversation.turns.pop()
                hint = "; /reset forgets the conversation" if self.conversation.turns else ""
                self._error(f"{error}{hint}")
                return
            except KeyboardInterrupt:  # Ctrl-C twice: no token came after the first
                pass
        print(flush=True)
        said = "".join(pieces)
        if not said:
            self.conversation.turns.pop()
            return
        self.conversation.add("assistant", said)
        self._note(self.session.facts(answer.clock).line())

    def _note(self, text: str) -> None:
        dim, plain = ("\033[2m", "\033[0m") if sys.stderr.isatty() else ("", "")
        print(f"{dim}{text}{plain}", file=sys.stderr, flush=True)

    def _error(self, text: str) -> None:
        print(f"error: {text}", file=sys.stderr, flush=True)


def run(model: str | None, options: Options, *, system: str | None) -> None:
    """Loads `model` and talks until the user leaves. `TokenizerError` when it has no chat template."""
    session = Session.load(model, options)
    session.need_chat_template("chat")
    Chat(session, options, system).run()
