"""Prior over experts from the prompt's embedding: what similar earlier requests used, known before any gate runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.policy.base import StateDict
from finemoe.policy.cache_state import Scores
from finemoe.policy.finemoe.history import Floats

REQUESTS = 512  # default capacity
_NEIGHBOURS = 8
_TEMPERATURE = 0.1  # of the neighbours' weights, in cosines


class PromptPrior:
    """The last `R` finished requests: each one's prompt embedding, and how often it used each expert.

    Prompts are compared by the cosine of their embeddings minus the mean of all stored ones, because what all prompts
    have in common carries no information.

    Args:
        layers: `L`.
        experts: `E`.
        capacity: `R`.

    Attributes:
        num_added: how many requests were ever added; request i is in row `i % R`.
        usage: `[R, L, E]`, share of the request's tokens that each expert got.
        embeddings: `[R, D]`; allocated with the first request.
    """

    def __init__(self, layers: int, experts: int, capacity: int = REQUESTS) -> None:
        self.num_added = 0
        self.usage: Floats = np.zeros((capacity, layers, experts), np.float32)
        self.embeddings: Floats | None = None

    @property
    def size(self) -> int:
        """How many requests are stored."""
        return min(self.num_added, len(self.usage))

    def add(self, embedding: Floats, usage: Scores | Floats) -> None:
        """Adds a finished request: its prompt's embedding `[D]`, and its share of tokens for each expert `[L, E]`."""
        if self.embeddings is None:
            self.embeddings = np.zeros((len(self.usage), len(embedding)), np.float32)
        row = self.num_added % len(self.usage)
        self.embeddings[row], self.usage[row] = embedding, usage
        self.num_added += 1

    def state_dict(self) -> StateDict:
        """`openings` `[n, D]`, the embeddings, and `opened` `[n, L, E]`, the usage, oldest first; `{}` if empty."""
        if self.embeddings is None:
            return {}
        rows = np.arange(self.num_added - self.size, self.num_added) % len(self.usage)
        return {"openings": self.embeddings[rows], "opened": self.usage[rows]}

    def load_state_dict(self, state_dict: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replaces all requests by those of `state_dict`, which may have none."""
        self.num_added, self.embeddings = 0, None
        for embedding, usage in zip(state_dict.get("openings", ()), state_dict.get("opened", ()), strict=True):
            self.add(embedding, usage)

    def predict(self, embedding: Floats | None) -> tuple[Scores, float] | None:
        """What requests with prompts like this one used.

        With cosines `x_i` of the nearest `_NEIGHBOURS` stored prompts, `u_i = exp(x_i / _TEMPERATURE)`, and the
        effective number of them `m = (sum u)^2 / sum u^2`:

        Args:
            embedding: `[D]`, if known.

        Returns:
            `sum(u_i * usage_i) / sum(u_i)` `[L, E]`, and how far to trust it, `m / (m + 1)`; the rest of the weight is
            the global frequencies'. `None` without an embedding, or without stored ones of the same length.
        """
        if embedding is None or self.embeddings is None or self.embeddings.shape[1] != len(embedding):
            return None
        stored = self.embeddings[: self.size]
        center = stored.mean(axis=0)
        # not BLAS: its threads would delay the model's, and its unused vector lanes can raise floating-point warnings
        cosines = np.einsum("rd,d->r", _unit(stored - center), _unit(embedding - center))
        nearest = np.argsort(-cosines, kind="stable")[:_NEIGHBOURS]
        u = np.exp((cosines[nearest] - cosines[nearest[0]]) / _TEMPERATURE, dtype=np.float64)
        share = np.tensordot(u / u.sum(), self.usage[nearest].astype(np.float64), axes=1)
        effective = u.sum() ** 2 / np.square(u).sum()
        return share, float(effective / (effective + 1.0))


def _unit(vectors: npt.NDArray[np.float32]) -> Floats:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1), np.float32)
