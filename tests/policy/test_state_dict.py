"""`state_dict` and `load_state_dict` of policies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.policy import FACTORIES, Policy, make_policy
from finemoe.policy.finemoe.history import NO_ROW, HistoryRows, history_from_rows, rows_from_history
from finemoe.policy.finemoe.policy import FinemoePolicy
from tests.policy.compile import compiled
from tests.policy.workload import Iteration, Shape, recorded, untrained, workload

SHAPE = Shape(layers=5, experts=6, active=2)
SIZE = SHAPE.layers, SHAPE.experts
PERSISTENT = [name for name, kind in FACTORIES.items() if kind.is_persistent]


def play(policy: Policy, played: list[Iteration]) -> None:
    for iteration in played:
        policy.begin(iteration.steps)
        for event in iteration.events:
            policy.routed(event)
        policy.end()


def trained(name: str, seed: int, capacity: int, **options: bool) -> Policy:
    """A policy that learned from recorded requests and from running ones."""
    policy = make_policy(name, *SIZE, capacity=capacity)
    for i in range(2):
        policy.learn(recorded(seed + i, SHAPE, embeddings=options["embeddings"]))
    play(policy, workload(seed, SHAPE, **options))
    policy.begin(())  # its requests end
    return policy


def later(seed: int, **options: bool) -> list[Iteration]:
    """Requests with new numbers."""
    played = workload(seed, SHAPE, **options)
    return [Iteration([s._replace(request=s.request + 1000) for s in it.steps], it.events) for it in played]


@pytest.mark.parametrize("name", PERSISTENT)
@given(st.integers(0, 10**6), st.sampled_from([1, 3, 9, 12, 40]), st.booleans(), st.booleans())
def test_a_policy_scores_the_same_after_loading(
    name: str, seed: int, capacity: int, embeddings: bool, truncated: bool
) -> None:
    options = {"embeddings": embeddings, "truncated": truncated}
    first = trained(name, seed, capacity, **options)
    second = make_policy(name, *SIZE, capacity=capacity)
    second.load_state_dict(first.state_dict())
    assert second.num_updates > 0
    for iteration in later(seed + 1, **options):
        for policy in (first, second):
            policy.begin(iteration.steps)
        np.testing.assert_array_equal(first.retention_priority, second.retention_priority)
        for event in iteration.events:
            for policy in (first, second):
                policy.routed(event)
            np.testing.assert_array_equal(first.retention_priority, second.retention_priority)
            np.testing.assert_array_equal(first.prefetch_priority, second.prefetch_priority)
        for policy in (first, second):
            policy.end()
    for ours, theirs in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        if ours.size > 1:  # the number of iterations is only restored for a full ring
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", PERSISTENT)
def test_state_dict_holds_copies(name: str) -> None:
    policy = trained(name, 0, 9, embeddings=True)
    state = policy.state_dict()
    before = {each: array.copy() for each, array in state.items()}
    play(policy, later(1))
    for each, array in state.items():
        np.testing.assert_array_equal(array, before[each])


@pytest.mark.parametrize("name", PERSISTENT)
@pytest.mark.parametrize("capacity", [1, 4, 100])
def test_a_smaller_capacity_keeps_the_newest(name: str, capacity: int) -> None:
    first = trained(name, 3, 10, embeddings=False)
    second = make_policy(name, *SIZE, capacity=capacity)
    second.load_state_dict(first.state_dict())
    ours, theirs = first.state_dict(), second.state_dict()
    assert len(theirs["tokens"]) == min(10, capacity)
    newest = np.arange(len(ours["tokens"]))[-capacity:]
    if "born" in ours:
        newest = np.sort(np.argsort(ours["born"])[-capacity:])
    np.testing.assert_array_equal(theirs["tokens"], ours["tokens"][newest])
    play(second, later(4))


def test_links_to_dropped_rows_are_cut() -> None:
    first = FinemoePolicy(*SIZE, capacity=10)
    first.learn(recorded(0, SHAPE, length=9))
    assert first.state_dict()["before"].tolist() == [NO_ROW, 0, 1, 2, 3, 4, 5, 6]
    second = FinemoePolicy(*SIZE, capacity=3)
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["before"].tolist() == [NO_ROW, 0, 1]
    assert second.state_dict()["ids"].tolist() == first.state_dict()["ids"][-3:].tolist()


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 30))
def test_history_is_restored_from_its_rows(seed: int, capacity: int, more: int) -> None:
    policy = FinemoePolicy(*SIZE, capacity)
    policy.learn(recorded(seed, SHAPE, length=2 + more))
    play(policy, workload(seed, SHAPE, iterations=more))
    if policy.history is None:
        return
    rows = rows_from_history(policy.history, policy.num_added)
    assert (rows.prev < np.arange(len(rows.tokens))).all()
    for ours, theirs in zip(
        policy.history, history_from_rows(rows, SHAPE.experts, capacity, policy.num_added), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_more_than_255_experts_are_restored() -> None:
    shape = Shape(layers=2, experts=300, active=3)
    first, second = (make_policy("finemoe", 2, 300, capacity=9, jit=compiled) for _ in range(2))
    first.learn(recorded(0, shape, length=12))
    second.load_state_dict(first.state_dict())
    assert first.state_dict()["ids"].dtype == np.uint16
    for iteration in workload(1, shape):
        play(first, [iteration])
        play(second, [iteration])
        np.testing.assert_array_equal(first.retention_priority, second.retention_priority)


@pytest.mark.parametrize("name", FACTORIES)
def test_state_dict_is_empty_before_learning(name: str) -> None:
    options: dict[str, Any] = {"predictors": untrained(SHAPE)} if "predictors" in FACTORIES[name].needs else {}
    policy = make_policy(name, *SIZE, **options)
    assert policy.state_dict() == {}
    assert policy.num_updates == 0
    policy.load_state_dict({})
    if not FACTORIES[name].is_persistent:
        play(policy, workload(0, SHAPE))
        assert policy.state_dict() == {}


def test_weights_are_restored() -> None:
    rows = HistoryRows(
        np.array([[[1, 3]], [[2, 4]]], np.uint8), np.array([[[200, 90]], [[255, 0]]], np.uint8),
        np.array([7, 8], np.int32), np.array([NO_ROW, 0], np.int32),
    )  # fmt: skip
    for ours, theirs in zip(rows, rows_from_history(history_from_rows(rows, 4, 3, 2), 2), strict=True):
        np.testing.assert_array_equal(ours, theirs)
