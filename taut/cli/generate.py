"""`taut generate`: one prompt in, its answer streamed to standard output."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from taut.cli.session import Options, Session
from taut.errors import RequestError

DEFAULT_NEW_TOKENS = 512


def response_format(json_schema: Path | None, regex: str | None, grammar: Path | None) -> dict | None:
    """What the answer has to be, as `generate` takes it; `RequestError` for two things at once."""
    given = {"--json-schema": json_schema, "--regex": regex, "--grammar": grammar}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)} each say what the answer is; give one of them")
    if json_schema is not None:
        return {"type": "json_schema", "schema": json_schema.read_text("utf-8")}
    if grammar is not None:
        syntax = "gbnf" if grammar.suffix == ".gbnf" else "lark"
        return {"type": "grammar", "grammar": grammar.read_text("utf-8"), "syntax": syntax}
    return None if regex is None else {"type": "regex", "regex": regex}


def run(
    model: str | None,
    prompt: str,
    options: Options,
    *,
    raw: bool,
    system: str | None,
    as_json: bool,
    shape: dict | None = None,
) -> None:
    """Answers `prompt` with `model` (None: the default one). `raw`, or a model without a chat template,
    continues the text as it is. `shape`: what the answer has to be."""
    if raw and system is not None:
        raise RequestError("--system is part of the chat template, which --raw leaves out; give one of them")
    session = Session.load(model, options)
    if system is not None:
        session.need_chat_template("--system")
    if raw or not session.tokenizer.chat_template:
        ids = session.raw_ids(prompt)
    else:
        head = [{"role": "system", "content": system}] if system else []
        ids = session.chat_ids([*head, {"role": "user", "content": prompt}])
    pieces: list[str] = []
    with contextlib.closing(session.answer(ids, options, DEFAULT_NEW_TOKENS, shape)) as answer:
        try:
            for piece in answer:
                pieces.append(piece)
                if not as_json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        finally:  # what was written before an error or Ctrl-C still ends its line
            if pieces and not as_json:
                sys.stdout.write("\n")
    facts = session.facts(answer.clock)
    if as_json:
        result = {
            "model": session.name,
            "prompt": prompt,
            "text": "".join(pieces),
            "token_ids": answer.stream.tokens,
            "finish_reason": answer.stream.finish_reason,
            "dtype": str(session.model.dtype).removeprefix("torch."),
            "device": str(session.model.device),
            "facts": asdict(facts),
        }
        print(json.dumps(result, ensure_ascii=False))
        return
    sys.stdout.flush()
    print(facts.line(), file=sys.stderr)
