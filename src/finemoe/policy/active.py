"""K, the number of experts active per token, where nobody tells it; and the likeliest K of a distribution."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Distribution = npt.NDArray[np.floating]


class Active:
    """K: as given, or the fewest experts that any event needed so far.

    An event is the union over tokens and requests, so it never needs fewer than K; one token alone needs exactly K.

    Args:
        given: K where it is known.
    """

    def __init__(self, given: int | None = None) -> None:
        self.count = given or 0  # 0: nothing seen yet
        self._given = given is not None

    def see(self, needed: int) -> None:
        """An event needed so many experts."""
        if not self._given and needed and (needed < self.count or not self.count):
            self.count = needed


def likeliest(p: Distribution, count: int) -> npt.NDArray[np.float64]:
    """The chance that any of these requests needs an expert, counting only the `count` likeliest of each.

    Args:
        p: `[B, E]`, one distribution per request. Ties go to the lower index.
        count: how many to keep.

    Returns:
        `[E]`: as `any_of`, over the requests that keep the expert.
    """
    rows = np.arange(len(p))[:, None]
    top = np.argsort(-p, axis=1, kind="stable")[:, :count]
    kept = np.zeros(p.shape)
    kept[rows, top] = p[rows, top]
    return any_of(kept)


def any_of(p: Distribution) -> npt.NDArray[np.float64]:
    """`[B, E]` chances, one row per request -> `[E]`: the chance that at least one request is right."""
    missed = np.ones(p.shape[1])
    for row in p:
        missed *= 1.0 - row
    return 1.0 - missed
