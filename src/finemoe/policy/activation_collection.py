"""MoE-Infinity's collection of expert activation matrices, thinned by clustering."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from finemoe.policy.book import Scores

Floats = npt.NDArray[np.float32]

_ROUNDS = 10  # of k-means


class Collection:
    """Activation matrices of `P` requests at most: how often each expert of each layer was active in them.

    Source: arXiv 2401.14361, "Expert Activation Matrix Collection". The distance of two matrices is one less the mean,
    over the layers, of the cosine between their rows. K-means in that distance makes `P` clusters, and the matrix
    nearest each centroid is kept.

    Deviations: the paper clusters a data set beforehand and once more when predictions get worse; here the first `P`
    requests are all kept, and whenever as many new ones have come as are kept, the old and the new are clustered.
    Where a cluster ends up empty, fewer than `P` are kept until others come.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
        capacity: `P`.

    Attributes:
        size: how many are kept; the arrays are valid up to there.
        columns: `[L, E, P]`, rows scaled to length 1, so that a dot product with a row gives its cosine.
        shares: `[P, L, E]`, rows scaled to a sum of 1: the share of a layer's activations that fell to an expert.
    """

    def __init__(self, layers: int, experts: int, capacity: int) -> None:
        self.size = 0
        self.columns: Floats = np.zeros((layers, experts, capacity), np.float32)
        self.shares: Scores = np.zeros((capacity, layers, experts))
        self._waiting: list[Scores] = []

    def add(self, matrix: npt.NDArray[np.floating]) -> None:
        """Takes in a finished request's matrix `[L, E]`."""
        sums = matrix.sum(axis=1, keepdims=True)
        share = np.divide(matrix, sums, out=np.zeros(matrix.shape), where=sums > 0)
        if self.size < len(self.shares):
            self._keep(self.size, share)
            self.size += 1
            return
        self._waiting.append(share)
        if len(self._waiting) == len(self.shares):
            everything = np.concatenate([self.shares, np.stack(self._waiting)])
            self._waiting.clear()
            chosen = representatives(unit_rows(everything), len(self.shares))
            self.size = len(chosen)
            for place, index in enumerate(chosen):
                self._keep(place, everything[index])

    def _keep(self, place: int, share: Scores) -> None:
        self.shares[place] = share
        self.columns[:, :, place] = unit_rows(share)


def unit_rows(matrices: npt.NDArray[np.floating]) -> Floats:
    """Rows scaled to length 1; zero stays zero."""
    norms = np.linalg.norm(matrices, axis=-1, keepdims=True)
    return np.asarray(matrices / np.where(norms > 0, norms, 1), np.float32)


def representatives(matrices: Floats, count: int) -> list[int]:
    """K-means of `[n, L, E]`, rows of length 1, around `count` centroids that start spread over the sequence.

    Returns:
        For each cluster that has members, the index of the one nearest its centroid, ascending.
    """
    flat = matrices.reshape(len(matrices), -1)
    centroids = flat[np.arange(count) * len(flat) // count]
    for _ in range(_ROUNDS):
        nearest = (flat @ centroids.T).argmax(axis=1)
        sums = np.zeros_like(centroids)
        np.add.at(sums, nearest, flat)
        moved = unit_rows(sums.reshape(count, *matrices.shape[1:])).reshape(count, -1)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    alike = flat @ centroids.T
    nearest = alike.argmax(axis=1)
    chosen = []
    for cluster in np.unique(nearest):
        members = np.flatnonzero(nearest == cluster)
        chosen.append(int(members[alike[members, cluster].argmax()]))
    return sorted(chosen)
