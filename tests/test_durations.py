"""Durations: sums that can be added up, and taken apart again."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest

from finemoe.metrics import NEVER, Durations

TIMES_S = [0.5, 2.0, 0.25, 1.0]


def of(times_s: list[float]) -> Durations:
    return sum(map(Durations.one, times_s), NEVER)


def test_mean_and_spread_are_those_of_the_times() -> None:
    assert of(TIMES_S).count == 4
    assert of(TIMES_S).mean_s == pytest.approx(np.mean(TIMES_S))
    assert of(TIMES_S).spread == pytest.approx(np.log(TIMES_S).std())


def test_what_was_added_can_be_taken_off() -> None:
    left = of(TIMES_S) - of(TIMES_S[1:3])
    assert asdict(left) == pytest.approx(asdict(of([0.5, 1.0])))


def test_nothing_has_neither_mean_nor_spread() -> None:
    assert NEVER.mean_s is NEVER.spread is None


def test_no_time_at_all_is_a_time() -> None:
    assert of([0.0, 0.0]).mean_s == 0
    assert math.isfinite(of([0.0, 1.0]).spread or math.inf)
