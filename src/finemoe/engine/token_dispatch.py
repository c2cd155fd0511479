"""Which rows of a pass each expert computes, and how its results are added up.

Experts' results are added in ascending order of experts, as transformers' eager experts do. A pass of one token, as in
decoding, needs none of the sorting and indexing that several need: `OneToken` gives the same bits as `Tokens` without.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes at which torch's own tensors start; a matmul may round otherwise for one that does not


class ExpertRows(Protocol):
    """The rows of each expert."""

    experts: tuple[int, ...]  # that have any, ascending

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Hidden states `[n, D]` and weights `[n, 1]`."""

    def add(self, output: Tensor, expert: int, result: Tensor) -> None:
        """Adds an expert's result `[n, D]` to the output `[T, D]`."""


def group_rows(index: Tensor, experts: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Which (k, token) pairs each expert computes, experts ascending; indices `>= experts` are nobody's.

    Rows of an expert are ordered by k, then by token, as in transformers' eager experts.

    Args:
        index: int `[T, K]`.

    Returns:
        expert -> (k `[n]`, token `[n]`).
    """
    tokens = index.shape[0]
    ranked, pairs = torch.sort(index.T.reshape(-1), stable=True)
    hit, counts = torch.unique_consecutive(ranked, return_counts=True)
    ks, ts = pairs // tokens, pairs % tokens
    sizes = counts.tolist()
    rows = zip(hit.tolist(), ks.split(sizes), ts.split(sizes), strict=True)
    return {expert: (k, t) for expert, k, t in rows if 0 <= expert < experts}


class Tokens:
    """Of any number of tokens.

    Args:
        hidden: `[T, D]`.
        index: executed experts, int `[T, K]`; `>= experts` is nobody.
        weights: `[T, K]`.
        experts: `E`.
    """

    def __init__(self, hidden: Tensor, index: Tensor, weights: Tensor, experts: int) -> None:
        self._hidden, self._weights = hidden, weights
        self._rows = group_rows(index, experts)
        self.experts = tuple(self._rows)

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        k, t = self._rows[expert]
        return self._hidden[t], self._weights[t, k, None]

    def add(self, output: Tensor, expert: int, result: Tensor) -> None:
        output.index_add_(0, self._rows[expert][1], result)


class OneToken:
    """Of a single token, whose experts are all different.

    Args:
        hidden: `[1, D]`, contiguous, and aligned as a tensor of its own.
        places: expert -> its place among the K, experts ascending.
        weights: `[1, K]`.
    """

    def __init__(self, hidden: Tensor, places: dict[int, int], weights: Tensor) -> None:
        self._hidden, self._places, self._weights = hidden, places, weights
        self.experts = tuple(places)

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        k = self._places[expert]
        return self._hidden, self._weights[:, k : k + 1]

    def add(self, output: Tensor, expert: int, result: Tensor) -> None:
        del expert
        output.add_(result)


def rows_of(hidden: Tensor, index: Tensor, weights: Tensor, experts: int) -> ExpertRows:
    """`OneToken` where that will do, otherwise `Tokens`; arguments as there."""
    if hidden.shape[0] == 1 and hidden.data_ptr() % _ALIGNMENT == 0 and hidden.is_contiguous():
        executed = index[0].tolist()
        places = dict(sorted(zip(executed, range(len(executed)), strict=True)))
        if len(places) == len(executed):
            return OneToken(hidden, {expert: k for expert, k in places.items() if 0 <= expert < experts}, weights)
    return Tokens(hidden, index, weights, experts)
