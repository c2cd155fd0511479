"""A policy on a thread of its own: the same scores once it has caught up, and nobody waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest

from finemoe.engine.async_policy import AsyncPolicy
from finemoe.policy import FACTORIES, Policy
from finemoe.policy.cache_state import Scores
from finemoe.types import Routed, Step
from tests.policy.test_contract import informed
from tests.policy.workload import Iteration, Shape, workload

SHAPE = Shape(3, 6)
THINKING = [name for name, kind in FACTORIES.items() if kind.runs_async]


@contextmanager
def beside(policy: Policy) -> Iterator[AsyncPolicy]:
    run = AsyncPolicy(policy)
    try:
        yield run
    finally:
        run.close()


def play(policy: Policy, played: list[Iteration]) -> Iterator[None]:
    for iteration in played:
        policy.begin(iteration.steps)
        yield
        for event in iteration.events:
            policy.routed(event)
            yield
        policy.end()
        yield


class Slow(Policy):
    """Thinks as long as it is told to. Its scores count the events that it has seen."""

    prefetches = True

    def __init__(self) -> None:
        super().__init__(2, 3)
        self.go = threading.Semaphore(0)
        self.seen: list[tuple[str, bool]] = []

    def begin(self, steps: object) -> None:
        self.think(f"begin {len(steps)}")  # type: ignore[arg-type] # a sequence

    def routed(self, event: Routed) -> None:
        self.think(f"layer {event.layer}")

    def end(self) -> None:
        self.think("end")

    def think(self, what: str) -> None:
        assert self.go.acquire(timeout=10)
        self.seen.append((what, self.lagging))
        self.retention_priority[:] = len(self.seen)


@pytest.mark.parametrize("name", THINKING)
def test_scores_are_those_of_the_policy_itself(name: str) -> None:
    played = workload(3, SHAPE, iterations=15)
    with beside(informed(name, played, SHAPE)) as run:
        direct = informed(name, played, SHAPE)
        for _ in zip(play(run, played), play(direct, played), strict=True):
            run.settle()
            assert np.array_equal(run.retention_priority, direct.retention_priority)
            assert np.array_equal(run.prefetch_priority, direct.prefetch_priority)
            assert (run.margin, run.switch, run.prefetches) == (direct.margin, direct.switch, direct.prefetches)
        assert run.late == 0


@pytest.mark.parametrize("name", THINKING)
def test_a_policy_that_fell_behind_catches_up(name: str) -> None:
    played = workload(4, SHAPE, iterations=15)
    hurried, patient = informed(name, played, SHAPE), informed(name, played, SHAPE)
    for turn, _ in enumerate(zip(play(hurried, played), play(patient, played), strict=True)):
        hurried.lagging = turn % 5 != 0
    hurried.lagging = False
    more = workload(5, SHAPE, iterations=3)
    for _ in zip(play(hurried, more), play(patient, more), strict=True):
        pass
    assert np.allclose(hurried.retention_priority, patient.retention_priority)
    assert np.allclose(hurried.prefetch_priority, patient.prefetch_priority)


def test_a_thought_is_timed_from_its_event_or_from_the_end_of_the_one_before() -> None:
    slow = Slow()
    with beside(slow) as run:
        run.begin([])
        time.sleep(0.05)
        slow.go.release()
        run.settle()
        assert run.policy_timings.begins.total_s >= 0.05
        run.routed(Routed(0, [0]))
        slow.go.release()
        run.settle()
    policy_timings = run.policy_timings
    assert (policy_timings.begins.count, policy_timings.gates.count) == (1, 1)
    assert 0 < policy_timings.gates.total_s < 0.05


def test_nobody_waits_and_late_thoughts_are_not_published() -> None:
    slow = Slow()
    published = []
    with beside(slow) as run:
        run.published = lambda: published.append(run.retention_priority[0, 0])
        run.begin([])
        for layer in range(2):
            run.routed(Routed(layer, [0]))
        assert not slow.seen and not published  # and here we are
        time.sleep(0.05)
        slow.go.release(3)
        run.settle()
        assert run.policy_timings.begins.count + run.policy_timings.gates.count == len(published)
        assert [what for what, _ in slow.seen] == ["begin 0", "layer 0", "layer 1"]
        assert slow.seen[-1] == ("layer 1", False)
        assert published[-1] == run.retention_priority[0, 0] == 3
        assert run.late == sum(behind for _, behind in slow.seen) == run.searches - len(published)


def test_an_interruption_while_an_event_is_told_does_not_leave_it_behind_for_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    slow = Slow()
    slow.go.release(3)
    with beside(slow) as run:
        calls = run._calls
        monkeypatch.setattr(run, "_calls", SimpleNamespace(put=interrupted, get=calls.get))
        with pytest.raises(KeyboardInterrupt):
            run.begin([])
        monkeypatch.setattr(run, "_calls", calls)
        run.routed(Routed(0, [0]))
        run.settle()
        assert [what for what, _ in slow.seen] == ["begin 0", "layer 0"]
        assert run.retention_priority[0, 0] == 2  # the last thought was published


def test_iterations_go_unobserved_rather_than_pile_up() -> None:
    slow = Slow()
    step = Step(0, 1, np.array([1], np.int32))
    with beside(slow) as run:
        for _ in range(50):
            run.begin([step])
            for layer in range(2):
                run.routed(Routed(layer, [0]))
            run.end()
        slow.go.release(10_000)
        run.settle()
        whole = [what for what, _ in slow.seen if what != "begin 0"]
        assert len(whole) < 50 * 4 / 2
        assert whole == ["begin 1", "layer 0", "layer 1", "end"] * (len(whole) // 4)
        assert slow.seen[len(whole)][0] == "begin 0"  # what follows is not the next iteration


def test_a_fault_reaches_whoever_tells_the_next_event() -> None:
    class Faulty(Policy):
        def routed(self, event: Routed) -> None:
            raise ValueError(f"no layer {event.layer}")

    with beside(Faulty(2, 3)) as run:
        run.routed(Routed(7, [0]))
        with pytest.raises(ValueError, match="no layer 7"):
            run.settle()
        with pytest.raises(ValueError, match="no layer 7"):
            run.end()


def test_what_is_foreseen_waits_for_what_was_told_but_nobody_for_it() -> None:
    class Foreseeing(Slow):
        def predict_request(self, embedding: npt.NDArray[np.float32]) -> Scores:
            return np.full((2, 3), len(self.seen) + float(embedding.sum()))

    heard: list[Scores | None] = []
    policy = Foreseeing()
    with beside(policy) as run:
        run.routed(Routed(0, [0]))
        run.ask_ahead(np.ones(4, np.float32), heard.append)
        assert not heard  # nobody has waited
        run.routed(Routed(1, [0]))
        policy.go.release(2)
        run.settle()
        assert len(heard) == 1
        assert heard[0] == pytest.approx(np.full((2, 3), 6.0))
        assert run.searches == 2


def test_the_thread_ends() -> None:
    before = threading.active_count()
    with beside(Slow()):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


@pytest.mark.parametrize("name", [name for name in THINKING if FACTORIES[name].is_persistent])
def test_what_it_knows_is_told_and_replaced_between_two_events(name: str) -> None:
    played = workload(6, SHAPE, iterations=4)
    direct = informed(name, played, SHAPE)
    for _ in play(direct, played):
        pass
    with beside(informed(name, played, SHAPE)) as run, beside(informed(name, played, SHAPE)) as other:
        for _ in play(run, played):
            run.settle()
        told = run.state_dict()
        assert run.num_updates == direct.num_updates
        assert told.keys() == direct.state_dict().keys()
        assert all(np.array_equal(array, direct.state_dict()[key]) for key, array in told.items())
        other.load_state_dict(told)
        assert other.num_updates == run.num_updates
        assert all(np.array_equal(array, other.state_dict()[key]) for key, array in told.items())
    assert run.state_dict() == {}
