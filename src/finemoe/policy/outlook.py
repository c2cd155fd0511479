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


_CERTAIN = 1e-4  # chances closer to 0 or 1 are taken for this close
_STEP = 0.02  # of the learning


class Lookahead:
    """What the next layer's gate names, given this layer's hidden states, and how far that can be trusted.

    The gate names K of E experts. Of a chance p that was there without it, it makes
    `logit p' = a * logit p + b * [named] + c`, learned as it goes by logistic regression: what both the store and the
    gate know counts once.

    Args:
        experts: `E`.

    Attributes:
        weights: `[3]`, a, b and c.
    """

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self.weights: Scores = np.array([0.8, 2.5, -0.8])  # as for a recall of about 0.8; soon outweighed

    def name(self, ahead: npt.NDArray[np.float32], active: int) -> npt.NDArray[np.bool_]:
        """The `active` likeliest of `[E]`."""
        named = np.zeros(self._experts, np.bool_)
        named[np.argsort(-ahead, kind="stable")[:active]] = True
        return named & (ahead > 0)

    def judge(self, named: npt.NDArray[np.bool_], before: Scores, executed: npt.NDArray[np.bool_]) -> None:
        """What was named, of the chances `before`, turned out like this; all `[E]`."""
        inputs = self._inputs(named, before)
        self.weights -= _STEP * inputs @ (_sigmoid(self.weights @ inputs) - executed)

    def fuse(self, named: npt.NDArray[np.bool_], chances: Scores) -> None:
        """Changes chances `[E]` in the light of what was named. What is impossible stays so."""
        fused = _sigmoid(self.weights @ self._inputs(named, chances))
        chances[:] = np.where(chances > 0, fused, 0.0)

    def _inputs(self, named: npt.NDArray[np.bool_], chances: Scores) -> Scores:
        p = np.clip(chances, _CERTAIN, 1.0 - _CERTAIN)
        return np.stack([np.log(p / (1.0 - p)), named.astype(np.float64), np.ones(len(p))])


def _sigmoid(logits: Scores) -> Scores:
    return np.asarray(1.0 / (1.0 + np.exp(-logits)))
