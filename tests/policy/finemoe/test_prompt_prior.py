"""`PromptPrior` against its formula, and its effect on the policy."""

from __future__ import annotations

import numpy as np
import pytest

from finemoe.policy.finemoe.policy import FinemoePolicy
from finemoe.policy.finemoe.prompt_prior import PromptPrior
from finemoe.types import DECODE, PREFILL, Routed, Step

SIZE = (2, 4)


def test_prediction_matches_the_formula() -> None:
    random = np.random.default_rng(0)
    keys, usage = random.normal(size=(12, 5)), random.random((12, *SIZE))
    prompt_prior = PromptPrior(*SIZE)
    for key, used in zip(keys, usage, strict=True):
        prompt_prior.add(key.astype(np.float32), used)
    prompt = random.normal(size=5)
    found = prompt_prior.predict(prompt.astype(np.float32))
    assert found is not None
    center = keys.mean(axis=0)
    cosines = [
        float((key - center) @ (prompt - center) / np.linalg.norm(key - center) / np.linalg.norm(prompt - center))
        for key in keys
    ]
    near = sorted(range(12), key=lambda i: -cosines[i])[:8]
    u = [np.exp(cosines[i] / 0.1) for i in near]
    share = sum(w * usage[i] for w, i in zip(u, near, strict=True)) / sum(u)
    m = sum(u) ** 2 / sum(w * w for w in u)
    np.testing.assert_allclose(found[0], share, rtol=1e-4)
    assert found[1] == pytest.approx(m / (m + 1), rel=1e-4)


def test_the_oldest_requests_are_overwritten() -> None:
    prompt_prior = PromptPrior(*SIZE, capacity=2)
    for i in range(3):
        prompt_prior.add(np.eye(3, dtype=np.float32)[i], np.full(SIZE, i / 4))
    assert prompt_prior.size == 2
    found = prompt_prior.predict(np.eye(3, dtype=np.float32)[2])
    assert found is not None
    assert found[0].min() > 0.4  # the third request, not the first


def test_embeddings_that_can_not_be_compared_predict_nothing() -> None:
    prompt_prior = PromptPrior(*SIZE)
    assert prompt_prior.predict(np.ones(3, np.float32)) is None
    prompt_prior.add(np.ones(3, np.float32), np.zeros(SIZE))
    assert prompt_prior.predict(None) is None
    assert prompt_prior.predict(np.ones(4, np.float32)) is None


def request(policy: FinemoePolicy, number: int, embedding: np.ndarray, experts: list[int]) -> None:
    """Runs a request: a prompt of three tokens and four decoded ones, all routed to these experts."""
    for iteration in range(5):
        step = Step(number, DECODE if iteration else PREFILL, np.zeros(1 if iteration else 3, np.int32), embedding)
        policy.begin([step])
        for layer in range(SIZE[0]):
            gates = np.zeros((1, SIZE[1]), np.float32)
            gates[0, experts] = 1 / len(experts)
            policy.routed(Routed(layer, experts, gates))
        policy.end()


@pytest.mark.parametrize("without", [frozenset[str](), frozenset({"prompts"})])
def test_similar_prompts_predict_the_experts_before_any_gate_runs(without: frozenset[str]) -> None:
    policy = FinemoePolicy(*SIZE, active=2, without=without)
    here, there = np.eye(4, dtype=np.float32)[:2]
    for i in range(6):
        request(policy, i, here if i % 2 else there, [0, 1] if i % 2 else [2, 3])
    policy.begin([])  # the last request ends
    policy.begin([Step(99, PREFILL, np.zeros(2, np.int32), here)])
    first = policy.expected(0)
    assert first is not None
    if without:
        assert first[:2] == pytest.approx(first[2:], abs=0.2)
    else:
        assert first[:2].min() > first[2:].max() + 0.3


def test_loading_replaces_the_stored_requests() -> None:
    one, other = PromptPrior(*SIZE), PromptPrior(*SIZE)
    one.add(np.ones(3, np.float32), np.full(SIZE, 0.5))
    other.add(np.zeros(3, np.float32), np.full(SIZE, 0.25))
    other.load_state_dict(one.state_dict())
    assert other.size == 1
    assert all(np.array_equal(array, other.state_dict()[name]) for name, array in one.state_dict().items())
    other.load_state_dict({})
    assert other.state_dict() == {}
