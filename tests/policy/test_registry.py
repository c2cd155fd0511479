"""Policy names: settings, ablations, and errors."""

from __future__ import annotations

import numpy as np
import pytest

from finemoe.errors import ConfigError
from finemoe.policy import FACTORIES, make_policy, policy_class, policy_or_bound_class
from finemoe.policy.finemoe.policy import FinemoePolicy
from finemoe.policy.published.expert_map import ExpertMapPolicy
from tests.policy.workload import Shape, recorded, workload

SHAPE = Shape(4, 6)


def test_settings_reach_the_policy() -> None:
    policy = make_policy("expert-map/distance=2/capacity=7", 4, 6)
    assert isinstance(policy, ExpertMapPolicy)
    assert (policy.distance, policy.store.columns.shape[2]) == (2, 7)
    assert policy_or_bound_class("oracle").clairvoyant
    assert policy_class("finemoe/no-own") is FinemoePolicy


@pytest.mark.parametrize(("experts", "distance"), [(8, 3), (16, 4), (60, 6)])
def test_the_papers_distance_follows_the_models_shape(experts: int, distance: int) -> None:
    assert ExpertMapPolicy(2, experts).distance == distance


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fineme", "unknown policy 'fineme'"),
        ("finemoe/no-such", "no-own"),
        ("finemoe/own", "no-own"),
        ("lru/no-own", "no settings"),
        ("expert-map/distance=0", "distance=N"),
        ("expert-map/distance=x", "distance=N"),
        ("expert-map/", "distance=N"),
    ],
)
def test_unknown_policies_and_options_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_policy(name, 4, 6)


def test_bounds_are_for_the_simulator_only() -> None:
    with pytest.raises(ConfigError, match="only a replay"):
        policy_class("oracle")


def test_throttling_of_finemoe_can_be_left_out() -> None:
    full, ablated = (make_policy(name, SHAPE.layers, SHAPE.experts) for name in ("finemoe", "finemoe/no-pause"))
    assert (full.throttles_prefetch, ablated.throttles_prefetch) == (True, False)


@pytest.mark.parametrize("part", [part for part in FinemoePolicy.parts if part != "pause"])  # which changes no score
def test_leaving_out_a_part_of_finemoe_changes_scores(part: str) -> None:
    full, ablated = (make_policy(name, *(SHAPE.layers, SHAPE.experts)) for name in ("finemoe", f"finemoe/no-{part}"))
    differ = False
    for policy in (full, ablated):
        for seed in range(3):
            policy.learn(recorded(seed, SHAPE))
    for iteration in workload(7, SHAPE, iterations=20, batch=1):
        for policy in (full, ablated):
            policy.begin(iteration.steps)
        for event in iteration.events:
            for policy in (full, ablated):
                policy.routed(event)
            differ |= not np.array_equal(full.retention_priority, ablated.retention_priority) or not np.array_equal(
                full.prefetch_priority, ablated.prefetch_priority
            )
        for policy in (full, ablated):
            policy.end()
    assert differ


def test_every_name_has_a_class() -> None:
    assert all(policy_class(name) is kind for name, kind in FACTORIES.items())
