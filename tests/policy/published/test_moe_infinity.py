"""`MoEInfinityPolicy` against a slow implementation of the paper's formulas, and its collection."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.policy.published.moe_infinity import (
    ActivationCollection,
    MoEInfinityPolicy,
    cluster_medoids,
    normalize_rows,
)
from finemoe.types import DECODE, Recorded, Routed
from tests.policy.workload import Shape, recorded, workload

SHAPE = Shape(layers=4, experts=6, active=2)
Matrix = npt.NDArray[np.float64]


def cosine(a: Matrix, b: Matrix) -> float:
    norms = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norms if norms > 0 else 0.0


def distance(a: Matrix, b: Matrix) -> float:
    """Over the layers with activations in `a`."""
    known = [layer for layer in range(len(a)) if a[layer].any()]
    return 1 - sum(cosine(a[layer], b[layer]) for layer in known) / max(1, len(known))


def ratio(matrix: Matrix) -> Matrix:
    sums = matrix.sum(axis=1, keepdims=True)
    return matrix / np.where(sums > 0, sums, 1)


def any_of(p: list[Matrix]) -> Matrix:
    return 1 - np.prod([1 - one for one in p], axis=0) if p else np.zeros((SHAPE.layers, SHAPE.experts))


class Plain:
    """A slow implementation of the policy."""

    def __init__(self) -> None:
        self.stored: list[Matrix] = []
        self.running: dict[int, Matrix] = {}

    def learn(self, past: Recorded) -> None:
        matrix = np.zeros((SHAPE.layers, SHAPE.experts))
        for i, phase in enumerate(past.phases):
            spread = SHAPE.active * past.gates[i] / past.gates[i].sum(axis=1, keepdims=True)
            matrix += past.executed[i] if phase == DECODE else spread
        self.stored.append(matrix)

    def begin(self, requests: list[int]) -> None:
        for request in [old for old in self.running if old not in requests]:
            self.stored.append(self.running.pop(request))
        self.running = {r: self.running.get(r, np.zeros((SHAPE.layers, SHAPE.experts))) for r in requests}

    def routed(self, phases: list[int], event: Routed) -> None:
        assert event.gates is not None
        for matrix, phase, gates in zip(self.running.values(), phases, event.gates, strict=True):
            if phase == DECODE:
                matrix[event.layer, np.argsort(-gates, kind="stable")[: SHAPE.active]] += 1
            else:
                needed = list(event.experts)
                matrix[event.layer, needed] += (SHAPE.active * gates / gates.sum())[needed]

    def scores(self, now: int) -> tuple[Matrix, Matrix]:
        current = any_of([ratio(matrix) for matrix in self.running.values()])
        nearest = [min(self.stored, key=lambda old, m=m: distance(m, old)) for m in self.running.values()]  # type: ignore[misc]
        ahead = any_of([ratio(matrix) for matrix in nearest])
        retention_priority, prefetch_priority = np.zeros_like(current), np.zeros_like(current)
        for layer in range(SHAPE.layers):
            retention_priority[layer] = (current[layer] + 1e-8) * (1 - layer / SHAPE.layers)
            if layer > now:
                prefetch_priority[layer] = ahead[layer] * (1 - (layer - now) / SHAPE.layers)
        return np.maximum(retention_priority, prefetch_priority), prefetch_priority


@given(st.integers(0, 10**6), st.integers(1, 3), st.booleans())
@settings(max_examples=60)
def test_policy_matches_its_formulas(seed: int, batch: int, truncated: bool) -> None:
    fast, plain = MoEInfinityPolicy(SHAPE.layers, SHAPE.experts, active=SHAPE.active), Plain()
    for past in (recorded(seed + i, SHAPE) for i in range(3)):
        fast.learn(past)
        plain.learn(past)
    for iteration in workload(seed + 9, SHAPE, iterations=10, batch=batch, truncated=truncated):
        plain.begin([step.request for step in iteration.steps])
        fast.begin(iteration.steps)
        assert not fast.prefetch_priority.any()
        for event in iteration.events:
            plain.routed([step.phase for step in iteration.steps], event)
            fast.routed(event)
            retention_priority, prefetch_priority = plain.scores(event.layer)
            np.testing.assert_allclose(fast.prefetch_priority, prefetch_priority, rtol=1e-4, atol=1e-7)
            np.testing.assert_allclose(fast.retention_priority, retention_priority, rtol=1e-4, atol=1e-7)


def biased(seed: int, favourite: int) -> Matrix:
    """The matrix of a request that uses one expert of each layer most."""
    matrix = np.random.default_rng(seed).random((SHAPE.layers, SHAPE.experts))
    matrix[:, favourite] += 20
    return matrix


def test_a_full_collection_keeps_one_of_each_cluster() -> None:
    collection = ActivationCollection(SHAPE.layers, SHAPE.experts, capacity=4)
    for i in range(8):
        collection.add(biased(i, favourite=i // 2))
    kept = {int(share.sum(axis=0).argmax()) for share in collection.shares[: collection.size]}
    assert kept == {0, 1, 2, 3}
    np.testing.assert_allclose(collection.shares[: collection.size].sum(axis=2), 1)


@given(st.integers(0, 10**6), st.integers(1, 6))
def test_medoids_are_distinct_members_and_at_most_count(seed: int, count: int) -> None:
    matrices = normalize_rows(np.random.default_rng(seed).random((12, SHAPE.layers, SHAPE.experts)))
    chosen = cluster_medoids(matrices, count)
    assert chosen == sorted(set(chosen))
    assert 1 <= len(chosen) <= count
    assert all(0 <= index < 12 for index in chosen)


def test_a_request_is_added_to_the_collection_when_it_ends() -> None:
    policy = MoEInfinityPolicy(SHAPE.layers, SHAPE.experts)
    for iteration in workload(0, SHAPE, iterations=30, batch=3):
        previous = {step.request for step in policy._steps}
        size = policy.collection.size
        policy.begin(iteration.steps)
        ended = previous - {step.request for step in iteration.steps}
        assert policy.collection.size == size + len(ended)
        for event in iteration.events:
            policy.routed(event)
