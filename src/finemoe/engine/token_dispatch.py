"""Token dispatch: gathers the rows of a pass that each expert computes, and adds its results to the output.

Results are added in ascending order of experts, as transformers' eager experts do. A pass of one token, as in decoding,
needs none of the sorting and indexing that several do: `SingleTokenDispatch` gives the same bits as `BatchDispatch`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_ALIGNMENT_BYTES = 64  # of torch's own tensors; a matmul may round differently on an input that is not aligned


class TokenDispatch(Protocol):
    """The rows of each expert."""

    experts: tuple[int, ...]  # those with at least one row, ascending

    def rows(self, expert: int) -> tuple[Tensor, Tensor]:
        """Hidden states `[n, D]` and routing weights `[n, 1]`."""

    def add(self, output: Tensor, expert: int, result: Tensor) -> None:
        """Adds an expert's result `[n, D]` to the output `[T, D]`, in place."""


def dispatch_tokens(hidden: Tensor, index: Tensor, weights: Tensor, experts: int) -> TokenDispatch:
    """`SingleTokenDispatch` where its conditions hold, otherwise `BatchDispatch`.

    Args:
        hidden: `[T, D]`.
        index: executed experts, int `[T, K]`; entries `>= experts` are ignored.
        weights: `[T, K]`.
        experts: `E`.
    """
    if hidden.shape[0] == 1 and hidden.data_ptr() % _ALIGNMENT_BYTES == 0 and hidden.is_contiguous():
        executed = index[0].tolist()
        positions = dict(sorted(zip(executed, range(len(executed)), strict=True)))
        if len(positions) == len(executed):
            own = {expert: k for expert, k in positions.items() if 0 <= expert < experts}
            return SingleTokenDispatch(hidden, own, weights)
    return BatchDispatch(hidden, index, weights, experts)


class BatchDispatch:
    """Dispatch of any number of tokens. Arguments as in `dispatch_tokens`."""

    def __init__(self, hidden: Tensor, index: Tensor, weights: Tensor, experts: int) -> None:
        self._hidden, self._weights = hidden, weights
        self._groups = group_rows(index, experts)
        self.experts = tuple(self._groups)

    def rows(self, expert: int) -> tuple[Tensor, Tensor]:
        k, t = self._groups[expert]
        return self._hidden[t], self._weights[t, k, None]

    def add(self, output: Tensor, expert: int, result: Tensor) -> None:
        output.index_add_(0, self._groups[expert][1], result)


class SingleTokenDispatch:
    """Dispatch of one token, whose experts are distinct.

    Args:
        hidden: `[1, D]`, contiguous and aligned like a newly allocated tensor.
        positions: expert -> its position among the K, experts ascending.
        weights: `[1, K]`.
    """

    def __init__(self, hidden: Tensor, positions: dict[int, int], weights: Tensor) -> None:
        self._hidden, self._positions, self._weights = hidden, positions, weights
        self.experts = tuple(positions)

    def rows(self, expert: int) -> tuple[Tensor, Tensor]:
        k = self._positions[expert]
        return self._hidden, self._weights[:, k : k + 1]

    def add(self, output: Tensor, expert: int, result: Tensor) -> None:
        del expert
        output.add_(result)


def group_rows(index: Tensor, experts: int) -> dict[int, tuple[Tensor, Tensor]]:
    """The (k, token) pairs that each expert computes, experts ascending; entries `>= experts` are ignored.

    Rows of an expert are ordered by k, then by token, as in transformers' eager experts.

    Args:
        index: int `[T, K]`.
        experts: `E`.

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
