"""LRU with a window of layers ahead: what prefetching baselines with a recency cache have in common."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from finemoe.policy.base import Policy
from finemoe.policy.book import Scores
from finemoe.policy.cache import RECENCY, make_ranking, visit

KEPT = float(1 << 40)  # worth more than any use; what is wanted for a layer ahead is worth that and its want
_NO_FUTURE = np.empty(0, np.int64)


class Ahead(Policy):
    """Least recently used goes first, except that what is wanted for a layer just ahead stays until that layer ran.

    A prefetch is not a use. One that proves useless falls back to the recency that it had, and so is among the first
    to go, as if it had come into a buffer of its own. The scores are not comparable (`margin`): recency has no unit in
    common with a probability.
    """

    prefetches = True
    stride: int = 1  # how many layers ahead are wanted at most, counted over the end of the iteration

    def __init__(self, layers: int, experts: int) -> None:
        super().__init__(layers, experts)
        self.recency = make_ranking(layers, experts, -1.0)
        self.worth[:] = self.recency.worth
        self._wanted: list[int] = []  # layers with wants

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """Books an access event, and drops the wants for layers that it leaves behind."""
        visit(RECENCY, 1.0, self.recency, layer, np.asarray(experts, np.int64), _NO_FUTURE)
        self.worth[layer] = self.recency.worth[layer]
        for wanted in tuple(self._wanted):
            if (wanted - layer - 1) % self.layers >= self.stride or wanted == layer:
                self._wanted.remove(wanted)
                self.want[wanted] = 0.0
                self.worth[wanted] = self.recency.worth[wanted]

    def anticipate(self, layer: int, want: Scores) -> None:
        """These `[E]` of a layer ahead are wanted; its other experts are not."""
        self.want[layer] = want
        self.worth[layer] = np.where(want > 0, KEPT + want, self.recency.worth[layer])
        if layer not in self._wanted:
            self._wanted.append(layer)
