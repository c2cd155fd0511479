"""Sampling: the set of possible tokens, their frequencies, and independence from other jobs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from finemoe.serving.scheduler.job import Job, Token
from finemoe.serving.scheduler.sampler import Sampler
from tests.serving.conftest import a_prompt, serving
from tests.serving.recording_listener import RecordingListener

Logits = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12).map(torch.tensor)


class Only:
    """Allows only these tokens."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = list(tokens)
        self.accepted: list[int] = []

    def mask(self, logits: Tensor) -> Tensor:
        masked = torch.full_like(logits, -torch.inf)
        masked[self.tokens] = logits[self.tokens]
        return masked

    def accept(self, token: int) -> None:
        self.accepted.append(token)


def sampler(**settings: Any) -> Sampler:
    return Sampler(Job("job", [1], 5, **settings))


@given(logits=Logits)
def test_temperature_zero_is_greedy(logits: Tensor) -> None:
    assert sampler(logprobs=0).sample(logits).id == int(logits.argmax())


@given(logits=Logits, temperature=st.floats(1e-6, 100), top_p=st.floats(0.01, 1), seed=st.integers(0, 9))
def test_samples_are_from_the_nucleus(logits: Tensor, temperature: float, top_p: float, seed: int) -> None:
    token = sampler(temperature=temperature, top_p=top_p, seed=seed).sample(logits).id
    probabilities = (logits.double() / temperature).softmax(0)
    assert float(probabilities[probabilities > probabilities[token]].sum()) <= top_p + 1e-5


@pytest.mark.parametrize(("top_p", "shares"), [(1.0, [0.5, 0.3, 0.15, 0.05]), (0.75, [0.625, 0.375, 0, 0])])
def test_samples_follow_the_distribution(top_p: float, shares: list[float]) -> None:
    each, logits = sampler(temperature=2, top_p=top_p, seed=0), 2 * torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    counts = Counter(each.sample(logits).id for _ in range(4000))
    for token, share in enumerate(shares):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.03)


def test_only_a_seed_makes_samples_repeatable() -> None:
    logits = torch.zeros(1000)

    def samples(seed: int | None) -> list[int]:
        each = sampler(temperature=1, seed=seed)
        return [each.sample(logits).id for _ in range(8)]

    assert samples(3) == samples(3) != samples(4)
    assert samples(None) != samples(None)
    assert samples(-1) == samples(2**64 - 1)  # any integer is a seed
    assert samples(2**200) == samples(0)


@given(logits=Logits, count=st.integers(0, 20))
def test_log_probabilities_are_before_temperature_and_top_p(logits: Tensor, count: int) -> None:
    expected = logits.log_softmax(0)
    token = sampler(temperature=7.0, top_p=0.5, seed=1, logprobs=count).sample(logits)
    assert token.logprob == pytest.approx(float(expected[token.id]))
    assert len(token.top_logprobs) == min(count, len(logits))
    found = [logprob for _, logprob in token.top_logprobs]
    assert found == pytest.approx(expected.sort(descending=True).values[: len(found)].tolist())
    assert all(expected[i] == pytest.approx(logprob) for i, logprob in token.top_logprobs)


def test_a_constraint_masks_and_accepts_all_tokens_but_the_stop_token() -> None:
    only, logits = Only(2, 4), torch.tensor([9.0, 8.0, 1.0, 7.0, 0.0])
    each = sampler(constraint=only, stop=frozenset({4}))
    assert each.sample(logits).id == 2
    assert logits.tolist() == [9.0, 8.0, 1.0, 7.0, 0.0]  # as it was
    only.tokens = [4]
    assert each.sample(logits).id == 4
    assert only.accepted == [2]


@pytest.mark.parametrize("logits", [torch.tensor([-torch.inf, -torch.inf]), torch.tensor([torch.nan, 1.0])])
def test_no_possible_token_is_an_error(logits: Tensor) -> None:
    with pytest.raises(ValueError, match="no token can come next"):
        sampler(temperature=1.0).sample(logits)


def test_other_jobs_do_not_change_a_jobs_samples(offloaded: Any) -> None:
    sampled = Job("sampled", a_prompt(20), 12, temperature=1.2, top_p=0.9, seed=5, logprobs=3)

    def tokens(*others: Job) -> list[Token]:
        listener = RecordingListener()
        with serving(offloaded) as worker:
            for job in [*others, sampled]:
                worker.submit(job, listener)
            listener.wait(sampled.name, *(job.name for job in others))
        return listener.tokens["sampled"]

    alone = tokens()
    crowd = [Job(str(n), a_prompt(5 * n, n), 6 + n, temperature=1.0, seed=n) for n in range(1, 5)]
    crowded = tokens(*crowd)
    assert [token.id for token in crowded] == [token.id for token in alone]
    for one, other in zip(alone, crowded, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [i for i, _ in one.top_logprobs] == [i for i, _ in other.top_logprobs]
