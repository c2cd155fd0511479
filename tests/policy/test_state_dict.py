"""What policies learn can be handed out and taken in, and nothing is lost on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finemoe.policy import FACTORIES, Policy, make_policy
from finemoe.policy.finemoe.history import NO_ROW, HistoryRows, history_of, rows_of
from finemoe.policy.finemoe.policy import FinemoePolicy
from tests.policy.compile import compiled
from tests.policy.workload import Iteration, Shape, recorded, untrained, workload

SHAPE = Shape(layers=5, experts=6, active=2)
SIZE = SHAPE.layers, SHAPE.experts
REMEMBERING = [name for name, kind in FACTORIES.items() if kind.is_persistent]


def play(policy: Policy, played: list[Iteration]) -> None:
    for iteration in played:
        policy.begin(iteration.steps)
        for event in iteration.events:
            policy.routed(event)
        policy.end()


def taught(name: str, seed: int, capacity: int, **options: bool) -> Policy:
    """A policy that learned from recorded requests and from its own."""
    policy = make_policy(name, *SIZE, capacity=capacity)
    for i in range(2):
        policy.learn(recorded(seed + i, SHAPE, embeddings=options["embeddings"]))
    play(policy, workload(seed, SHAPE, **options))
    policy.begin(())  # its requests are over
    return policy


def later(seed: int, **options: bool) -> list[Iteration]:
    """Requests that nobody has begun yet."""
    played = workload(seed, SHAPE, **options)
    return [Iteration([s._replace(request=s.request + 1000) for s in it.steps], it.events) for it in played]


@pytest.mark.parametrize("name", REMEMBERING)
@given(st.integers(0, 10**6), st.sampled_from([1, 3, 9, 12, 40]), st.booleans(), st.booleans())
def test_a_policy_that_recalls_scores_as_the_one_that_handed_out(
    name: str, seed: int, capacity: int, embeddings: bool, truncated: bool
) -> None:
    options = {"embeddings": embeddings, "truncated": truncated}
    first = taught(name, seed, capacity, **options)
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
        if ours.size > 1:  # how many were ever taken in is only known of a full ring
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", REMEMBERING)
def test_what_is_handed_out_does_not_change_any_more(name: str) -> None:
    policy = taught(name, 0, 9, embeddings=True)
    told = policy.state_dict()
    before = {each: array.copy() for each, array in told.items()}
    play(policy, later(1))
    for each, array in told.items():
        np.testing.assert_array_equal(array, before[each])


@pytest.mark.parametrize("name", REMEMBERING)
@pytest.mark.parametrize("capacity", [1, 4, 100])
def test_another_capacity_takes_the_newest_that_fit(name: str, capacity: int) -> None:
    first = taught(name, 3, 10, embeddings=False)
    second = make_policy(name, *SIZE, capacity=capacity)
    second.load_state_dict(first.state_dict())
    ours, theirs = first.state_dict(), second.state_dict()
    assert len(theirs["tokens"]) == min(10, capacity)
    newest = np.arange(len(ours["tokens"]))[-capacity:]
    if "born" in ours:
        newest = np.sort(np.argsort(ours["born"])[-capacity:])
    np.testing.assert_array_equal(theirs["tokens"], ours["tokens"][newest])
    play(second, later(4))


def test_links_to_rows_that_do_not_fit_are_cut() -> None:
    first = FinemoePolicy(*SIZE, capacity=10)
    first.learn(recorded(0, SHAPE, length=9))
    assert first.state_dict()["before"].tolist() == [NO_ROW, 0, 1, 2, 3, 4, 5, 6]
    second = FinemoePolicy(*SIZE, capacity=3)
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["before"].tolist() == [NO_ROW, 0, 1]
    assert second.state_dict()["ids"].tolist() == first.state_dict()["ids"][-3:].tolist()


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 30))
def test_rows_make_the_trail_that_they_came_from(seed: int, capacity: int, more: int) -> None:
    policy = FinemoePolicy(*SIZE, capacity)
    policy.learn(recorded(seed, SHAPE, length=2 + more))
    play(policy, workload(seed, SHAPE, iterations=more))
    if policy.history is None:
        return
    rows = rows_of(policy.history, policy.number)
    assert (rows.before < np.arange(len(rows.tokens))).all()
    for ours, theirs in zip(policy.history, history_of(rows, SHAPE.experts, capacity, policy.number), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_more_than_255_experts_are_recalled() -> None:
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
def test_a_policy_that_learned_nothing_hands_out_nothing(name: str) -> None:
    options: dict[str, Any] = {"predictors": untrained(SHAPE)} if "predictors" in FACTORIES[name].needs else {}
    policy = make_policy(name, *SIZE, **options)
    assert policy.state_dict() == {}
    assert policy.num_updates == 0
    policy.load_state_dict({})
    if not FACTORIES[name].is_persistent:
        play(policy, workload(0, SHAPE))
        assert policy.state_dict() == {}


def test_a_row_keeps_its_weights() -> None:
    rows = HistoryRows(
        np.array([[[1, 3]], [[2, 4]]], np.uint8), np.array([[[200, 90]], [[255, 0]]], np.uint8),
        np.array([7, 8], np.int32), np.array([NO_ROW, 0], np.int32),
    )  # fmt: skip
    for ours, theirs in zip(rows, rows_of(history_of(rows, 4, 3, 2), 2), strict=True):
        np.testing.assert_array_equal(ours, theirs)
