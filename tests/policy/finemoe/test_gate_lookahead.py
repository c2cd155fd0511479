"""Gate lookahead: its weight follows how often it was right."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from finemoe.policy.finemoe.gate_lookahead import (
    apply_gates,
    fuse,
    learn,
    learn_from_layer,
    make_gate_predictions,
    make_weights,
)
from finemoe.policy.finemoe.policy import FinemoePolicy
from finemoe.types import DECODE, Routed, Step

LAYERS, EXPERTS = 4, 8
UNKNOWN = np.zeros(EXPERTS, np.bool_)


def gate(*experts: int) -> npt.NDArray[np.float32]:
    """`[E]`: equal values for these experts, 0 for the others."""
    chosen = np.isin(np.arange(EXPERTS), experts)
    return np.asarray(chosen / max(1, chosen.sum()), np.float32)


@pytest.mark.parametrize("distance", [1, 2])
def test_reliable_gates_raise_probabilities_and_unreliable_ones_do_not(distance: int) -> None:
    ahead = np.zeros((2, EXPERTS), np.float32)
    ahead[distance - 1] = gate(0, 1)
    for executed, kept in ((np.arange(EXPERTS) < 2, True), (np.arange(EXPERTS) >= 6, False)):
        weights, predictions = make_weights(2), make_gate_predictions(2, LAYERS, EXPERTS)
        for _ in range(2000):
            probabilities = np.full((LAYERS, EXPERTS), 0.25)
            apply_gates(weights, predictions, 0, ahead, 2, probabilities)
            assert (predictions.selected[distance - 1, distance] == (gate(0, 1) > 0)).all()
            learn_from_layer(weights, predictions, distance, executed)
        assert ((probabilities[distance, :2] > 0.9) == kept).all()
        assert ((probabilities[distance, :2] < 0.05) != kept).all()
        assert (np.delete(probabilities, distance, axis=0) == 0.25).all()
        assert (weights[2 - distance] == make_weights(1)).all()  # the other distance is unchanged


def test_without_gates_probabilities_stay_and_nothing_is_learned() -> None:
    weights, predictions = make_weights(1), make_gate_predictions(1, LAYERS, EXPERTS)
    probabilities = np.full((LAYERS, EXPERTS), 0.25)
    for ahead in (np.zeros((0, EXPERTS), np.float32), np.zeros((1, EXPERTS), np.float32)):
        apply_gates(weights, predictions, 0, ahead, 1, probabilities)
        assert (probabilities == 0.25).all() and not predictions.selected.any()
        learn_from_layer(weights, predictions, 1, gate(0) > 0)
    assert (weights == make_weights(1)).all()


def test_each_layer_is_learned_from_once_and_only_if_its_experts_are_known() -> None:
    for executed, learned in ((gate(0) > 0, True), (UNKNOWN, False)):
        weights, predictions = make_weights(1), make_gate_predictions(1, LAYERS, EXPERTS)
        apply_gates(weights, predictions, 0, gate(0)[None], 1, np.full((LAYERS, EXPERTS), 0.25))
        learn_from_layer(weights, predictions, 1, executed)
        assert (weights != make_weights(1)).any() == learned
        assert not predictions.selected.any()
        kept = weights.copy()
        learn_from_layer(weights, predictions, 1, gate(0) > 0)
        assert (weights == kept).all()


def test_gates_beyond_the_last_layer_are_ignored() -> None:
    weights, predictions = make_weights(3), make_gate_predictions(3, LAYERS, EXPERTS)
    probabilities = np.full((LAYERS, EXPERTS), 0.25)
    apply_gates(weights, predictions, LAYERS - 2, np.stack([gate(0)] * 3), 1, probabilities)
    assert (probabilities[:-1] == 0.25).all() and (probabilities[-1] != 0.25).all()
    apply_gates(weights, predictions, LAYERS - 1, np.stack([gate(0)] * 3), 1, probabilities)
    assert predictions.selected.sum() == 1


def test_gates_without_new_information_change_little() -> None:
    random, weights = np.random.default_rng(0), make_weights(1)[0]
    for _ in range(20_000):
        probabilities = random.random(8)  # the gate only repeats them
        learn(weights, probabilities > 0.5, probabilities, random.random(8) < probabilities)
    probabilities = np.linspace(0, 1, 11)[:8]
    fused = probabilities.copy()
    fuse(weights, probabilities > 0.5, fused)
    np.testing.assert_allclose(fused, probabilities, atol=0.1)
    assert fused[0] == 0


@pytest.mark.parametrize(("used", "given"), [(1, 3), (3, 1), (3, 3)])
def test_a_policy_uses_as_many_distances_as_it_is_configured_for_and_given(used: int, given: int) -> None:
    policy = FinemoePolicy(LAYERS, EXPERTS, lookahead=used)
    ahead = np.stack([gate(layer) for layer in range(given)])[None]
    for _ in range(3):
        policy.begin([Step(0, DECODE, np.array([1], np.int32))])
        for layer in range(LAYERS):
            policy.routed(Routed(layer, (layer,), gate(layer)[None], ahead, 1))
        policy.end()
    weights = policy.state_dict()["lookahead"].reshape(-1, 3)
    assert len(weights) == used
    assert [bool((row != make_weights(1)).any()) for row in weights] == [i < given for i in range(used)]


@pytest.mark.parametrize("distances", [1, 2])
def test_loaded_weights_are_used_for_the_distances_in_common(distances: int) -> None:
    other, policy = FinemoePolicy(LAYERS, EXPERTS, lookahead=2), FinemoePolicy(LAYERS, EXPERTS, lookahead=distances)
    other.begin([Step(0, DECODE, np.array([1], np.int32))])
    for layer in range(LAYERS):
        other.routed(Routed(layer, (layer,), gate(layer)[None], np.stack([gate(0), gate(1)])[None], 1))
    other.end()
    learned = other.state_dict()
    policy.load_state_dict(learned)
    assert (policy.state_dict()["lookahead"] == learned["lookahead"][: 3 * distances]).all()
