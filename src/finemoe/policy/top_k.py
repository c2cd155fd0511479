"""K, the number of experts active per token, as far as events tell; and the likeliest K of a distribution."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from finemoe.jit import kernel
from finemoe.policy.cache_state import Scores
from finemoe.types import Routed

Distribution = npt.NDArray[np.floating]


class TopKEstimator:
    """K: as given, or the fewest experts that any event said that a token uses, or needed, so far.

    An event is the union over tokens and requests, so it never needs fewer than K; one token alone needs exactly K.

    Args:
        given: K where it is known.
    """

    def __init__(self, given: int | None = None) -> None:
        self.count = given or 0  # 0: nothing seen yet
        self._given = given is not None

    def hear(self, event: Routed) -> None:
        """An event tells what a token uses, or what all of its tokens need."""
        self.see(event.active or len(event.experts))

    def see(self, needed: int) -> None:
        """A token uses no more than so many experts."""
        if not self._given and needed and (needed < self.count or not self.count):
            self.count = needed


@kernel
def likeliest(p: Distribution, count: int) -> Scores:
    """The chance that any of these requests needs an expert, counting only the `count` likeliest of each.

    Args:
        p: `[B, E]`, one distribution per request. Ties go to the lower index.
        count: how many to keep.

    Returns:
        `[E]`: `1 - prod(1 - p)` over the requests that keep the expert.
    """
    missed = np.ones(p.shape[1])
    for b in range(len(p)):
        rest = p[b].astype(np.float64)
        for _ in range(min(count, len(rest))):
            best = rest.argmax()
            missed[best] *= 1.0 - rest[best]
            rest[best] = -np.inf
    return 1.0 - missed
