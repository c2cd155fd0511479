"""`ProMoEPolicy` against a slow implementation, and the inputs of its predictors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.errors import ConfigError
from finemoe.policy.published.promoe import Predictors, ProMoEPolicy, input_indices
from tests.policy.workload import Iteration, Shape, untrained, workload

SHAPE = Shape(layers=4, experts=6, active=2)


class Plain:
    """A slow implementation: all gates of each request are kept, networks are evaluated weight by weight."""

    def __init__(self, predictors: Predictors) -> None:
        self.predictors = predictors
        self.seen: dict[int, list[list[list[float]]]] = {}  # by request, layer and iteration: roots of the gates
        self.p: dict[int, list[float]] = {}  # by layer

    def mean(self, rows: list[list[float]]) -> list[float]:
        mean = [0.0] * SHAPE.experts
        for row in rows:
            mean = [0.9 * m + 0.1 * x for m, x in zip(mean, row, strict=True)]
        return mean

    def chance(self, request: int, layer: int) -> list[float]:
        w, seen = self.predictors, self.seen[request]
        target = (layer + w.stride) % SHAPE.layers
        nothing = [0.0] * SHAPE.experts
        x: list[float] = []
        for of in [*((layer - back) % SHAPE.layers for back in range(w.history)), target]:
            x += seen[of][-1] if seen[of] else nothing
        x += self.mean(seen[target])
        hidden = [
            max(0.0, w.inner_bias[layer, h] + sum(x[f] * w.inner[layer, f, h] for f in range(len(x))))
            for h in range(w.inner.shape[2])
        ]
        logits = [
            w.outer_bias[layer, e] + sum(hidden[h] * w.outer[layer, h, e] for h in range(len(hidden)))
            for e in range(SHAPE.experts)
        ]
        p = [1 / (1 + math.exp(-logit)) for logit in logits]
        top = sorted(range(SHAPE.experts), key=lambda e: -p[e])[: SHAPE.active]
        return [p[e] if e in top else 0.0 for e in range(SHAPE.experts)]

    def routed(self, iteration: Iteration, layer: int) -> list[list[float]]:
        """Prefetch priorities `[L, E]`."""
        gates = iteration.events[layer].gates
        assert gates is not None
        requests = [step.request for step in iteration.steps]
        for b, request in enumerate(requests):
            layers = self.seen.setdefault(request, [[] for _ in range(SHAPE.layers)])
            layers[layer].append([math.sqrt(g) for g in gates[b]])
        chances = [self.chance(request, layer) for request in requests]
        missed = [math.prod(1 - p[e] for p in chances) for e in range(SHAPE.experts)]
        self.p[(layer + self.predictors.stride) % SHAPE.layers] = [1 - x for x in missed]
        prefetch_priority = [[0.0] * SHAPE.experts for _ in range(SHAPE.layers)]
        for ahead in range(1, self.predictors.stride + 1):
            near = self.predictors.stride - ahead
            row = self.p.get((layer + ahead) % SHAPE.layers, [0.0] * SHAPE.experts)
            prefetch_priority[(layer + ahead) % SHAPE.layers] = [p + near if p > 0 else 0.0 for p in row]
        return prefetch_priority


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 4))
@settings(max_examples=25)
def test_policy_matches_the_slow_implementation(seed: int, stride: int, history: int) -> None:
    predictors = untrained(SHAPE, stride=stride, history=history)
    fast, plain = ProMoEPolicy(SHAPE.layers, SHAPE.experts, predictors, SHAPE.active), Plain(predictors)
    for iteration in workload(seed, SHAPE, iterations=5):
        fast.begin(iteration.steps)
        plain.seen = {step.request: plain.seen[step.request] for step in iteration.steps if step.request in plain.seen}
        for event in iteration.events:
            prefetch_priority = plain.routed(iteration, event.layer)
            fast.routed(event)
            np.testing.assert_allclose(fast.prefetch_priority, prefetch_priority, rtol=1e-4, atol=1e-7)
            assert (
                (fast.retention_priority > fast.recency.retention_priority.max()) == (fast.prefetch_priority > 0)
            ).all()


def test_inputs_reach_back_into_the_previous_iteration_and_never_ahead() -> None:
    layers, experts, stride, history = 4, 3, 2, 3
    where = np.array(np.unravel_index(input_indices(layers, experts, stride, history), (2, 2, layers, experts)))
    for layer in range(layers):
        now, kind, of, expert = where[:, layer].reshape(4, history + 2, experts)
        assert (expert == np.arange(experts)).all()
        assert kind[:, 0].tolist() == [0] * (history + 1) + [1]
        assert of[:history, 0].tolist() == [(layer - back) % layers for back in range(history)]
        assert (of[history:] == (layer + stride) % layers).all()
        assert ((now == 1) == (of <= layer)).all()


def test_predictors_of_another_shape_are_refused() -> None:
    with pytest.raises(ConfigError, match="the predictors are for 4 layers of 6 experts, the model has 4 of 8"):
        ProMoEPolicy(4, 8, untrained(SHAPE))
