"""How requests began, and what they went on to use: what to expect of a request before any gate has run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.policy.base import StateDict
from finemoe.policy.cache_state import Scores
from finemoe.policy.finemoe.history import Floats

REQUESTS = 512  # remembered; the oldest make room
_ALIKE = 8  # requests that count
_SHARPNESS = 0.1  # temperature of their weights, in cosines


class PromptPrior:
    """Finished requests: the embedding of each one's prompt, and how often it used each expert.

    Prompts are compared by the cosine of their mean embeddings, with the mean of all stored ones taken off: what all
    prompts share says nothing.

    Args:
        layers: `L`.
        experts: `E`.
        capacity: how many requests are remembered.
    """

    def __init__(self, layers: int, experts: int, capacity: int = REQUESTS) -> None:
        self.number = 0  # requests that were ever taken in; request i lies in row `i % capacity`
        self.usage: Floats = np.zeros((capacity, layers, experts), np.float32)
        self.keys: Floats | None = None  # [capacity, D], made with the first

    @property
    def size(self) -> int:
        """How many are remembered."""
        return min(self.number, len(self.usage))

    def add(self, embedding: Floats, usage: Scores | Floats) -> None:
        """Takes in a finished request: its prompt's embedding `[D]`, its share of tokens for each expert `[L, E]`."""
        if self.keys is None:
            self.keys = np.zeros((len(self.usage), len(embedding)), np.float32)
        row = self.number % len(self.usage)
        self.keys[row], self.usage[row] = embedding, usage
        self.number += 1

    def state_dict(self) -> StateDict:
        """`openings` `[R, D]`, the embeddings, and `opened` `[R, L, E]`, the usage, oldest first; empty without any."""
        if self.keys is None:
            return {}
        rows = np.arange(self.number - self.size, self.number) % len(self.usage)
        return {"openings": self.keys[rows], "opened": self.usage[rows]}

    def load_state_dict(self, state_dict: Mapping[str, npt.NDArray[Any]]) -> None:
        """Takes in what another one knew, if that is anything, in place of its own."""
        self.number, self.keys = 0, None
        for embedding, usage in zip(state_dict.get("openings", ()), state_dict.get("opened", ()), strict=True):
            self.add(embedding, usage)

    def expect(self, embedding: Floats | None) -> tuple[Scores, float] | None:
        """The share of tokens `[L, E]` that requests with prompts like this `[D]` sent to each expert.

        That of the most alike, weighted by a softmax of their likeness; and what it is worth: m / (m + 1), with so many
        of them in effect, m. The rest is what is usual. `None` if nothing is known.
        """
        if embedding is None or self.keys is None or self.keys.shape[1] != len(embedding):
            return None
        keys = self.keys[: self.size]
        center = keys.mean(axis=0)
        # without BLAS: its threads stop a model's, and lanes that it does not use can raise warnings
        likeness = np.einsum("rd,d->r", _unit(keys - center), _unit(embedding - center))
        alike = np.argsort(-likeness, kind="stable")[:_ALIKE]
        u = np.exp((likeness[alike] - likeness[alike[0]]) / _SHARPNESS, dtype=np.float64)
        told = np.tensordot(u / u.sum(), self.usage[alike].astype(np.float64), axes=1)
        effective = u.sum() ** 2 / np.square(u).sum()
        return told, float(effective / (effective + 1.0))


def _unit(vectors: npt.NDArray[np.float32]) -> Floats:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1), np.float32)
