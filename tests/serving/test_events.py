"""What a policy sees of a job is the same in a worker, among others, as in a `generate` of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import finemoe
from finemoe.checkpoint import read_headers
from finemoe.checkpoint.headers import fingerprint
from finemoe.learned.predictors import save
from finemoe.serving.scheduler.job import Job, Token
from finemoe.types import DECODE, PREFILL, Routed, Step
from tests.policy.workload import Shape, untrained
from tests.serving.conftest import a_prompt, greedy, serving
from tests.serving.listening import Ear
from tests.tiny import Make

NEW_TOKENS = 6


class Iteration(NamedTuple):
    """One pass: what the policy was told, and whether it was told of its end."""

    steps: list[Step]
    routed: list[Routed]
    ended: list[bool]


@contextmanager
def told(model: Any) -> Iterator[list[Iteration]]:
    """What the engine is told from here on."""
    engine, iterations = model.finemoe._engine, list[Iteration]()
    begin, serve, end = engine.begin, engine.serve, engine.end

    def on_begin(steps: list[Step]) -> None:
        iterations.append(Iteration(list(steps), [], []))
        begin(steps)

    def on_serve(event: Routed) -> Any:
        iterations[-1].routed.append(event)
        return serve(event)

    def on_end() -> None:
        iterations[-1].ended.append(True)
        end()

    engine.begin, engine.serve, engine.end = on_begin, on_serve, on_end
    try:
        yield iterations
    finally:
        engine.begin, engine.serve, engine.end = begin, serve, end


def of_request(iterations: list[Iteration], request: int) -> list[tuple[Step, list[Routed]]]:
    """One request's share of iterations: its step, and its rows of what was routed."""
    own = []
    for steps, routed, ended in iterations:
        assert ended == [True]
        places = [place for place, step in enumerate(steps) if step.request == request]
        if places:
            [place] = places
            rows = [
                event._replace(
                    gates=None if event.gates is None else event.gates[place],
                    lookahead=None if event.lookahead is None else event.lookahead[place],
                )
                for event in routed
            ]
            own.append((steps[place], rows))
    return own


def assert_same(found: list[tuple[Step, list[Routed]]], expected: list[tuple[Step, list[Routed]]], alone: bool) -> None:
    assert len(found) == len(expected)
    for (step, routed), (wanted, wanted_routed) in zip(found, expected, strict=True):
        assert step.phase == wanted.phase
        assert step.token_ids.tolist() == wanted.token_ids.tolist()
        assert step.token_ids.dtype == wanted.token_ids.dtype
        assert step.embedding is not None and wanted.embedding is not None
        np.testing.assert_allclose(step.embedding, wanted.embedding, atol=1e-5)
        assert [event.layer for event in routed] == [event.layer for event in wanted_routed]
        for event, other in zip(routed, wanted_routed, strict=True):
            assert set(event.experts) == set(other.experts) if alone else set(event.experts) >= set(other.experts)
            for one, two in ((event.gates, other.gates), (event.lookahead, other.lookahead)):
                assert (one is None) == (two is None)
                if one is not None and two is not None:
                    np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.fixture(scope="module")
def predictors(tiny: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, path = tiny(), tmp_path_factory.mktemp("predictors") / "predictors.safetensors"
    with finemoe.load(folder) as model:
        layouts = model.finemoe.expert_index.layouts
    model_print = fingerprint(folder, read_headers(sorted(folder.glob("*.safetensors"))))
    save(untrained(Shape(layers=len(layouts), experts=layouts[0].experts)), path, model_print)
    return path


@pytest.mark.parametrize("policy", ["finemoe", "expert-map", "promoe", "moe-infinity", "mixtral-offloading"])
def test_a_job_shows_a_policy_what_it_would_show_alone(tiny: Make, predictors: Path, policy: str) -> None:
    prompts = {name: a_prompt(length, length) for name, length in {"one": 21, "two": 4, "three": 9}.items()}
    given = predictors if policy == "promoe" else None
    with finemoe.load(tiny(), expert_memory="40%", policy=policy, predictors=given) as model:
        expected = {}
        for name, prompt in prompts.items():
            with told(model) as iterations:
                greedy(model, prompt, NEW_TOKENS)
            expected[name] = of_request(iterations, iterations[0].steps[0].request)
            assert len(expected[name]) == NEW_TOKENS
        for together in (False, True):
            ear = Ear()
            with serving(model, max_batch_tokens=64) as worker, told(model) as iterations:
                for name, prompt in prompts.items():
                    worker.submit(Job(name, prompt, NEW_TOKENS), ear)
                    if not together:
                        ear.wait(name)
                ear.wait(*prompts)
                numbers = list(dict.fromkeys(step.request for each in iterations for step in each.steps))
                assert len(numbers) == len(prompts)
                if together:
                    assert len(iterations) < NEW_TOKENS * len(prompts)
                for number, name in zip(numbers, prompts, strict=True):
                    assert_same(of_request(iterations, number), expected[name], alone=not together)
        assert all(step.embedding is not None for each in iterations for step in each.steps)
        assert any(event.gates is not None for each in iterations for event in each.routed)


def test_a_prompt_in_pieces_is_one_request_in_its_prefill(tiny: Make) -> None:
    prompt, ear = a_prompt(40), Ear()
    with (
        finemoe.load(tiny(), expert_memory="40%", policy="finemoe") as model,
        serving(model) as worker,
        told(model) as iterations,
    ):
        worker.submit(Job("job", prompt, 3), ear)
        ear.wait("job")
        own = of_request(iterations, iterations[0].steps[0].request)
    assert [step.phase for step, _ in own] == [PREFILL] * 3 + [DECODE] * 2
    assert [int(token) for step, _ in own for token in step.token_ids] == [*prompt, *ear.ids("job")[:-1]]


def test_a_job_that_joins_is_in_the_same_iterations_as_the_one_that_runs(tiny: Make) -> None:
    def join(name: str, news: object) -> None:
        if isinstance(news, Token) and name == "first" and len(ear.ids("first")) == 2:
            worker.submit(Job("second", a_prompt(5, 1), 4), ear)

    ear = Ear(join)
    with (
        finemoe.load(tiny(), expert_memory="40%", policy="finemoe") as model,
        serving(model) as worker,
        told(model) as iterations,
    ):
        worker.submit(Job("first", a_prompt(5), 10), ear)
        ear.wait("first", "second")
        sizes = [len(each.steps) for each in iterations]
        phases = [[step.phase for step in each.steps] for each in iterations]
    assert sizes == [1] * 3 + [2] * 4 + [1] * 3
    assert phases[3] == [DECODE, PREFILL]
