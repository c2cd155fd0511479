"""Eviction: which resident expert is worth least. Pure arithmetic over arrays `[L, E]`; no clock but the access count.

An `Eviction` only ranks. Residency, pins and slots belong to the `Controller`, so no ranking can evict what is in use.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from finemoe.types import ExpertId

Scores = npt.NDArray[np.float64]


class Eviction(Protocol):
    """Ranks experts by how much keeping them is worth."""

    def access(self, layer: int, experts: Sequence[int]) -> None:
        """One access event: these experts of `layer` were needed together, resident or not."""

    def worth(self) -> Scores:
        """Worth of every expert `[L, E]`; the lowest is evicted first. The caller must not change the array."""


class LRU:
    """Least recently used goes first. Experts of one event are ordered by their index."""

    def __init__(self, layers: int, experts: int) -> None:
        self._last = np.full((layers, experts), -1.0)  # [L, E]
        self._clock = 0

    def access(self, layer: int, experts: Sequence[int]) -> None:
        for expert in experts:
            self._last[layer, expert] = self._clock
            self._clock += 1

    def worth(self) -> Scores:
        return self._last


class LFU:
    """Least frequently used goes first, by a frequency that decays once per iteration.

    Args:
        decay: what a visit is worth one iteration later. An iteration ends when the layer index does not grow.
    """

    def __init__(self, layers: int, experts: int, decay: float = 0.9) -> None:
        self._frequency = np.zeros((layers, experts))  # [L, E]
        self._decay = decay
        self._previous_layer = -1

    def access(self, layer: int, experts: Sequence[int]) -> None:
        if layer <= self._previous_layer:
            self._frequency *= self._decay
        self._previous_layer = layer
        for expert in experts:
            self._frequency[layer, expert] += 1.0

    def worth(self) -> Scores:
        return self._frequency


class LFRU:
    """Frequency over age: `f / (age + 1)`, age in iterations since the last visit; the lowest goes first.

    Source: the least-frequently-recently-used score that a 2026 caching study found best among causal evictions.
    It leaves open what `f` counts; here visits that decay per iteration, slower than `LFU`'s as age already favours
    the recent.

    Args:
        decay: what a visit is worth one iteration later. An iteration ends when the layer index does not grow.
    """

    def __init__(self, layers: int, experts: int, decay: float = 0.98) -> None:
        self._frequency = np.zeros((layers, experts))  # [L, E]
        self._last = np.zeros((layers, experts))  # [L, E]
        self._decay = decay
        self._iteration = 0
        self._previous_layer = -1

    def access(self, layer: int, experts: Sequence[int]) -> None:
        if layer <= self._previous_layer:
            self._frequency *= self._decay
            self._iteration += 1
        self._previous_layer = layer
        for expert in experts:
            self._frequency[layer, expert] += 1.0
            self._last[layer, expert] = self._iteration

    def worth(self) -> Scores:
        return self._frequency / (self._iteration - self._last + 1.0)


EVICTIONS: dict[str, Callable[[int, int], Eviction]] = {"lru": LRU, "lfu": LFU, "lfru": LFRU}


def least_worthy(worth: Scores, candidates: npt.NDArray[np.bool_]) -> ExpertId | None:
    """The candidate of lowest worth (ties: lowest layer, then expert), or `None` if there is no candidate.

    Args:
        worth: `[L, E]`.
        candidates: `[L, E]`, true where eviction is allowed.
    """
    if not candidates.any():
        return None
    masked = np.where(candidates, worth, np.inf)
    layer, expert = divmod(int(masked.argmin()), worth.shape[1])
    if not candidates[layer, expert]:  # every candidate is worth +inf: argmin may have met a non-candidate first
        layer, expert = divmod(int(candidates.argmax()), worth.shape[1])
    return ExpertId(layer, expert)
