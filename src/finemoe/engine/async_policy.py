"""Runs a policy beside the forward pass: the model never waits for a search, and a search that is late is dropped."""

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
from finemoe.policy.cache_state import Scores
from finemoe.types import Recorded, Routed, Step

R = TypeVar("R")
_ITERATIONS_BEHIND = 4  # with more than these waiting, an iteration goes unobserved: the policy can't keep up


POLICY_TIMINGS = ("begins", "gates")  # of Thoughts


@dataclass
class PolicyTimings:
    """How long those took that counted, of an iteration's begin and of a gate.

    From the event, or from the end of the thought before it, to the scores. Waiting for a core is in it.
    """

    begins: Durations = NEVER
    gates: Durations = NEVER


class AsyncPolicy(Policy):
    """Stands for another policy, which hears the events on a thread of its own.

    Events come back at once; the scores are the other's latest ones, copied over when it has thought something through.
    While newer events wait, it is told to observe only (`Policy.behind`): its predictions would be late. What is read
    in the middle of a copy is a mix of two rankings, both of them valid.

    Args:
        policy: the other one; from now on only this object may use it.
        published: called from the thread after new scores.
    """

    def __init__(self, policy: Policy, published: Callable[[], None] = lambda: None) -> None:
        super().__init__(policy.layers, policy.experts)
        self.inner = policy
        self.published = published
        self.margin, self.switch = policy.margin, policy.switch
        kind = (
            "prefetches", "needs", "uses", "lookahead", "substitutes", "clairvoyant", "compiles", "runs_async",
            "throttles_prefetch",
        )  # fmt: skip
        self.__dict__.update({name: getattr(policy, name) for name in kind})
        if policy.prefetch_priority is policy.retention_priority:
            self.prefetch_priority = self.retention_priority
        self.searches = 0  # events that scores were asked of
        self.late = 0  # of these, dropped
        self.policy_timings = PolicyTimings()
        self._idle_since_s = 0.0
        self._events: deque[tuple[float, Callable[..., Any], tuple[Any, ...]]] = deque()  # with their times
        self._calls: SimpleQueue[Callable[[], object] | None] = SimpleQueue()  # there are events: None; or a question
        self._skipping = False  # this iteration goes unobserved
        self._fault: BaseException | None = None
        self._closed = False
        self._copy()
        self._thread = threading.Thread(target=self._run, name="finemoe-policy", daemon=True)
        self._thread.start()

    def begin(self, steps: Sequence[Step]) -> None:
        self._skipping = len(self._events) > _ITERATIONS_BEHIND * (self.layers + 2)
        if self._skipping:
            self.late += 1
            self._tell(self.inner.begin, ())  # what comes later does not follow what was seen last
        else:
            self._tell(self.inner.begin, tuple(steps))

    def routed(self, event: Routed) -> None:
        if not self._skipping:
            self._tell(self.inner.routed, event)

    def end(self) -> None:
        if not self._skipping:
            self._tell(self.inner.end)

    def learn(self, recorded: Recorded) -> None:
        self._tell(self.inner.learn, recorded)

    def ask_ahead(self, embedding: npt.NDArray[np.float32], reply: Callable[[Scores | None], object]) -> None:
        """What the other policy foresees of a prompt; `reply` hears it from the thread, when that gets there."""
        self._calls.put(lambda: reply(self.inner.predict_request(embedding)))

    def settle(self) -> None:
        """Returns when everything is thought through. Raises what a thought has raised."""
        self._ask(lambda: None)

    @property
    def num_updates(self) -> int:
        return self.inner.num_updates

    def state_dict(self) -> StateDict:
        """What it knows once the events so far are thought through; empty after `close`. From any thread."""
        return self._ask(self.inner.state_dict) or {}

    def load_state_dict(self, state_dict: Mapping[str, npt.NDArray[Any]]) -> None:
        self._ask(lambda: self.inner.load_state_dict(state_dict))

    def _ask(self, question: Callable[[], R]) -> R | None:
        """The answer, found on the policy's thread between two events; `None` if that has ended."""
        answers: list[R] = []
        done = threading.Event()

        def ask() -> None:
            try:
                answers.append(question())
            finally:
                done.set()

        self._calls.put(ask)
        while self._thread.is_alive() and not done.wait(0.1):
            pass
        self._raise()
        return answers[0] if answers else None

    def finish(self) -> Policy | None:
        """Ends the thread once everything is thought through. Returns the policy, or `None` if a thought has failed."""
        with suppress(BaseException):
            self.settle()
        self.close()
        return self.inner if self._fault is None else None

    def close(self) -> None:
        """Ends the thread, after the thought under way."""
        self._closed = True
        self._calls.put(None)
        self._thread.join()

    def _tell(self, what: Callable[..., Any], *arguments: Any) -> None:
        self._raise()
        self._events.append((time.perf_counter(), what, arguments))
        self._calls.put(None)

    def _raise(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _run(self) -> None:
        while True:
            question = self._calls.get()
            try:
                while self._events and not self._closed:  # all: a Ctrl-C may have kept one from being called out
                    self._think(*self._events.popleft())
                if self._closed:
                    return
                if question is not None:
                    question()
            except BaseException as fault:  # noqa: BLE001 - belongs to whoever tells the next event
                self._fault = fault
                return

    def _think(self, told_s: float, what: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.inner.lagging = bool(self._events)
        what(*arguments)
        self.searches += 1
        if self.inner.lagging:
            self.late += 1
        else:
            self._copy()
            took = Durations.one(time.perf_counter() - max(told_s, self._idle_since_s))
            if what == self.inner.begin:
                self.policy_timings.begins += took
            elif what == self.inner.routed:
                self.policy_timings.gates += took
            self.published()
        self._idle_since_s = time.perf_counter()

    def _copy(self) -> None:
        np.copyto(self.retention_priority, self.inner.retention_priority)
        if self.prefetch_priority is not self.retention_priority:
            np.copyto(self.prefetch_priority, self.inner.prefetch_priority)
