"""`taut generate`: one prompt in, its answer streamed to standard output."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict

from taut.cli.session import Options, Session


def run(
    model: str | None, prompt: str, options: Options, *, raw: bool, system: str | None, as_json: bool
) -> None:
    """Answers `prompt` with `model` (None: the default one). `raw`, or a model without a chat template,
    continues the text as it is."""
    session = Session.load(model, options)
    if system is not None and (raw or not session.tokenizer.chat_template):
        session.need_chat_template("--system")
    ids = session.raw_ids(prompt) if raw else session.prompt_ids(prompt, system)
    pieces: list[str] = []
    with contextlib.closing(session.answer(ids, options)) as answer:
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
            "token_ids": answer.token_ids,
            "finish_reason": answer.finish_reason,
            "dtype": session.dtype,
            "device": session.device,
            "facts": asdict(facts),
        }
        print(json.dumps(result, ensure_ascii=False))
        return
    sys.stdout.flush()
    print(facts.line(), file=sys.stderr)
