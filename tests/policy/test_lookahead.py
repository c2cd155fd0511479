"""What the gate ahead says: believed as far as it was right."""

from __future__ import annotations

import numpy as np

from finemoe.policy.lookahead import fuse, learn, look_ahead, make_named, make_weights


def test_a_lookahead_is_trusted_as_far_as_it_was_right() -> None:
    ahead = np.where(np.arange(8) < 2, 0.5, 0).astype(np.float32)
    for executed, kept in ((np.arange(8) < 2, True), (np.arange(8) >= 6, False)):
        weights, named, chances = make_weights(), make_named(8), np.empty(8)
        for _ in range(2000):
            chances[:] = 0.25
            look_ahead(weights, named, executed, ahead, 2, chances)
            assert (named.experts == (ahead > 0)).all()
        assert ((chances[:2] > 0.9) == kept).all()
        assert ((chances[:2] < 0.05) != kept).all()


def test_without_a_gate_ahead_chances_stay_and_nothing_is_learned_later() -> None:
    weights, named, executed = make_weights(), make_named(4), np.arange(4) < 1
    chances = np.full(4, 0.25)
    for ahead in (np.zeros(0, np.float32), np.zeros(4, np.float32)):
        look_ahead(weights, named, executed, ahead, 1, chances)
        assert (chances == 0.25).all() and not named.experts.any()
    assert (weights == make_weights()).all()
    look_ahead(weights, named, executed, np.eye(4, dtype=np.float32)[0], 1, chances)
    look_ahead(weights, named, executed, np.zeros(0, np.float32), 1, np.full(4, 0.25))
    assert (weights != make_weights()).all() and not named.experts.any()


def test_a_lookahead_that_tells_nothing_new_changes_little() -> None:
    random, weights = np.random.default_rng(0), make_weights()
    for _ in range(20_000):
        chances = random.random(8)
        learn(weights, chances > 0.5, chances, random.random(8) < chances)  # it only repeats what is known
    chances = np.linspace(0, 1, 11)[:8]
    fused = chances.copy()
    fuse(weights, chances > 0.5, fused)
    np.testing.assert_allclose(fused, chances, atol=0.1)
    assert fused[0] == 0
