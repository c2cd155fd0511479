"""A policy gets the same events of a job in a batch as in its own `generate`."""

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
from finemoe.learned.promoe_predictors import save
from finemoe.serving.scheduler.job import Job, Token
from finemoe.types import DECODE, PREFILL, Routed, Step
from tests.policy.workload import Shape, untrained
from tests.serving.conftest import a_prompt, greedy, serving
from tests.serving.recording_listener import RecordingListener
from tests.tiny import Make

NEW_TOKENS = 6


class Iteration(NamedTuple):
    """The events of one forward pass; `ended` has an entry for each end event."""

    steps: list[Step]
    routed: list[Routed]
    ended: list[bool]


@contextmanager
def recording(model: Any) -> Iterator[list[Iteration]]:
    """Records the events of the engine while the block runs."""
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
    """One request's part of the iterations: its step, and its rows of the routing."""
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
    for (step, routed), (expected_step, expected_routed) in zip(found, expected, strict=True):
        assert step.phase == expected_step.phase
        assert step.token_ids.tolist() == expected_step.token_ids.tolist()
        assert step.token_ids.dtype == expected_step.token_ids.dtype
        assert step.embedding is not None and expected_step.embedding is not None
        np.testing.assert_allclose(step.embedding, expected_step.embedding, atol=1e-5)
        assert [event.layer for event in routed] == [event.layer for event in expected_routed]
        for event, other in zip(routed, expected_routed, strict=True):
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
def test_a_policy_sees_the_same_events_batched_and_alone(tiny: Make, predictors: Path, policy: str) -> None:
    prompts = {name: a_prompt(length, length) for name, length in {"one": 21, "two": 4, "three": 9}.items()}
    given = predictors if policy == "promoe" else None
    with finemoe.load(tiny(), expert_memory="40%", policy=policy, predictors=given) as model:
        expected = {}
        for name, prompt in prompts.items():
            with recording(model) as iterations:
                greedy(model, prompt, NEW_TOKENS)
            expected[name] = of_request(iterations, iterations[0].steps[0].request)
            assert len(expected[name]) == NEW_TOKENS
        for together in (False, True):
            listener = RecordingListener()
            with serving(model, max_batch_tokens=64) as worker, recording(model) as iterations:
                for name, prompt in prompts.items():
                    worker.submit(Job(name, prompt, NEW_TOKENS), listener)
                    if not together:
                        listener.wait(name)
                listener.wait(*prompts)
                numbers = list(dict.fromkeys(step.request for each in iterations for step in each.steps))
                assert len(numbers) == len(prompts)
                if together:
                    assert len(iterations) < NEW_TOKENS * len(prompts)
                for number, name in zip(numbers, prompts, strict=True):
                    assert_same(of_request(iterations, number), expected[name], alone=not together)
        assert all(step.embedding is not None for each in iterations for step in each.steps)
        assert any(event.gates is not None for each in iterations for event in each.routed)


def test_a_chunked_prefill_is_one_request(tiny: Make) -> None:
    prompt, listener = a_prompt(40), RecordingListener()
    with (
        finemoe.load(tiny(), expert_memory="40%", policy="finemoe") as model,
        serving(model) as worker,
        recording(model) as iterations,
    ):
        worker.submit(Job("job", prompt, 3), listener)
        listener.wait("job")
        own = of_request(iterations, iterations[0].steps[0].request)
    assert [step.phase for step, _ in own] == [PREFILL] * 3 + [DECODE] * 2
    assert [int(token) for step, _ in own for token in step.token_ids] == [*prompt, *listener.ids("job")[:-1]]


def test_a_job_that_joins_shares_iterations_with_the_running_one(tiny: Make) -> None:
    def join(name: str, event: object) -> None:
        if isinstance(event, Token) and name == "first" and len(listener.ids("first")) == 2:
            worker.submit(Job("second", a_prompt(5, 1), 4), listener)

    listener = RecordingListener(join)
    with (
        finemoe.load(tiny(), expert_memory="40%", policy="finemoe") as model,
        serving(model) as worker,
        recording(model) as iterations,
    ):
        worker.submit(Job("first", a_prompt(5), 10), listener)
        listener.wait("first", "second")
        sizes = [len(each.steps) for each in iterations]
        phases = [[step.phase for step in each.steps] for each in iterations]
    assert sizes == [1] * 3 + [2] * 4 + [1] * 3
    assert phases[3] == [DECODE, PREFILL]
