"""The next token: what may be drawn, how often, and that a job's draws are its own."""

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
from tests.serving.listening import Ear

Logits = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12).map(torch.tensor)


class Only:
    """A constraint: these tokens alone."""

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
def test_without_temperature_it_is_the_likeliest(logits: Tensor) -> None:
    assert sampler(logprobs=0).choose(logits).id == int(logits.argmax())


@given(logits=Logits, temperature=st.floats(1e-6, 100), top_p=st.floats(0.01, 1), seed=st.integers(0, 9))
def test_what_is_drawn_is_of_the_smallest_set_with_that_much_probability(
    logits: Tensor, temperature: float, top_p: float, seed: int
) -> None:
    token = sampler(temperature=temperature, top_p=top_p, seed=seed).choose(logits).id
    chances = (logits.double() / temperature).softmax(0)
    assert float(chances[chances > chances[token]].sum()) <= top_p + 1e-5


@pytest.mark.parametrize(("top_p", "shares"), [(1.0, [0.5, 0.3, 0.15, 0.05]), (0.75, [0.625, 0.375, 0, 0])])
def test_draws_come_as_often_as_they_should(top_p: float, shares: list[float]) -> None:
    each, logits = sampler(temperature=2, top_p=top_p, seed=0), 2 * torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    counts = Counter(each.choose(logits).id for _ in range(4000))
    for token, share in enumerate(shares):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.03)


def test_a_seed_makes_draws_repeatable_and_none_does_not() -> None:
    logits = torch.zeros(1000)

    def draws(seed: int | None) -> list[int]:
        each = sampler(temperature=1, seed=seed)
        return [each.choose(logits).id for _ in range(8)]

    assert draws(3) == draws(3) != draws(4)
    assert draws(None) != draws(None)
    assert draws(-1) == draws(2**64 - 1)  # any integer is a seed
    assert draws(2**200) == draws(0)


@given(logits=Logits, count=st.integers(0, 20))
def test_log_probabilities_are_the_models_own(logits: Tensor, count: int) -> None:
    expected = logits.log_softmax(0)
    token = sampler(temperature=7.0, top_p=0.5, seed=1, logprobs=count).choose(logits)
    assert token.logprob == pytest.approx(float(expected[token.id]))
    assert len(token.likeliest) == min(count, len(logits))
    found = [logprob for _, logprob in token.likeliest]
    assert found == pytest.approx(expected.sort(descending=True).values[: len(found)].tolist())
    assert all(expected[i] == pytest.approx(logprob) for i, logprob in token.likeliest)


def test_a_constraint_masks_and_hears_of_all_but_the_end() -> None:
    only, logits = Only(2, 4), torch.tensor([9.0, 8.0, 1.0, 7.0, 0.0])
    each = sampler(constraint=only, stop=frozenset({4}))
    assert each.choose(logits).id == 2
    assert logits.tolist() == [9.0, 8.0, 1.0, 7.0, 0.0]  # as it was
    only.tokens = [4]
    assert each.choose(logits).id == 4
    assert only.accepted == [2]


@pytest.mark.parametrize("logits", [torch.tensor([-torch.inf, -torch.inf]), torch.tensor([torch.nan, 1.0])])
def test_where_nothing_may_come_next_it_says_so(logits: Tensor) -> None:
    with pytest.raises(ValueError, match="no token may come next"):
        sampler(temperature=1.0).choose(logits)


def test_what_else_runs_does_not_change_a_jobs_draws(offloaded: Any) -> None:
    drawn = Job("drawn", a_prompt(20), 12, temperature=1.2, top_p=0.9, seed=5, logprobs=3)

    def tokens(*others: Job) -> list[Token]:
        ear = Ear()
        with serving(offloaded) as worker:
            for job in [*others, drawn]:
                worker.submit(job, ear)
            ear.wait(drawn.name, *(job.name for job in others))
        return ear.tokens["drawn"]

    alone = tokens()
    crowd = [Job(str(n), a_prompt(5 * n, n), 6 + n, temperature=1.0, seed=n) for n in range(1, 5)]
    crowded = tokens(*crowd)
    assert [token.id for token in crowded] == [token.id for token in alone]
    for one, other in zip(alone, crowded, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [i for i, _ in one.likeliest] == [i for i, _ in other.likeliest]
