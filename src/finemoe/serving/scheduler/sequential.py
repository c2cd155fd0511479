"""One request at a time, with the model's own cache: for models that transformers can't batch."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from finemoe.budget import format_bytes
from finemoe.errors import ConfigError
from finemoe.serving.scheduler.paged_batch import BLOCK_TOKENS, ScheduledRequest, slices_logits, token_bytes


class SequentialBatch:
    """The interface of `PagedBatch` with one running request; the others wait until it is removed.

    A prompt is computed in one pass, whatever its length: not every model supports chunked prefill.

    Args:
        model: a transformers model.
        cache_bytes: limit of the key-value cache of one request.

    Raises:
        ConfigError: the cache is too small.
    """

    def __init__(self, model: Any, cache_bytes: int) -> None:
        self._model = model
        token_cost = token_bytes(model)
        self.capacity_tokens = cache_bytes // token_cost
        self.blocks = self.capacity_tokens // BLOCK_TOKENS
        if not self.blocks:
            raise ConfigError(
                f"--cache-bytes: {format_bytes(cache_bytes)} holds too few tokens; this model takes "
                f"{format_bytes(token_cost)} each"
            )
        self._waiting: dict[str, list[int]] = {}  # prompts by name
        self._name: str | None = None  # the running request
        self._next: list[int] = []  # token ids of the next pass
        self._past: Any = None
        self._held_tokens = 0

    @property
    def running(self) -> int:
        return int(self._name is not None)

    @property
    def used_blocks(self) -> int:
        return min(self.blocks, ceil(self._held_tokens / BLOCK_TOKENS))

    def add(self, name: str, prompt: Sequence[int]) -> None:
        """Queue a request of at most `capacity_tokens` tokens, its answer included."""
        self._waiting[name] = list(prompt)

    def remove(self, name: str) -> None:
        """Drop a request; unknown names are ignored."""
        self._waiting.pop(name, None)
        if name == self._name:
            self._name, self._past, self._held_tokens = None, None, 0

    def prepare(self) -> list[ScheduledRequest]:
        """Schedule the next pass; empty if no request waits or runs."""
        if self._name is None:
            if not self._waiting:
                return []
            self._name = next(iter(self._waiting))
            self._next = self._waiting.pop(self._name)
        first = self._past is None
        return [ScheduledRequest(self._name, len(self._next), is_prefill=first, is_new=first, samples=True)]

    def run(self) -> Tensor:
        """Run the prepared pass. Returns float32 logits `[1, V]`."""
        ids = torch.tensor([self._next], device=self._model.device)
        sliced = {"logits_to_keep": 1} if slices_logits(self._model) else {}
        with torch.no_grad():
            output = self._model(input_ids=ids, past_key_values=self._past, use_cache=True, **sliced)
        self._past = output.past_key_values
        self._held_tokens += len(self._next)
        logits: Tensor = output.logits[0, -1:]
        return logits.float()

    def advance(self, tokens: Sequence[int]) -> None:
        """Append the sampled token, the only element of `tokens`."""
        self._next = list(tokens)

    def clear(self) -> None:
        """Drop all requests."""
        self._waiting.clear()
        if self._name is not None:
            self.remove(self._name)

    def close(self) -> None:
        """Drop all requests; no other method may be called afterwards."""
        self.clear()
