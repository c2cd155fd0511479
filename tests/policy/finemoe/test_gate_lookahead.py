"""What the gates ahead say: believed as far as they were right."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from finemoe.policy.finemoe.gate_lookahead import anticipate, fuse, learn, make_named, make_weights, settle
from finemoe.policy.finemoe.policy import FinemoePolicy
from finemoe.types import DECODE, Routed, Step

LAYERS, EXPERTS = 4, 8
NO_ROW = np.zeros(EXPERTS, np.bool_)


def gate(*experts: int) -> npt.NDArray[np.float32]:
    """`[E]`: these alike, nobody else."""
    chosen = np.isin(np.arange(EXPERTS), experts)
    return np.asarray(chosen / max(1, chosen.sum()), np.float32)


@pytest.mark.parametrize("distance", [1, 2])
def test_a_lookahead_is_trusted_as_far_as_it_was_right(distance: int) -> None:
    ahead = np.zeros((2, EXPERTS), np.float32)
    ahead[distance - 1] = gate(0, 1)
    for executed, kept in ((np.arange(EXPERTS) < 2, True), (np.arange(EXPERTS) >= 6, False)):
        weights, named = make_weights(2), make_named(2, LAYERS, EXPERTS)
        for _ in range(2000):
            chances = np.full((LAYERS, EXPERTS), 0.25)
            anticipate(weights, named, 0, ahead, 2, chances)
            assert (named.experts[distance - 1, distance] == (gate(0, 1) > 0)).all()
            settle(weights, named, distance, executed)
        assert ((chances[distance, :2] > 0.9) == kept).all()
        assert ((chances[distance, :2] < 0.05) != kept).all()
        assert (np.delete(chances, distance, axis=0) == 0.25).all()
        assert (weights[2 - distance] == make_weights(1)).all()  # of the other distance nothing was learned


def test_without_a_gate_ahead_chances_stay_and_nothing_is_learned_later() -> None:
    weights, named = make_weights(1), make_named(1, LAYERS, EXPERTS)
    chances = np.full((LAYERS, EXPERTS), 0.25)
    for ahead in (np.zeros((0, EXPERTS), np.float32), np.zeros((1, EXPERTS), np.float32)):
        anticipate(weights, named, 0, ahead, 1, chances)
        assert (chances == 0.25).all() and not named.experts.any()
        settle(weights, named, 1, gate(0) > 0)
    assert (weights == make_weights(1)).all()


def test_what_a_layer_used_is_learned_from_once_and_only_where_it_is_known() -> None:
    for executed, learned in ((gate(0) > 0, True), (NO_ROW, False)):
        weights, named = make_weights(1), make_named(1, LAYERS, EXPERTS)
        anticipate(weights, named, 0, gate(0)[None], 1, np.full((LAYERS, EXPERTS), 0.25))
        settle(weights, named, 1, executed)
        assert (weights != make_weights(1)).any() == learned
        assert not named.experts.any()
        kept = weights.copy()
        settle(weights, named, 1, gate(0) > 0)
        assert (weights == kept).all()


def test_gates_beyond_the_last_layer_say_nothing() -> None:
    weights, named = make_weights(3), make_named(3, LAYERS, EXPERTS)
    chances = np.full((LAYERS, EXPERTS), 0.25)
    anticipate(weights, named, LAYERS - 2, np.stack([gate(0)] * 3), 1, chances)
    assert (chances[:-1] == 0.25).all() and (chances[-1] != 0.25).all()
    anticipate(weights, named, LAYERS - 1, np.stack([gate(0)] * 3), 1, chances)
    assert named.experts.sum() == 1


def test_a_lookahead_that_tells_nothing_new_changes_little() -> None:
    random, weights = np.random.default_rng(0), make_weights(1)[0]
    for _ in range(20_000):
        chances = random.random(8)
        learn(weights, chances > 0.5, chances, random.random(8) < chances)  # it only repeats what is known
    chances = np.linspace(0, 1, 11)[:8]
    fused = chances.copy()
    fuse(weights, chances > 0.5, fused)
    np.testing.assert_allclose(fused, chances, atol=0.1)
    assert fused[0] == 0


@pytest.mark.parametrize(("asked", "told"), [(1, 3), (3, 1), (3, 3)])
def test_a_policy_takes_as_many_distances_as_it_asks_for_and_hears_of(asked: int, told: int) -> None:
    policy = FinemoePolicy(LAYERS, EXPERTS, lookahead=asked)
    ahead = np.stack([gate(layer) for layer in range(told)])[None]
    for _ in range(3):
        policy.begin([Step(0, DECODE, np.array([1], np.int32))])
        for layer in range(LAYERS):
            policy.routed(Routed(layer, (layer,), gate(layer)[None], ahead, 1))
        policy.end()
    trusted = policy.state_dict()["lookahead"].reshape(-1, 3)
    assert len(trusted) == asked
    assert [bool((row != make_weights(1)).any()) for row in trusted] == [i < told for i in range(asked)]


@pytest.mark.parametrize("distances", [1, 2])
def test_what_another_one_learned_is_taken_as_far_as_both_look(distances: int) -> None:
    other, policy = FinemoePolicy(LAYERS, EXPERTS, lookahead=2), FinemoePolicy(LAYERS, EXPERTS, lookahead=distances)
    other.begin([Step(0, DECODE, np.array([1], np.int32))])
    for layer in range(LAYERS):
        other.routed(Routed(layer, (layer,), gate(layer)[None], np.stack([gate(0), gate(1)])[None], 1))
    other.end()
    learned = other.state_dict()
    policy.load_state_dict(learned)
    assert (policy.state_dict()["lookahead"] == learned["lookahead"][: 3 * distances]).all()
