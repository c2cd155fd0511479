"""Runs a policy asynchronously on a worker thread, so that the forward pass never waits for a search."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from finemoe.metrics import NEVER, Durations
from finemoe.policy import Policy
from finemoe.policy.base import StateDict
from finemoe.types import Recorded, Routed, Step

R = TypeVar("R")
_MAX_QUEUED_ITERATIONS = 4  # with more than these queued, new iterations are skipped: the policy can't keep up
POLICY_TIMINGS = ("begins", "gates")  # attributes of PolicyTimings, and their keys in the results of `finemoe bench`


@dataclass
class PolicyTimings:
    """Latency of the events whose scores were published: begins of iterations, and routed layers.

    From the event, or from the end of the event before it if that is later, to the new scores. Includes waiting for a
    core.
    """

    begins: Durations = NEVER
    gates: Durations = NEVER


class AsyncPolicy(Policy):
    """Runs another policy asynchronously on a worker thread.

    Events are queued and return at once. The scores here are a copy of the inner policy's, updated after each event.
    While newer events are queued the inner policy only observes (`Policy.lagging`), and its scores for that event are
    dropped: they would be late. A reader may see a copy in progress, a mix of two valid rankings.

    Args:
        policy: the inner policy; from now on only this object may use it.
        on_scores: called from the worker thread after new scores.

    Attributes:
        searches: events processed by the inner policy.
        dropped: of these, without new scores as newer events were queued; also counts skipped iterations.
        timings: `None` unless attached, by `finemoe bench`.
    """

    def __init__(self, policy: Policy, on_scores: Callable[[], None] = lambda: None) -> None:
        super().__init__(policy.layers, policy.experts)
        self.inner = policy
        self.on_scores = on_scores
        self.margin, self.switch = policy.margin, policy.switch
        shared = (
            "prefetches", "needs", "uses", "lookahead", "substitutes", "clairvoyant", "compiles", "runs_async",
            "throttles_prefetch",
        )  # fmt: skip
        self.__dict__.update({name: getattr(policy, name) for name in shared})
        if policy.prefetch_priority is policy.retention_priority:
            self.prefetch_priority = self.retention_priority
        self.searches = 0
        self.dropped = 0
        self.timings: PolicyTimings | None = None
        self._idle_since_s = 0.0
        # time, method, arguments; the time is 0 without timings
        self._events: deque[tuple[float, Callable[..., Any], tuple[Any, ...]]] = deque()
        self._calls: SimpleQueue[Callable[[], object] | None] = SimpleQueue()  # None: look for events
        self._skipping = False  # the current iteration is not observed
        self._error: BaseException | None = None
        self._closed = False
        self._copy_scores()
        self._thread = threading.Thread(target=self._run, name="finemoe-policy", daemon=True)
        self._thread.start()

    def begin(self, steps: Sequence[Step]) -> None:
        self._skipping = len(self._events) > _MAX_QUEUED_ITERATIONS * (self.layers + 2)
        if self._skipping:
            self.dropped += 1
            self._enqueue(self.inner.begin, ())  # the next observed iteration does not follow the last one
        else:
            self._enqueue(self.inner.begin, tuple(steps))

    def routed(self, event: Routed) -> None:
        if not self._skipping:
            self._enqueue(self.inner.routed, event)

    def end(self) -> None:
        if not self._skipping:
            self._enqueue(self.inner.end)

    def learn(self, recorded: Recorded) -> None:
        self._enqueue(self.inner.learn, recorded)

    def flush(self) -> None:
        """Blocks until all queued events are processed. Raises errors of the worker thread."""
        self._call(lambda: None)

    @property
    def num_updates(self) -> int:
        return self.inner.num_updates

    def state_dict(self) -> StateDict:
        """The inner policy's, after all events queued so far; empty after `close`. From any thread."""
        return self._call(self.inner.state_dict) or {}

    def load_state_dict(self, state_dict: Mapping[str, npt.NDArray[Any]]) -> None:
        self._call(lambda: self.inner.load_state_dict(state_dict))

    def finish(self) -> Policy | None:
        """Processes all queued events and ends the thread. Returns the inner policy, or `None` after an error in it."""
        with suppress(BaseException):
            self.flush()
        self.close()
        return self.inner if self._error is None else None

    def close(self) -> None:
        """Ends the thread after its current event; queued ones are discarded."""
        self._closed = True
        self._calls.put(None)
        self._thread.join()

    def _call(self, function: Callable[[], R]) -> R | None:
        """Calls a function on the worker thread, between two events. Blocks; `None` if the thread has ended."""
        results: list[R] = []
        done = threading.Event()

        def call() -> None:
            try:
                results.append(function())
            finally:
                done.set()

        self._calls.put(call)
        while self._thread.is_alive() and not done.wait(0.1):
            pass
        self._raise_error()
        return results[0] if results else None

    def _enqueue(self, method: Callable[..., Any], *arguments: Any) -> None:
        self._raise_error()
        self._events.append((0.0 if self.timings is None else time.perf_counter(), method, arguments))
        self._calls.put(None)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            function = self._calls.get()
            try:
                # all events, not one: Ctrl-C may have interrupted an earlier `_enqueue` before its `put`
                while self._events and not self._closed:
                    self._process(*self._events.popleft())
                if self._closed:
                    return
                if function is not None:
                    function()
            except BaseException as error:  # noqa: BLE001 - raised by the next event or call
                self._error = error
                return

    def _process(self, queued_s: float, method: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.inner.lagging = bool(self._events)
        method(*arguments)
        self.searches += 1
        if self.inner.lagging:
            self.dropped += 1
        else:
            self._copy_scores()
            if self.timings is not None and queued_s:
                self._record(self.timings, queued_s, method)
            self.on_scores()
        if self.timings is not None:
            self._idle_since_s = time.perf_counter()

    def _record(self, timings: PolicyTimings, queued_s: float, method: Callable[..., Any]) -> None:
        duration = Durations.one(time.perf_counter() - max(queued_s, self._idle_since_s))
        if method == self.inner.begin:
            timings.begins += duration
        elif method == self.inner.routed:
            timings.gates += duration

    def _copy_scores(self) -> None:
        np.copyto(self.retention_priority, self.inner.retention_priority)
        if self.prefetch_priority is not self.retention_priority:
            np.copyto(self.prefetch_priority, self.inner.prefetch_priority)
