"""A tokenizer's tokens as bytes, and grammars over them, both by llguidance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Self

import llguidance.hf
import torch

from finemoe.serving.errors import ApiError, bad_value

# of JSON: room to lay it out, but not to write blanks for ever, as small models like to
LAYOUT: Any = {"whitespace_pattern": r"[ \t]?(\n[ \t]{0,32})?"}


class Grammar:
    """A `Constraint` by llguidance. Each answer needs a `copy` of its own.

    Args:
        matcher: an `llguidance.LLMatcher` at the beginning of its grammar.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> Self:
        return type(self)(self._matcher.deep_copy())

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `[V]` with what may not come next at minus infinity.

        Raises:
            ValueError: the grammar was left, or has become too complex to follow.
        """
        self._refuse_error()
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        allowed = bits.flatten()[: logits.shape[-1]].bool()
        if missing := logits.shape[-1] - len(allowed):  # columns beyond the tokenizer's tokens
            allowed = torch.cat((allowed, torch.zeros(missing, dtype=torch.bool)))
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def accept(self, token: int) -> None:
        """The answer goes on with `token`.

        Raises:
            ValueError: the grammar does not allow it.
        """
        self._matcher.consume_token(token)
        self._refuse_error()

    def _refuse_error(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the answer's grammar failed: {' '.join(self._matcher.get_error().split())}")


class GrammarVocabulary:
    """The tokens of a model.

    Args:
        tokenizer: transformers'.
        size: columns of the model's logits.
        ends: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, size: int, ends: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._size = max(size, len(tokenizer))
        self._ends = list(ends)
        self._guide: Any = None  # an LLTokenizer, once it is needed: a large one takes a second

    def prepare(self, param: str) -> None:
        """Do what takes a moment: once, and not on the event loop's thread.

        Raises:
            ApiError: 400, naming `param`: this kind of tokenizer can't be read.
        """
        if self._guide is None:
            try:
                self._guide = llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=self._size, eos_token=self._ends)
            except ValueError as error:
                raise ApiError(
                    400, f"{param}: this model's tokenizer does not allow it ({error})", param=param, code="unsupported"
                ) from error

    def text(self, token: int) -> str:
        """A token alone, as text; what is no whole character in it is replaced."""
        return self.bytes(token).decode("utf-8", "replace")

    def bytes(self, token: int) -> bytes:
        """A token alone, as bytes."""
        raw: bytes = self._guide.decode_bytes([token])
        return raw

    def json(self, schema: dict[str, Any], param: str) -> Grammar:
        """A grammar of the JSON that fits `schema`.

        Raises:
            ApiError: 400, naming `param`: the schema is none, or says what can't be kept to.
        """
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=LAYOUT)
        except (ValueError, RecursionError) as error:
            raise bad_value(param, f"is no JSON schema ({str(error).splitlines()[0]})") from error
        return self._grammar(grammar, param)

    def lark(self, text: str, param: str) -> Grammar:
        """A grammar in llguidance's dialect of Lark.

        Raises:
            ApiError: 400, naming `param`: what stems from it in the grammar can't be kept to.
        """
        return self._grammar(llguidance.LLMatcher.grammar_from_lark(text), param)

    def _grammar(self, grammar: str, param: str) -> Grammar:
        self.prepare(param)
        if trouble := llguidance.LLMatcher.validate_grammar(grammar, self._guide):
            said, _, _ = trouble.partition("\n1 |")  # the grammar's own text follows
            raise bad_value(param, f"can't be kept to: {' '.join(said.split())}")
        matcher = llguidance.LLMatcher(self._guide, grammar, log_level=0)
        if matcher.is_error():
            raise bad_value(param, f"can't be kept to: {' '.join(matcher.get_error().split())}")
        return Grammar(matcher)
