"""Grammar-constrained output with llguidance: JSON schemas, Lark grammars, and the bytes of tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Self

import llguidance.hf
import torch

from finemoe.serving.errors import ApiError, bad_value

# allows indented JSON, but bounds whitespace: small models tend to repeat it without end
JSON_WHITESPACE: Any = {"whitespace_pattern": r"[ \t]?(\n[ \t]{0,32})?"}


class Grammar:
    """An llguidance grammar as a `Constraint`. Each answer needs its own `copy`.

    Args:
        matcher: an `llguidance.LLMatcher` in its initial state.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> Self:
        return type(self)(self._matcher.deep_copy())

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits `[V]` with every token that may not come next at minus infinity.

        Raises:
            ValueError: an earlier token violated the grammar, or it exceeds llguidance's limits.
        """
        self._refuse_error()
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        allowed = bits.flatten()[: logits.shape[-1]].bool()
        if missing := logits.shape[-1] - len(allowed):  # padded logits beyond the tokenizer's vocabulary
            allowed = torch.cat((allowed, torch.zeros(missing, dtype=torch.bool)))
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))

    def accept(self, token: int) -> None:
        """Advances the grammar by `token`.

        Raises:
            ValueError: the grammar does not allow it.
        """
        self._matcher.consume_token(token)
        self._refuse_error()

    def _refuse_error(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the answer's grammar failed: {' '.join(self._matcher.get_error().split())}")


class GrammarVocabulary:
    """A model's vocabulary for llguidance: texts of tokens, and grammars over them.

    Args:
        tokenizer: a transformers tokenizer.
        size: columns of the model's logits.
        end_ids: token ids that end an answer.
    """

    def __init__(self, tokenizer: Any, size: int, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._size = max(size, len(tokenizer))
        self._end_ids = list(end_ids)
        self._ll_tokenizer: Any = None  # an LLTokenizer, built by `prepare`: a large one takes a second

    def prepare(self, param: str) -> None:
        """Build llguidance's tokenizer, if it is not built yet. Slow: keep it off the event loop.

        Raises:
            ApiError: 400, naming `param`: llguidance does not support this tokenizer.
        """
        if self._ll_tokenizer is None:
            try:
                self._ll_tokenizer = llguidance.hf.from_tokenizer(
                    self._tokenizer, n_vocab=self._size, eos_token=self._end_ids
                )
            except ValueError as error:
                raise ApiError(
                    400, f"{param}: this model's tokenizer does not allow it ({error})", param=param, code="unsupported"
                ) from error

    def text(self, token: int) -> str:
        """The text of a token; incomplete characters become U+FFFD. Call `prepare` first."""
        return self.bytes(token).decode("utf-8", "replace")

    def bytes(self, token: int) -> bytes:
        """The bytes of a token. Call `prepare` first."""
        raw: bytes = self._ll_tokenizer.decode_bytes([token])
        return raw

    def json(self, schema: dict[str, Any], param: str) -> Grammar:
        """A grammar of the JSON that matches `schema`.

        Raises:
            ApiError: 400, naming `param`: it is not a schema, or llguidance can't enforce it.
        """
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_WHITESPACE)
        except (ValueError, RecursionError) as error:
            raise bad_value(param, f"is not a JSON schema ({str(error).splitlines()[0]})") from error
        return self._grammar(grammar, param)

    def lark(self, text: str, param: str) -> Grammar:
        """A grammar in llguidance's variant of Lark.

        Raises:
            ApiError: 400, naming `param`, from which the grammar was made: llguidance can't enforce it.
        """
        return self._grammar(llguidance.LLMatcher.grammar_from_lark(text), param)

    def _grammar(self, grammar: str, param: str) -> Grammar:
        self.prepare(param)
        if fault := llguidance.LLMatcher.validate_grammar(grammar, self._ll_tokenizer):
            message, _, _ = fault.partition("\n1 |")  # drops the quoted grammar
            raise bad_value(param, f"can't be enforced: {' '.join(message.split())}")
        matcher = llguidance.LLMatcher(self._ll_tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise bad_value(param, f"can't be enforced: {' '.join(matcher.get_error().split())}")
        return Grammar(matcher)
