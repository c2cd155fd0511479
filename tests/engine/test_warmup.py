"""Kernels that were warmed up at load are not compiled again during generation."""

from typing import Any

import pytest
import torch

import finemoe
from finemoe.engine.async_policy import AsyncPolicy
from finemoe.engine.warmup import warm_up
from finemoe.jit import compiler
from finemoe.policy import POLICIES, make_policy, policy_class
from tests.policy.workload import Shape, untrained, workload
from tests.tiny import Make

SHAPE = Shape(5, 6)


def signatures(policy: Any) -> dict[str, int]:
    """Number of compiled signatures of each kernel of a policy."""
    kernels = {name: getattr(value, "signatures", None) for name, value in vars(policy).items()}
    return {name: len(found) for name, found in kernels.items() if found is not None}


def test_generation_compiles_nothing(tiny: Make) -> None:
    with finemoe.load(tiny("mixtral", "bfloat16"), expert_memory="50%", policy="finemoe", map_store="none") as model:
        policy = model.finemoe._engine.cache_manager.policy
        assert isinstance(policy, AsyncPolicy)
        compiled = signatures(policy.inner)
        assert compiled and all(compiled.values())
        for rows in (1, 1, 2, 2):
            ids = torch.arange(4).expand(rows, -1) + 3
            model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        policy.flush()
        assert signatures(policy.inner) == compiled


@pytest.mark.parametrize("policy", [*POLICIES, "finemoe/no-own/capacity=100"])
def test_every_policy_can_be_warmed_up(policy: str) -> None:
    warm_up(policy, **({"jit": lambda kernel: kernel} if policy_class(policy).compiles else {}))


def test_a_policy_with_predictors_is_warmed_up_in_their_shape() -> None:
    predictors = untrained(SHAPE)
    warm_up("promoe", jit=compiler(), predictors=predictors)
    policy = make_policy("promoe", SHAPE.layers, SHAPE.experts, jit=compiler(), predictors=predictors)
    compiled = signatures(policy)
    assert compiled and all(compiled.values())
    for iteration in workload(0, SHAPE):
        policy.begin(iteration.steps)
        for event in iteration.events:
            policy.routed(event)
        policy.end()
    assert signatures(policy) == compiled
