"""The paper's Expert Map Store: a bounded set of iterations, the most redundant of which makes room."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.policy.base import StateDict

Floats = npt.NDArray[np.float32]

_BLOCK = 256  # maps that are taken in with one matrix product
_FEW = 8  # vectors at most that a running model hands over at once


class MapStore:
    """Expert maps of `S` iterations at most, and the semantic key of each.

    Source: arXiv 2502.05370, "Expert Map Store": when full, a new map replaces the stored one of the highest redundancy
    score `(d / L) * semantic + ((L - d) / L) * trajectory`, both similarities cosines, the latter of whole maps.

    The maps lie in columns, so that following a trajectory reads what it needs in one piece: `columns[l, e]` is the
    probability of one expert in every map.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        capacity: `S`.
        distance: `d`.

    Attributes:
        size: how many maps are stored; the arrays are valid up to there.
        columns: `[L, E, S]`.
        inverse_norms: `[L, S]`: of each map's first l + 1 layers, flattened; 0 for a map that is zero so far.
    """

    def __init__(self, layers: int, experts: int, capacity: int, distance: int) -> None:
        self.size = 0
        self.columns: Floats = np.zeros((layers, experts, capacity), np.float32)
        self.inverse_norms: Floats = np.zeros((layers, capacity), np.float32)
        self._semantic_share = min(1.0, distance / layers)
        self._tokens = np.full(capacity, -1, np.int64)
        self._keys: Floats | None = None  # [S, D], of length 1, where embeddings are known
        self._born = np.zeros(capacity, np.int64)
        self._births = 0

    @property
    def births(self) -> int:
        """How many maps were ever taken in."""
        return self._births

    def contents(self) -> StateDict:
        """`maps` `[n, L, E]`, `tokens` `[n]`, `born` `[n]` (higher is newer); `keys` `[n, D]` where there are any."""
        held = slice(self.size)
        found: StateDict = {
            "maps": np.ascontiguousarray(self.columns[:, :, held].transpose(2, 0, 1)),
            "tokens": self._tokens[held].copy(),
            "born": self._born[held].copy(),
        }
        return found if self._keys is None else found | {"keys": self._keys[held].copy()}

    def refill(self, contents: Mapping[str, npt.NDArray[Any]]) -> None:
        """Holds these instead, or the newest of them, each in its row as far as there are as many."""
        kept = np.sort(np.argsort(contents["born"], kind="stable")[-len(self._tokens) :])
        self.size, held = len(kept), slice(len(kept))
        maps = np.ascontiguousarray(contents["maps"][kept], np.float32)
        self.columns[:, :, held] = maps.transpose(1, 2, 0)
        self.inverse_norms[:, held] = _inverse_norms(maps).T
        self._tokens[held], self._born[held] = contents["tokens"][kept], contents["born"][kept]
        self._births = int(self._born[held].max(initial=0))
        if "keys" in contents:
            self._keys = np.zeros((len(self._tokens), contents["keys"].shape[1]), np.float32)
            self._keys[held] = contents["keys"][kept]

    def closest(self, token: int, embedding: Floats | None) -> tuple[int, float]:
        """Semantic search: the row of the best match and its score; a score of 0 or less is no match.

        By the embedding's cosine; without one, by the same token, the most recent map winning.
        """
        if not self.size:
            return -1, 0.0
        if embedding is None or self._keys is None:
            born = np.where(self._tokens[: self.size] == token, self._born[: self.size], -1)
            row = int(born.argmax())
            return row, float(born[row] >= 0)
        scores = _products(_unit(embedding)[None], self._keys[: self.size])[0]
        row = int(scores.argmax())
        return row, float(scores[row])

    def add(
        self,
        maps: Floats,
        tokens: npt.NDArray[np.integer],
        embeddings: Floats | None = None,
        products: Floats | None = None,
    ) -> None:
        """Takes in finished iterations, one after the other.

        Args:
            maps: `[n, L, E]`.
            tokens: `[n]`, their input token ids.
            embeddings: `[n, D]`, where known.
            products: `[n, S]`, the flattened maps' dot products with the stored ones, where they are known already.
        """
        for start in range(0, len(maps), _BLOCK):
            block = slice(start, start + _BLOCK)
            keys = None if embeddings is None else _unit(embeddings[block])
            known = None if products is None or start else products[block]
            self._add_block(maps[block], np.asarray(tokens[block], np.int64), keys, known)

    def _add_block(
        self, maps: Floats, tokens: npt.NDArray[np.int64], keys: Floats | None, products: Floats | None
    ) -> None:
        """One map after the other, but with the matrix products of all of them at once."""
        flat = np.ascontiguousarray(maps.reshape(len(maps), -1), np.float32)
        inverse = _inverse_norms(maps)
        if self._keys is None and keys is not None:
            self._keys = np.zeros((len(self._tokens), keys.shape[1]), np.float32)
        redundancy = among = None
        if self.size + len(maps) > len(self._tokens):
            products = flat @ self.columns.reshape(flat.shape[1], -1) if products is None else products
            redundancy = self._redundancy(products * inverse[:, -1:], tokens, keys)
            trajectory = (flat @ flat.T) * inverse[:, -1] * inverse[:, -1:]
            among = self._blend(tokens[:, None] == tokens if keys is None else keys @ keys.T, trajectory)
        for i in range(len(maps)):
            if self.size < len(self._tokens):
                row = self.size
                self.size += 1
            else:
                assert redundancy is not None
                row = int(redundancy[i].argmax())
            self.columns[:, :, row] = maps[i]
            self.inverse_norms[:, row] = inverse[i]
            self._tokens[row] = tokens[i]
            self._births += 1
            self._born[row] = self._births
            if self._keys is not None:
                self._keys[row] = 0.0 if keys is None else keys[i]
            if redundancy is not None and among is not None:
                redundancy[:, row] = among[:, i]  # those still to come compare with this one

    def _redundancy(self, products: Floats, tokens: npt.NDArray[np.int64], keys: Floats | None) -> Floats:
        """How alike each new map `[n]` and each stored one `[S]` are, from the dot products of new unit vectors."""
        trajectory = products * self.inverse_norms[-1]
        if keys is None or self._keys is None:
            return self._blend(tokens[:, None] == self._tokens, trajectory)
        return self._blend(_products(keys, self._keys), trajectory)

    def _blend(self, semantic: npt.NDArray[np.generic], trajectory: Floats) -> Floats:
        share = np.float32(self._semantic_share)
        return np.asarray(share * semantic.astype(np.float32) + (1 - share) * trajectory, np.float32)


def _products(some: Floats, others: Floats) -> Floats:
    """`[n, S]`: dot products of vectors `[n, D]` and `[S, D]`. Of few without BLAS, whose threads stop a model's."""
    if len(some) > _FEW:
        return some @ others.T
    return np.asarray(np.einsum("nd,sd->ns", some, others), np.float32)


def _inverse_norms(maps: Floats) -> Floats:
    """`[n, L]`: of each map's first l + 1 layers, flattened."""
    norms = np.sqrt(np.square(maps, dtype=np.float64).sum(axis=2).cumsum(axis=1))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    return np.asarray(inverse, np.float32)


def _unit(vectors: Floats) -> Floats:
    """Scaled to length 1 along the last axis; zero stays zero."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1), np.float32)
