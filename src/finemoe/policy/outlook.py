"""What an expert is worth: its chances to be needed, discounted by how long that takes."""

from __future__ import annotations

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
