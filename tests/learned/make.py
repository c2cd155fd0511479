"""Maps that policies learned from generated requests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finemoe.learned import Maps, write_maps
from finemoe.policy import FACTORIES, make_policy
from tests.policy.workload import Shape, recorded

SHAPE = Shape(layers=3, experts=6, active=2)
PERSISTENT = [name for name, kind in FACTORIES.items() if kind.is_persistent]


def make_maps(
    policy: str = "finemoe", seeds: Sequence[int] = (0, 1), *, length: int = 6, model: str = "0123", **options: Any
) -> Maps:
    """The maps of a policy that learned from one request per seed."""
    learner = make_policy(policy, SHAPE.layers, SHAPE.experts, **options)
    for seed in seeds:
        learner.learn(recorded(seed, SHAPE, length=length))
    return Maps(policy, model, "a-model", SHAPE.layers, SHAPE.experts, learner.state_dict())


def make_file(path: Path, policy: str = "finemoe", seeds: Sequence[int] = (0, 1), **options: Any) -> Path:
    """The same, written to a file."""
    write_maps(make_maps(policy, seeds, **options), path)
    return path
