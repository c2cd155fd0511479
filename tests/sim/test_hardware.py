"""Random times: their spread, and their dependence on the seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from finemoe.sim.hardware import Machine, Noise


def test_times_vary_around_their_means_and_depend_on_the_seed() -> None:
    machine = Machine(4, 1.0, compute_spread=0.2, link_spread=0.4, lag_spread=0.6, seed=7)
    noise, again, other = Noise(machine), Noise(machine), Noise(replace(machine, seed=8))
    drawn = {
        0.2: np.concatenate([noise.computes(24).ravel() for _ in range(400)]),
        0.4: noise.transfers,
        0.6: np.array([noise.lag() for _ in range(20_000)]),
    }
    for spread, factors in drawn.items():
        assert factors.mean() == pytest.approx(1, abs=0.02)
        assert np.log(factors).std() == pytest.approx(spread, rel=0.03)
    assert again.transfers.tolist() == noise.transfers.tolist() != other.transfers.tolist()
    assert again.computes(24).tolist() == drawn[0.2][:48].reshape(2, 24).tolist()


def test_times_without_spread_are_exact() -> None:
    noise = Noise(Machine(4, 1.0))
    assert (noise.transfers.tolist(), noise.lag()) == ([1.0], 1.0)
    assert (noise.computes(3) == 1).all()
