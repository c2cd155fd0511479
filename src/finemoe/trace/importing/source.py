"""The interface of importers (`TraceSource`), and helpers that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finemoe.trace.format import RequestTrace, TraceHeader

Progress = Callable[[list[Path]], Iterable[Path]]


class TraceSource(Protocol):
    """Routing in another tool's layout, opened and checked."""

    notices: list[str]  # for the user: facts that were derived, fields that are missing

    def header(self, licence: str | None) -> TraceHeader:
        """Header of the trace to write."""

    def requests(self) -> Iterator[RequestTrace]:
        """The requests, in the source's order.

        Raises:
            TraceError: damaged; the message names the file and the place in it.
        """

    def __len__(self) -> int:
        """Number of requests."""


class Vocabulary:
    """Assigns ids to token strings in order of first appearance, for sources without token ids."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def encode(self, tokens: list[str]) -> NDArray[np.int32]:
        return np.array([self._ids.setdefault(token, len(self._ids)) for token in tokens], np.int32)

    @property
    def strings(self) -> tuple[str, ...]:
        return tuple(self._ids)


def by_weight(ids: NDArray[Any], weights: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sorts ids and weights `[T, L, K]` by weight, descending, along the last axis; no copy if they are sorted."""
    if weights.shape[-1] < 2 or not (np.diff(weights, axis=-1) > 0).any():
        return ids, weights
    order = np.argsort(-weights, axis=-1, kind="stable")
    return np.take_along_axis(ids, order, -1), np.take_along_axis(weights, order, -1)


def derived_experts(highest: int, given: int | None, notices: list[str]) -> int:
    """`E` for a source that does not state it: the user's value, else one above the highest expert id.

    Args:
        highest: largest expert id of the source.
        given: the user's value.
        notices: gets a notice if `E` was derived.
    """
    if given is None:
        notices.append(f"experts: taken to be {highest + 1}, one above the highest id; if there are more, --experts")
    return highest + 1 if given is None else given
