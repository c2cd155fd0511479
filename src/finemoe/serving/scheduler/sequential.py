"""Requests one after the other, each with a cache of its own: for models that transformers can't batch."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from finemoe.config import format_bytes
from finemoe.errors import ConfigError
from finemoe.serving.scheduler.paged_batch import PAGE_TOKENS, Part, slices_logits, token_bytes


class SingleBatch:
    """What `PagedBatch` is, with one request in each forward pass until it is removed; the others wait.

    A prompt is one pass, whatever its length: not every model can take one in pieces.

    Args:
        model: of transformers.
        cache_bytes: the key-value cache's most, for the tokens of one request.

    Raises:
        ConfigError: the cache is too small for anything.
    """

    def __init__(self, model: Any, cache_bytes: int) -> None:
        self._model = model
        one_bytes = token_bytes(model)
        self.capacity_tokens = cache_bytes // one_bytes
        self.blocks = self.capacity_tokens // PAGE_TOKENS
        if not self.blocks:
            raise ConfigError(
                f"--cache-bytes: {format_bytes(cache_bytes)} holds too few tokens; this model takes "
                f"{format_bytes(one_bytes)} each"
            )
        self._waiting: dict[str, list[int]] = {}  # prompts
        self._name: str | None = None  # who runs
        self._next: list[int] = []  # tokens that the next pass computes
        self._past: Any = None
        self._held_tokens = 0

    @property
    def running(self) -> int:
        return int(self._name is not None)

    @property
    def used_blocks(self) -> int:
        return min(self.blocks, ceil(self._held_tokens / PAGE_TOKENS))

    def add(self, name: str, prompt: Sequence[int]) -> None:
        """Let a request wait for its turn. It has at most `capacity_tokens`, the answer's included."""
        self._waiting[name] = list(prompt)

    def remove(self, name: str) -> None:
        """Forget a request; unknown names are ignored."""
        self._waiting.pop(name, None)
        if name == self._name:
            self._name, self._past, self._held_tokens = None, None, 0

    def prepare(self) -> list[Part]:
        """Choose what the next pass computes; nothing if nothing waits."""
        if self._name is None:
            if not self._waiting:
                return []
            self._name = next(iter(self._waiting))
            self._next = self._waiting.pop(self._name)
        first = self._past is None
        return [Part(self._name, len(self._next), prompt=first, fresh=first, answers=True)]

    def run(self) -> Tensor:
        """The pass that was prepared: float32 logits `[1, V]`."""
        ids = torch.tensor([self._next], device=self._model.device)
        sliced = {"logits_to_keep": 1} if slices_logits(self._model) else {}
        with torch.no_grad():
            output = self._model(input_ids=ids, past_key_values=self._past, use_cache=True, **sliced)
        self._past = output.past_key_values
        self._held_tokens += len(self._next)
        logits: Tensor = output.logits[0, -1:]
        return logits.float()

    def advance(self, tokens: Sequence[int]) -> None:
        """The pass is over, and this token comes next."""
        self._next = list(tokens)

    def clear(self) -> None:
        """Forget all requests."""
        self._waiting.clear()
        if self._name is not None:
            self.remove(self._name)

    def close(self) -> None:
        """Nothing may be called any more."""
        self.clear()
