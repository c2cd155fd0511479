"""K, the number of experts active per token, estimated from events; and the top k of a distribution."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from finemoe.jit import kernel
from finemoe.policy.cache_state import Scores
from finemoe.types import Routed

Distribution = npt.NDArray[np.floating]


class TopKEstimator:
    """K if given; otherwise an upper bound that events tighten.

    The experts of an event are the union over tokens and requests: at least K of them, and exactly K for one token. So
    the smallest union seen so far is the estimate. An event that states K (`Routed.active`) is used as such.

    Args:
        given: K where it is known.

    Attributes:
        count: the estimate; 0 before the first event.
    """

    def __init__(self, given: int | None = None) -> None:
        self.count = given or 0
        self._given = given is not None

    def observe(self, event: Routed) -> None:
        """Update the estimate from an event."""
        self.observe_count(event.active or len(event.experts))

    def observe_count(self, experts: int) -> None:
        """Update the estimate from a number of experts that is at least K; 0 is ignored."""
        if not self._given and experts and (experts < self.count or not self.count):
            self.count = experts


@kernel
def top_k_union(p: Distribution, count: int) -> Scores:
    """The probability that at least one request needs an expert, if each needs only its `count` likeliest.

    Args:
        p: `[B, E]`, one distribution per request. Ties go to the lower index.
        count: how many experts of each request to keep.

    Returns:
        `[E]`: `1 - prod_b (1 - p[b, e])` over the requests b that keep expert e.
    """
    missed = np.ones(p.shape[1])
    for b in range(len(p)):
        rest = p[b].astype(np.float64)
        for _ in range(min(count, len(rest))):
            best = rest.argmax()
            missed[best] *= 1.0 - rest[best]
            rest[best] = -np.inf
    return 1.0 - missed
