"""An asynchronous policy: the same scores once its queue is flushed, and events never block."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from finemoe.engine.async_policy import AsyncPolicy, PolicyTimings
from finemoe.policy import FACTORIES, Policy
from finemoe.types import Routed, Step
from tests.policy.test_contract import informed
from tests.policy.workload import Iteration, Shape, workload

SHAPE = Shape(3, 6)
ASYNC_POLICIES = [name for name, kind in FACTORIES.items() if kind.runs_async]


@contextmanager
def running(policy: Policy) -> Iterator[AsyncPolicy]:
    run = AsyncPolicy(policy)
    try:
        yield run
    finally:
        run.close()


def play(policy: Policy, iterations: list[Iteration]) -> Iterator[None]:
    """Sends one event per step."""
    for iteration in iterations:
        policy.begin(iteration.steps)
        yield
        for event in iteration.events:
            policy.routed(event)
            yield
        policy.end()
        yield


class SlowPolicy(Policy):
    """Processes one event per release of `go`. Its scores are the number of events processed."""

    prefetches = True

    def __init__(self) -> None:
        super().__init__(2, 3)
        self.go = threading.Semaphore(0)
        self.processed: list[tuple[str, bool]] = []  # event, lagging

    def begin(self, steps: object) -> None:
        self.process(f"begin {len(steps)}")  # type: ignore[arg-type] # a sequence

    def routed(self, event: Routed) -> None:
        self.process(f"layer {event.layer}")

    def end(self) -> None:
        self.process("end")

    def process(self, event: str) -> None:
        assert self.go.acquire(timeout=10)
        self.processed.append((event, self.lagging))
        self.retention_priority[:] = len(self.processed)


@pytest.mark.parametrize("name", ASYNC_POLICIES)
def test_scores_are_those_of_the_policy_itself(name: str) -> None:
    iterations = workload(3, SHAPE, iterations=15)
    with running(informed(name, iterations, SHAPE)) as run:
        direct = informed(name, iterations, SHAPE)
        for _ in zip(play(run, iterations), play(direct, iterations), strict=True):
            run.flush()
            assert np.array_equal(run.retention_priority, direct.retention_priority)
            assert np.array_equal(run.prefetch_priority, direct.prefetch_priority)
            assert (run.margin, run.switch, run.prefetches) == (direct.margin, direct.switch, direct.prefetches)
        assert run.dropped == 0


@pytest.mark.parametrize("name", ASYNC_POLICIES)
def test_a_policy_that_lagged_catches_up(name: str) -> None:
    iterations = workload(4, SHAPE, iterations=15)
    lagging, punctual = informed(name, iterations, SHAPE), informed(name, iterations, SHAPE)
    for number, _ in enumerate(zip(play(lagging, iterations), play(punctual, iterations), strict=True)):
        lagging.lagging = number % 5 != 0
    lagging.lagging = False
    more = workload(5, SHAPE, iterations=3)
    for _ in zip(play(lagging, more), play(punctual, more), strict=True):
        pass
    assert np.allclose(lagging.retention_priority, punctual.retention_priority)
    assert np.allclose(lagging.prefetch_priority, punctual.prefetch_priority)


def test_an_event_is_timed_from_when_it_was_queued_or_from_the_end_of_the_one_before() -> None:
    slow = SlowPolicy()
    with running(slow) as run:
        timings = run.timings = PolicyTimings()
        run.begin([])
        time.sleep(0.05)
        slow.go.release()
        run.flush()
        assert timings.begins.total_s >= 0.05
        run.routed(Routed(0, [0]))
        slow.go.release()
        run.flush()
    assert (timings.begins.count, timings.gates.count) == (1, 1)
    assert 0 < timings.gates.total_s < 0.05


def test_an_event_queued_before_timings_were_attached_is_not_timed() -> None:
    slow = SlowPolicy()
    with running(slow) as run:
        run.begin([])
        timings = run.timings = PolicyTimings()
        slow.go.release()
        run.flush()
    assert timings == PolicyTimings()


def test_events_do_not_block_and_late_scores_are_dropped() -> None:
    slow = SlowPolicy()
    published = []
    with running(slow) as run:
        timings = run.timings = PolicyTimings()
        run.on_scores = lambda: published.append(run.retention_priority[0, 0])
        run.begin([])
        for layer in range(2):
            run.routed(Routed(layer, [0]))
        assert not slow.processed and not published  # nothing has blocked
        time.sleep(0.05)
        slow.go.release(3)
        run.flush()
        assert timings.begins.count + timings.gates.count == len(published)
        assert [event for event, _ in slow.processed] == ["begin 0", "layer 0", "layer 1"]
        assert slow.processed[-1] == ("layer 1", False)
        assert published[-1] == run.retention_priority[0, 0] == 3
        assert run.dropped == sum(lagging for _, lagging in slow.processed) == run.searches - len(published)


def test_an_event_whose_queueing_was_interrupted_is_processed_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    slow = SlowPolicy()
    slow.go.release(3)
    with running(slow) as run:
        calls = run._calls
        monkeypatch.setattr(run, "_calls", SimpleNamespace(put=interrupted, get=calls.get))
        with pytest.raises(KeyboardInterrupt):
            run.begin([])
        monkeypatch.setattr(run, "_calls", calls)
        run.routed(Routed(0, [0]))
        run.flush()
        assert [event for event, _ in slow.processed] == ["begin 0", "layer 0"]
        assert run.retention_priority[0, 0] == 2  # the last event's scores were published


def test_iterations_are_skipped_rather_than_queued_without_bound() -> None:
    slow = SlowPolicy()
    step = Step(0, 1, np.array([1], np.int32))
    with running(slow) as run:
        for _ in range(50):
            run.begin([step])
            for layer in range(2):
                run.routed(Routed(layer, [0]))
            run.end()
        slow.go.release(10_000)
        run.flush()
        observed = [event for event, _ in slow.processed if event != "begin 0"]
        assert len(observed) < 50 * 4 / 2
        assert observed == ["begin 1", "layer 0", "layer 1", "end"] * (len(observed) // 4)
        assert slow.processed[len(observed)][0] == "begin 0"  # the next iteration does not follow the last one


def test_an_error_is_raised_by_the_next_event() -> None:
    class Faulty(Policy):
        def routed(self, event: Routed) -> None:
            raise ValueError(f"no layer {event.layer}")

    with running(Faulty(2, 3)) as run:
        run.routed(Routed(7, [0]))
        with pytest.raises(ValueError, match="no layer 7"):
            run.flush()
        with pytest.raises(ValueError, match="no layer 7"):
            run.end()


def test_the_thread_ends() -> None:
    before = threading.active_count()
    with running(SlowPolicy()):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


@pytest.mark.parametrize("name", [name for name in ASYNC_POLICIES if FACTORIES[name].is_persistent])
def test_state_is_read_and_replaced_between_two_events(name: str) -> None:
    iterations = workload(6, SHAPE, iterations=4)
    direct = informed(name, iterations, SHAPE)
    for _ in play(direct, iterations):
        pass
    with running(informed(name, iterations, SHAPE)) as run, running(informed(name, iterations, SHAPE)) as other:
        for _ in play(run, iterations):
            run.flush()
        state = run.state_dict()
        assert run.num_updates == direct.num_updates
        assert state.keys() == direct.state_dict().keys()
        assert all(np.array_equal(array, direct.state_dict()[key]) for key, array in state.items())
        other.load_state_dict(state)
        assert other.num_updates == run.num_updates
        assert all(np.array_equal(array, other.state_dict()[key]) for key, array in state.items())
    assert run.state_dict() == {}
