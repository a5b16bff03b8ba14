"""`taut generate`: one prompt in, its answer streamed to standard output."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict

from taut.cli.session import Options, Session
from taut.errors import RequestError

DEFAULT_NEW_TOKENS = 512


def run(
    model: str | None, prompt: str, options: Options, *, raw: bool, system: str | None, as_json: bool
) -> None:
    """Answers `prompt` with `model` (None: the default one). `raw`, or a model without a chat template,
    continues the text as it is."""
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
    with contextlib.closing(session.answer(ids, options, DEFAULT_NEW_TOKENS)) as answer:
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
