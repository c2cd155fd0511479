"""A layer whose experts are all on the device to stay: transformers' own function on the slots, without waiting."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from finemoe.metrics import Counters


class Touched:
    """Counts distinct experts on the device, so that a hit is not waited for to be counted.

    The model's thread notes; whoever asks for statistics settles, from any thread.

    Args:
        counters: of the engine.
    """

    def __init__(self, counters: Counters) -> None:
        self.counters = counters
        self._lock = threading.Lock()
        self._hits: Tensor | None = None  # int64, on the device

    def note(self, index: Tensor, experts: int) -> None:
        """A layer of so many experts executed `index` `[T, K]`."""
        seen = torch.zeros(experts + 1, dtype=torch.int64, device=index.device)
        seen[index.reshape(-1).clamp(max=experts)] = 1
        hits = seen[:experts].sum()
        with self._lock:
            self._hits = hits if self._hits is None else self._hits.add_(hits)

    def settle(self) -> None:
        """Add what was noted to the counters. Waits for the device."""
        with self._lock:
            hits, self._hits = self._hits, None
        if hits is not None:
            self.counters.hits += int(hits)


def run_whole(module: Any, parameters: dict[str, Tensor], hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Transformers' `grouped_mm` on a layer's slots.

    Args:
        module: the experts module, which has stand-ins for its parameters in its `__dict__`.
        parameters: `[E, ..]` by name.
        hidden: `[T, D]`.
        index: executed experts `[T, K]`.
        weights: `[T, K]`.
    """
    stand_ins = {name: module.__dict__[name] for name in parameters}
    module.__dict__.update(parameters)
    try:
        output: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden, index, weights)
    finally:
        module.__dict__.update(stand_ins)
    return output
