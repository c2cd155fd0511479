"""Which waiting answers run next: those that need what is needed anyway, but none is overtaken for ever. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Expected = npt.NDArray[np.float64]  # [L, E], the share of its tokens that an answer will send to each expert
OVERTAKEN = 4  # times, at most, by whoever came later


@dataclass(frozen=True)
class Waiting:
    """An answer that waits. `expected` is `None` where nothing is foreseen."""

    expected: Expected | None
    overtakable: int  # so many may still go before it


def choose(waiting: Sequence[Waiting], running: Sequence[Expected | None], places: int) -> list[int]:
    """Who takes the free places.

    One after the other: of those that overtake nobody who may not be overtaken any more, the one of whose expected
    experts the largest share is expected of those that run, and of those chosen before. The one that came first, where
    nothing is known or shares are equal.

    Args:
        waiting: in the order in which they came.
        running: what those that run are expected to use.
        places: how many may join them.

    Returns:
        indices into `waiting`, in the order of the choice; as many as there are places or waiting answers.
    """
    unused: Expected | None = None  # [L, E], the chance that nobody needs it
    for expected in running:
        unused = _without(unused, expected)
    left, chosen = list(range(len(waiting))), list[int]()
    overtakable = [each.overtakable for each in waiting]
    while left and len(chosen) < places:
        free = next((place for place, index in enumerate(left) if overtakable[index] < 1), len(left) - 1)
        new = [_new(waiting[index].expected, unused) for index in left[: free + 1]]
        place = int(np.argmin(new))  # the first of equals
        for index in left[:place]:
            overtakable[index] -= 1
        chosen.append(left.pop(place))
        unused = _without(unused, waiting[chosen[-1]].expected)
    return chosen


def overtaken(index: int, chosen: Sequence[int]) -> int:
    """How many of those chosen went before this one, which was not, though they came later."""
    return sum(other > index for other in chosen)


def _without(unused: Expected | None, expected: Expected | None) -> Expected | None:
    if expected is None:
        return unused
    return 1.0 - expected if unused is None else unused * (1.0 - expected)


def _new(expected: Expected | None, unused: Expected | None) -> float:
    """Of what an answer is expected to use, the share that nobody else does; 1 where that is not known."""
    if expected is None or unused is None:
        return 1.0
    whole = float(expected.sum())
    return float((expected * unused).sum()) / whole if whole > 0.0 else 1.0
