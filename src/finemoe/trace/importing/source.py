"""What every importer gives: a header, and requests one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from finemoe.trace.format import RequestTrace, TraceHeader

Progress = Callable[[list[Path]], Iterable[Path]]


class TraceSource(Protocol):
    """Routing in a foreign layout, opened and checked."""

    notices: list[str]  # what the user should know: what was derived, what is missing

    def header(self, licence: str | None) -> TraceHeader:
        """Of the trace to be."""

    def requests(self) -> Iterator[RequestTrace]:
        """In the source's order.

        Raises:
            TraceError: damaged; the message names file and place.
        """

    def __len__(self) -> int:
        """Requests."""


class Vocabulary:
    """Numbers strings in the order of their first appearance: ids for sources that have token texts only."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def encode(self, tokens: list[str]) -> NDArray[np.int32]:
        return np.array([self._ids.setdefault(token, len(self._ids)) for token in tokens], np.int32)

    @property
    def strings(self) -> tuple[str, ...]:
        return tuple(self._ids)


def by_weight(ids: NDArray[Any], weights: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both `[n, L, K]`, ordered by weight, descending, along the last axis; as they are if they already were."""
    if weights.shape[-1] < 2 or not (np.diff(weights, axis=-1) > 0).any():
        return ids, weights
    order = np.argsort(-weights, axis=-1, kind="stable")
    return np.take_along_axis(ids, order, -1), np.take_along_axis(weights, order, -1)


def derived_experts(highest: int, told: int | None, notices: list[str]) -> int:
    """`E` where the source does not say: what the user told, or one above the highest id that was seen."""
    if told is None:
        notices.append(f"experts: taken to be {highest + 1}, one above the highest id; if there are more, --experts")
    return highest + 1 if told is None else told
