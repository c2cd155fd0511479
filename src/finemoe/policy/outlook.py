"""What an expert is worth: its chances to be needed, discounted by how long that takes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from finemoe.policy.book import Scores
from finemoe.policy.kernel import kernel


@kernel
def appraise(now: int, discount: float, chances: Scores, frequency: Scores, value: Scores) -> None:
    """The discounted chance of each expert's next use, once layer `now` is known (-1: none yet).

    An expert of a layer d layers ahead, this iteration's or the next one's, is worth `g^(d / L) * h`, with
    `h = p_0 + (1 - p_0) * g * (p_1 + (1 - p_1) * g * ..)` over the iterations from that one on, g the discount. After
    the last one that is told, uses come at the request's frequency: `h = f / (1 - g * (1 - f))`.

    Args:
        chances: `[horizon + 1, L, E]`, of this iteration and those after it.
        frequency: `[L, E]`.
        value: `[L, E]`, filled in.
    """
    told, layers, experts = chances.shape
    for layer in range(layers):
        passed = layer <= now
        ahead = layer - now + (layers if passed else 0)
        nearness = discount ** (ahead / layers)
        for expert in range(experts):
            f = frequency[layer, expert]
            h = f / (1.0 - discount * (1.0 - f))
            for j in range(told - 1, 0 if passed else -1, -1):
                p = chances[j, layer, expert]
                h = p + (1.0 - p) * discount * h
            value[layer, expert] = nearness * h


class Lookahead:
    """What the next layer's gate names, given this layer's hidden states, and how far that can be trusted.

    The gate names K of E experts. That so many of those executed are among the named, its recall R, is learned as it
    goes; then Bayes' rule gives a named expert the likelihood ratio `R : K (1 - R) / (E - K)`, any other the ratio of
    the complements.

    Args:
        experts: `E`.
    """

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._executed, self._right = 10.0, 8.0  # published recalls are about 0.8; soon outweighed

    @property
    def record(self) -> Scores:
        """`[2]`: how many were executed, and how many of these named, so far. It can be set."""
        return np.array([self._executed, self._right])

    @record.setter
    def record(self, record: Scores) -> None:
        self._executed, self._right = map(float, record)

    def name(self, ahead: npt.NDArray[np.float32], active: int) -> npt.NDArray[np.bool_]:
        """The `active` likeliest of `[E]`."""
        named = np.zeros(self._experts, np.bool_)
        named[np.argsort(-ahead, kind="stable")[:active]] = True
        return named & (ahead > 0)

    def judge(self, named: npt.NDArray[np.bool_], executed: npt.NDArray[np.bool_]) -> None:
        """What was named turned out like this, both `[E]`."""
        self._executed += float(executed.sum())
        self._right += float((named & executed).sum())

    def fuse(self, named: npt.NDArray[np.bool_], chances: Scores) -> None:
        """Changes chances `[E]` in the light of what was named."""
        recall = self._right / self._executed
        count = float(named.sum())
        mistaken = min(1.0, count * (1.0 - recall) / max(1.0, self._experts - count))
        used = np.where(named, recall, 1.0 - recall) * chances
        unused = np.where(named, mistaken, 1.0 - mistaken) * (1.0 - chances)
        total = used + unused
        chances[:] = np.divide(used, total, out=chances.copy(), where=total > 0)
