"""The Expert Map Store of fMoE: a bounded set of past iterations; when full, the most redundant is replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.policy.base import StateDict

Floats = npt.NDArray[np.float32]

_BLOCK = 256  # maps that are added with one matrix product
_FEW = 8  # up to so many vectors (a running batch) are multiplied without BLAS


class ExpertMapStore:
    """Expert maps of at most `S` iterations, each with its semantic key.

    A map `[L, E]` holds the gate's distribution over the experts of every layer; the key is the embedding-layer output
    `[D]`, or the input token id where embeddings are not known.

    Source: arXiv 2502.05370, "Expert Map Store": when full, a new map replaces the stored one of the highest redundancy
    score `(d / L) * semantic + ((L - d) / L) * trajectory`, both similarities cosines, the latter of whole maps.

    Maps are stored as columns, so that trajectory search reads contiguous memory.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        capacity: `S`.
        distance: `d`.

    Attributes:
        size: how many maps are stored; the arrays are valid up to there.
        columns: `[L, E, S]`: the probability of one expert in every map.
        inverse_norms: `[L, S]`: one over the norm of each map's first l + 1 layers, flattened; 0 if they are all zero.
        num_added: how many maps were ever added.
    """

    def __init__(self, layers: int, experts: int, capacity: int, distance: int) -> None:
        self.size = 0
        self.columns: Floats = np.zeros((layers, experts, capacity), np.float32)
        self.inverse_norms: Floats = np.zeros((layers, capacity), np.float32)
        self._semantic_share = min(1.0, distance / layers)
        self._tokens = np.full(capacity, -1, np.int64)
        self._keys: Floats | None = None  # [S, D], of length 1, where embeddings are known
        self._added_at = np.zeros(capacity, np.int64)  # value of `num_added` when the map was added
        self.num_added = 0

    def state_dict(self) -> StateDict:
        """`maps` `[n, L, E]`, `tokens` `[n]`, `born` `[n]` (higher: newer), `keys` `[n, D]` if there are embeddings."""
        held = slice(self.size)
        arrays: StateDict = {
            "maps": np.ascontiguousarray(self.columns[:, :, held].transpose(2, 0, 1)),
            "tokens": self._tokens[held].copy(),
            "born": self._added_at[held].copy(),
        }
        return arrays if self._keys is None else arrays | {"keys": self._keys[held].copy()}

    def load_state_dict(self, state_dict: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replaces all maps; of more than `S`, the newest are kept, in the given order of rows."""
        kept = np.sort(np.argsort(state_dict["born"], kind="stable")[-len(self._tokens) :])
        self.size, held = len(kept), slice(len(kept))
        maps = np.ascontiguousarray(state_dict["maps"][kept], np.float32)
        self.columns[:, :, held] = maps.transpose(1, 2, 0)
        self.inverse_norms[:, held] = _inverse_norms(maps).T
        self._tokens[held], self._added_at[held] = state_dict["tokens"][kept], state_dict["born"][kept]
        self.num_added = int(self._added_at[held].max(initial=0))
        if "keys" in state_dict:
            self._keys = np.zeros((len(self._tokens), state_dict["keys"].shape[1]), np.float32)
            self._keys[held] = state_dict["keys"][kept]

    def semantic_search(self, token: int, embedding: Floats | None) -> tuple[int, float]:
        """The row of the best match and its score; 0 or less: no match.

        The score is the cosine of the embeddings; without embeddings, 1 for the newest map with the same token.
        """
        if not self.size:
            return -1, 0.0
        if embedding is None or self._keys is None:
            born = np.where(self._tokens[: self.size] == token, self._added_at[: self.size], -1)
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
        """Adds finished iterations, one after the other.

        Args:
            maps: `[n, L, E]`.
            tokens: `[n]`, their input token ids.
            embeddings: `[n, D]`, if known.
            products: `[n, S]`, dot products of the flattened maps with the stored ones, if computed already.
        """
        for start in range(0, len(maps), _BLOCK):
            block = slice(start, start + _BLOCK)
            keys = None if embeddings is None else _unit(embeddings[block])
            known = None if products is None or start else products[block]
            self._add_block(maps[block], np.asarray(tokens[block], np.int64), keys, known)

    def _add_block(
        self, maps: Floats, tokens: npt.NDArray[np.int64], keys: Floats | None, products: Floats | None
    ) -> None:
        """Adds maps one after the other, with the matrix products of all of them computed at once."""
        flat = np.ascontiguousarray(maps.reshape(len(maps), -1), np.float32)
        inverse = _inverse_norms(maps)
        if self._keys is None and keys is not None:
            self._keys = np.zeros((len(self._tokens), keys.shape[1]), np.float32)
        redundancy = mutual = None
        if self.size + len(maps) > len(self._tokens):
            products = flat @ self.columns.reshape(flat.shape[1], -1) if products is None else products
            redundancy = self._redundancy(products * inverse[:, -1:], tokens, keys)
            trajectory = (flat @ flat.T) * inverse[:, -1] * inverse[:, -1:]
            mutual = self._blend(tokens[:, None] == tokens if keys is None else keys @ keys.T, trajectory)
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
            self.num_added += 1
            self._added_at[row] = self.num_added
            if self._keys is not None:
                self._keys[row] = 0.0 if keys is None else keys[i]
            if redundancy is not None and mutual is not None:
                redundancy[:, row] = mutual[:, i]  # the maps still to be added compare with this one

    def _redundancy(self, products: Floats, tokens: npt.NDArray[np.int64], keys: Floats | None) -> Floats:
        """`[n, S]`: redundancy score of each new and stored map; `products` are of the new maps scaled to length 1."""
        trajectory = products * self.inverse_norms[-1]
        if keys is None or self._keys is None:
            return self._blend(tokens[:, None] == self._tokens, trajectory)
        return self._blend(_products(keys, self._keys), trajectory)

    def _blend(self, semantic: npt.NDArray[np.generic], trajectory: Floats) -> Floats:
        share = np.float32(self._semantic_share)
        return np.asarray(share * semantic.astype(np.float32) + (1 - share) * trajectory, np.float32)


def _products(some: Floats, others: Floats) -> Floats:
    """`[n, S]`: dot products of `[n, D]` and `[S, D]`. Small n avoid BLAS: its threads would delay the model's."""
    if len(some) > _FEW:
        return some @ others.T
    return np.asarray(np.einsum("nd,sd->ns", some, others), np.float32)


def _inverse_norms(maps: Floats) -> Floats:
    """`[n, L]`: one over the norm of each map's first l + 1 layers, flattened; 0 if they are all zero."""
    norms = np.sqrt(np.square(maps, dtype=np.float64).sum(axis=2).cumsum(axis=1))
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    return np.asarray(inverse, np.float32)


def _unit(vectors: Floats) -> Floats:
    """Scales vectors along the last axis to length 1; zero stays zero."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(norms > 0, norms, 1), np.float32)
