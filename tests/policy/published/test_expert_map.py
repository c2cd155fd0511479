"""`ExpertMapPolicy` against a slow implementation of the paper's formulas."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finemoe.policy.published.expert_map import ExpertMapPolicy, select_experts
from finemoe.policy.published.expert_map_store import ExpertMapStore
from finemoe.policy.published.lru_prefetch import PROTECTED
from finemoe.types import Recorded
from tests.policy.workload import Iteration, Shape, recorded, workload

SHAPE = Shape(layers=5, experts=6, active=2)
Vector = npt.NDArray[np.float64]


def cosine(a: Vector, b: Vector) -> float:
    norms = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norms if norms > 0 else 0.0


@dataclass
class Row:
    map: Vector  # [L, E]
    token: int
    key: Vector | None


def semantic_similarity(a: Row, b: Row) -> float:
    """Of two iterations."""
    return float(a.token == b.token) if a.key is None or b.key is None else cosine(a.key, b.key)


@dataclass
class Plain:
    """A slow implementation of the policy."""

    capacity: int
    distance: int
    active: int
    rows: list[Row] = field(default_factory=list)
    born: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = (SHAPE.layers, SHAPE.experts)
        self.p, self.selected, self.frequency = np.zeros(size), np.zeros(size), np.zeros(size)

    def insert(self, row: Row) -> None:
        self.born.append(1 + max(self.born, default=0))
        if len(self.rows) < self.capacity:
            self.rows.append(row)
            return
        share = self.distance / SHAPE.layers
        redundancy = [
            share * semantic_similarity(row, old) + (1 - share) * cosine(row.map.ravel(), old.map.ravel())
            for old in self.rows
        ]
        worst = int(np.argmax(redundancy))
        self.rows[worst], self.born[worst] = row, self.born.pop()

    def predict(self, layer: int, matches: list[tuple[Row, float]]) -> None:
        matches = [(row, score) for row, score in matches if score > 0]
        selected = np.zeros((len(matches), SHAPE.experts))
        for b, (row, score) in enumerate(matches):
            delta = min(max(1 - score, 0), 1)
            for expert in sorted(range(SHAPE.experts), key=lambda e, p=row.map[layer]: -p[e]):  # type: ignore[misc]
                if selected[b].sum() >= delta and (selected[b] > 0).sum() >= self.active:
                    break
                selected[b, expert] = row.map[layer, expert]
        self.selected[layer] = 1 - (1 - selected).prod(axis=0)
        if matches:
            self.p[layer] = 1 - np.prod([1 - row.map[layer] for row, _ in matches], axis=0)

    def semantic(self, row: Row) -> tuple[Row, float]:
        if row.key is None:
            same = [i for i, old in enumerate(self.rows) if old.token == row.token]
            return (self.rows[max(same, key=lambda i: self.born[i])], 1.0) if same else (row, 0.0)
        best = max(self.rows, key=lambda old: semantic_similarity(row, old), default=row)
        return best, semantic_similarity(row, best) if self.rows else 0.0

    def trajectory(self, row: Row, layer: int) -> tuple[Row, float]:
        def similarity(old: Row) -> float:
            return cosine(row.map[: layer + 1].ravel(), old.map[: layer + 1].ravel())

        best = max(self.rows, key=similarity, default=row)
        return best, similarity(best) if self.rows else 0.0

    def scores(self, now: int) -> tuple[Vector, Vector]:
        prefetch_priority, retention_priority = np.zeros_like(self.p), np.zeros_like(self.p)
        for layer in range(SHAPE.layers):
            for expert in range(SHAPE.experts):
                if now < layer <= now + self.distance:
                    prefetch_priority[layer, expert] = self.selected[layer, expert] / (layer - now)
                p = max(self.p[layer, expert], 1e-6)
                retention_priority[layer, expert] = p * self.frequency[layer, expert]
        return np.where(prefetch_priority > 0, PROTECTED + prefetch_priority, retention_priority), prefetch_priority


def rows_of(iteration: Iteration) -> list[Row]:
    maps = np.stack([event.gates for event in iteration.events if event.gates is not None], axis=1)
    return [
        Row(maps[b].astype(float), int(step.token_ids[-1]), None if step.embedding is None else step.embedding)  # type: ignore[arg-type]
        for b, step in enumerate(iteration.steps)
    ]


def learn(plain: Plain, past: Recorded) -> None:
    for i in range(len(past.token_ids)):
        key = None if past.embeddings is None else past.embeddings[i].astype(float)
        plain.insert(Row(past.gates[i].astype(float), int(past.token_ids[i]), key))


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 5), st.booleans(), st.booleans())
@settings(max_examples=60)
def test_policy_matches_its_formulas(
    seed: int, capacity: int, distance: int, embeddings: bool, truncated: bool
) -> None:
    fast = ExpertMapPolicy(SHAPE.layers, SHAPE.experts, capacity, distance, SHAPE.active)
    plain = Plain(capacity, distance, SHAPE.active)
    past = recorded(seed, SHAPE, embeddings=embeddings)
    fast.learn(past)
    learn(plain, past)
    for iteration in workload(seed + 1, SHAPE, iterations=6, embeddings=embeddings, truncated=truncated):
        rows = rows_of(iteration)
        plain.selected[:] = 0
        matches = [plain.semantic(row) for row in rows]
        for layer in range(distance):
            plain.predict(layer, matches)
        fast.begin(iteration.steps)
        np.testing.assert_allclose(fast.prefetch_priority, plain.scores(-1)[1], rtol=1e-4, atol=1e-7)
        for event in iteration.events:
            plain.frequency[event.layer, list(event.experts)] += 1
            if event.layer + distance < SHAPE.layers:
                plain.predict(event.layer + distance, [plain.trajectory(row, event.layer) for row in rows])
            fast.routed(event)
            retention_priority, prefetch_priority = plain.scores(event.layer)
            np.testing.assert_allclose(fast.prefetch_priority, prefetch_priority, rtol=1e-4, atol=1e-7)
            np.testing.assert_allclose(fast.retention_priority, retention_priority, rtol=1e-4, atol=1e-9)
        fast.end()
        for row in rows:
            plain.insert(row)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0, 1), st.integers(0, 8))
def test_the_selected_set_is_the_smallest_sufficient_one(p: list[float], delta: float, count: int) -> None:
    selected = np.empty(len(p))
    select_experts(np.array(p), delta, count, selected)
    kept = [value for value in selected if value > 0]
    assert kept == [value for i, value in enumerate(p) if selected[i] > 0]
    assert sorted(kept, reverse=True) == sorted(p, reverse=True)[: len(kept)]
    enough = len(kept) >= count and sum(sorted(kept, reverse=True)) >= delta
    assert enough or len(kept) == sum(value > 0 for value in p)
    if kept:
        fewer = sorted(kept, reverse=True)[:-1]
        assert len(fewer) < count or sum(fewer) < delta


def test_adding_maps_at_once_equals_adding_them_one_by_one() -> None:
    past = recorded(0, SHAPE, length=40)
    at_once, one_by_one = (ExpertMapStore(SHAPE.layers, SHAPE.experts, 7, 3) for _ in range(2))
    at_once.add(past.gates, past.token_ids, past.embeddings)
    for i in range(40):
        assert past.embeddings is not None
        one_by_one.add(past.gates[i : i + 1], past.token_ids[i : i + 1], past.embeddings[i : i + 1])
    np.testing.assert_array_equal(at_once.columns, one_by_one.columns)
    np.testing.assert_allclose(at_once.inverse_norms, one_by_one.inverse_norms, rtol=1e-6)


def test_a_repeated_iteration_is_predicted() -> None:
    policy = ExpertMapPolicy(SHAPE.layers, SHAPE.experts, active=SHAPE.active)
    (seen,) = workload(0, SHAPE, iterations=1, batch=1)
    for run in range(2):
        policy.begin(seen.steps)
        for event in seen.events:
            if run:
                assert np.flatnonzero(policy.prefetch_priority[event.layer]).tolist() == list(event.experts)
            policy.routed(event)
        policy.end()


def test_an_incomplete_iteration_is_not_stored() -> None:
    policy = ExpertMapPolicy(SHAPE.layers, SHAPE.experts)
    (cut,) = workload(0, SHAPE, iterations=1, batch=1)
    policy.begin(cut.steps)
    for event in cut.events[:-1]:
        policy.routed(event)
    policy.end()
    assert not policy.store.size


@pytest.mark.parametrize("distance", [1, 3, 9])
def test_layers_beyond_the_prefetch_distance_have_no_prefetch_priority(distance: int) -> None:
    policy = ExpertMapPolicy(SHAPE.layers, SHAPE.experts, distance=distance)
    policy.learn(recorded(0, SHAPE))
    for iteration in workload(0, SHAPE):
        policy.begin(iteration.steps)
        for event in iteration.events:
            policy.routed(event)
            prefetched = np.flatnonzero(policy.prefetch_priority.any(axis=1))
            assert all(event.layer < layer <= event.layer + distance for layer in prefetched)
