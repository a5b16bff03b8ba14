"""`Constraint`: text that must be JSON of some schema, match a regular expression or follow a grammar.

llguidance (https://github.com/guidance-ai/llguidance) parses; here its masks meet the rows they are for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taut.engine.request import Request, Row
from taut.errors import RequestError
from taut.tokenizer import Tokenizer

MOST_FORCED = 32

KINDS = {
    "text": "any text",
    "json_object": "a JSON object",
    "json_schema": "JSON of a schema: 'schema', or 'json_schema': {'schema': ...}",
    "regex": "a match of the regular expression 'regex'",
    "grammar": "what the Lark grammar 'grammar' says ('syntax': 'gbnf' for llama.cpp's grammars)",
}


class Constraint:
    """The tokens that may come next in a row, so that its text becomes what `response_format` says.

    `ends` are the row's end-of-sequence tokens, `vocab` the size of the model's vocabulary. Raises
    `RequestError` where llguidance is not installed, the format can't be compiled, or no text can be of it.
    """

    def __init__(self, tokenizer: Any, response_format: Any, *, vocab: int, ends: Sequence[int] = ()):
        library = _library()
        grammar = compiled(response_format)
        tokens = _tokens(tokenizer, vocab, tuple(ends))
        if wrong := library.LLMatcher.validate_grammar(grammar, tokens):
            raise RequestError(f"response_format can't be compiled: {wrong.strip()}")
        self._matcher = library.LLMatcher(tokens, grammar)
        self._seen: list[int] = []  # what the matcher has consumed
        self._vocab = vocab
        self.mask([])

    def mask(self, output: Sequence[int]) -> np.ndarray:
        """Which tokens may follow these new ones: a bit each in int32 `[ceil(vocab / 32)]`. All may, after
        tokens that the format does not allow: those are guesses, and wrong. Raises `RequestError` where
        none can follow.
        """
        if not self._go_to(output) and not self._matcher.is_stopped():
            return np.full(-(-self._vocab // 32), -1, np.int32)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        self._check()
        return bits

    def complete(self, output: Sequence[int]) -> bool:
        """Whether nothing can follow these new tokens."""
        self._go_to(output)
        return self._matcher.is_stopped()

    def forced(self, output: Sequence[int]) -> list[int]:
        """What must come next, as the tokenizer would write it; [] where anything is wrong, which is found
        again when the next token is chosen."""
        try:
            return self._matcher.compute_ff_tokens() if self._go_to(output) else []
        except RequestError:
            return []

    def _go_to(self, output: Sequence[int]) -> bool:
        """Bring the matcher behind these tokens; False where it can't follow them to their end."""
        same = len(self._seen)
        if output[:same] != self._seen:
            same = next(
                at for at, (a, b) in enumerate(zip(self._seen, [*output, -1], strict=False)) if a != b
            )
            self._matcher.rollback(len(self._seen) - same)
            del self._seen[same:]
        new = list(output[same:])
        taken = self._matcher.try_consume_tokens(new) if new else 0
        self._seen += new[:taken]
        self._check()
        return taken == len(new)

    def _check(self) -> None:
        if self._matcher.is_error():
            why = self._matcher.get_error().split("\n")[0]
            if why.startswith("NoExtension"):
                why = f"no token of the tokenizer goes on with such a text after {len(self._seen)} tokens"
            raise RequestError(f"response_format: {why}")


def bar(scores: Tensor, masks: Sequence[np.ndarray]) -> Tensor:
    """`scores` `[rows, vocab]` with -inf where the row's mask has no bit."""
    bits = torch.from_numpy(np.stack(masks)).to(scores.device)
    places = torch.arange(32, dtype=torch.int32, device=scores.device)
    allowed = ((bits.unsqueeze(-1) >> places) & 1).bool().flatten(1)[:, : scores.shape[1]]
    return scores.masked_fill(~allowed, -torch.inf)


class ForcedTokens:
    """A drafter: guesses what a row's constraint leaves no choice about."""

    def propose(self, requests: Sequence[Request]) -> Mapping[Row, Sequence[int]]:
        found = {request: request.constraint.forced(request.output) for request in requests}
        return {request: tokens[:MOST_FORCED] for request, tokens in found.items() if tokens}

    def learn(self, request: Request, offered: int, right: int) -> None:
        pass

    def rests(self, request: Request) -> bool:
        return False

    def forget(self, request: Request) -> None:
        pass


