"""A grammar that an answer is kept within: the one place of the server that touches logits."""

from __future__ import annotations

from typing import Any, Self

import torch

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