class GrammarProcessor:
    """A `Constraint` as a logits processor, for one prompt (or a batch whose rows all have the same length),
    also with transformers' models: `logits_processor=[GrammarProcessor(tokenizer, response_format)]`."""

    def __init__(self, tokenizer: Any, response_format: Any):
        self.tokenizer, self.response_format = tokenizer, response_format
        self._prompts: Tensor | None = None
        self._constraints: list[Constraint] = []

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if self._prompts is None:
            ends = _ends(self.tokenizer)
            self._prompts = ids.clone()
            self._constraints = [
                Constraint(self.tokenizer, self.response_format, vocab=scores.shape[1], ends=ends)
                for _ in ids
            ]
        width = self._prompts.shape[1]
        if ids.shape[0] != len(self._prompts) or not torch.equal(ids[:, :width], self._prompts):
            raise RequestError(
                "a GrammarProcessor follows the prompt that it was first called with, and this is another. "
                "Next step: give each row its own, or use response_format="
            )
        new = ids[:, width:].tolist()
        return bar(scores, [one.mask(row) for one, row in zip(self._constraints, new, strict=True)])


def compiled(response_format: Any) -> str:
    """A response format, as OpenAI and vLLM write it (or a pydantic model), as llguidance's grammar; see
    `KINDS`. Raises `RequestError` for what is not one."""
    matcher = _library().LLMatcher
    if hasattr(response_format, "model_json_schema"):
        response_format = {"type": "json_schema", "schema": response_format.model_json_schema()}
    if not isinstance(response_format, Mapping) or response_format.get("type") not in KINDS:
        got = response_format.get("type") if isinstance(response_format, Mapping) else response_format
        known = "; ".join(f"{kind!r} ({meaning})" for kind, meaning in KINDS.items())
        raise RequestError(f"response_format is {got!r}; expected a dict whose 'type' is one of: {known}")
    kind = response_format["type"]
    if kind == "json_object":
        return matcher.grammar_from_json_schema({"type": "object"})
    if kind == "json_schema":
        named = response_format.get("json_schema", response_format)
        return _from_schema(named.get("schema") if isinstance(named, Mapping) else None)
    source = response_format.get(kind if kind in response_format else "pattern")
    if not isinstance(source, str):
        raise RequestError(f"response_format of type {kind!r} needs a text {kind!r}, not {source!r}")
    if kind == "regex":
        return matcher.grammar_from_regex(source)
    syntax = response_format.get("syntax", "lark")
    if syntax == "gbnf":
        source = _library().gbnf_to_lark.gbnf_to_lark(source)
    elif syntax != "lark":
        raise RequestError(f"response_format: syntax is {syntax!r}; known: lark, gbnf")
    return matcher.grammar_from_lark(source)


def _from_schema(schema: Any) -> str:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise RequestError(f"response_format: the schema is not JSON: {error}") from None
    if not isinstance(schema, (Mapping, bool)):
        raise RequestError(
            f"response_format: the schema is {schema!r}; expected a JSON schema, which is a dict"
        )
    try:
        return _library().LLMatcher.grammar_from_json_schema(json.dumps(schema))
    except (TypeError, ValueError) as error:
        raise RequestError(f"response_format: the schema can't be written as JSON: {error}") from None


def _library() -> Any:
    try:
        import llguidance
        import llguidance.gbnf_to_lark
    except ImportError:
        raise RequestError(
            "response_format needs llguidance, which is not installed. Next step: pip install 'taut[grammar]'"
        ) from None
    return llguidance


def _tokens(tokenizer: Any, vocab: int, ends: tuple[int, ...]) -> Any:
    """The tokenizer as llguidance has it; made once for each, since a large vocabulary takes a second."""
    if not isinstance(tokenizer, Tokenizer):
        raise RequestError(
            f"tokenizer is a {type(tokenizer).__name__}; expected a tokenizer of Taut. Next step: load it "
            "with taut.AutoTokenizer.from_pretrained"
        )
    made, ends = tokenizer.made_of_it, ends or _ends(tokenizer)
    if ("llguidance", vocab, ends) not in made:
        try:
            made["llguidance", vocab, ends] = _library().LLTokenizer(
                tokenizer.backend_tokenizer.to_str(), n_vocab=vocab, eos_token=list(ends) or None
            )
        except Exception as error:  # whatever its Rust side says
            raise RequestError(f"response_format: llguidance can't read this tokenizer: {error}") from None
    return made["llguidance", vocab, ends]


def _ends(tokenizer: Any) -> tuple[int, ...]:
    end = getattr(tokenizer, "eos_token_id", None)
    return () if end is None else (end,)
