"""The jobs of one request on their way: everything that can happen to them comes through one queue."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from finemoe.serving.detokenizer import Answer, TextPiece
from finemoe.serving.errors import ApiError, model_failed
from finemoe.serving.scheduler.job import Finished, Job, Token, Worker


class Admission:
    """Counts the answers in the house.

    Args:
        capacity: answers that may run or wait.
        together: of these, as many as run at the same time.
    """

    def __init__(self, capacity: int, together: int) -> None:
        self.draining = False
        self.answers = 0
        self._capacity = capacity
        self._together = together
        self._mean_s = 1.0  # that an answer takes, of late
        self._idle = asyncio.Event()
        self._idle.set()

    def check(self, answers: int) -> None:
        """Find out whether so many answers would be taken in.

        Raises:
            ApiError: no: 400 if they never fit, 429 if not now, 503 if the server is closing.
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})
        if answers > self._capacity:
            raise ApiError(
                400, f"n: {answers} answers at once, and this server takes {self._capacity}", param="n", code="too_many"
            )
        if self.answers + answers > self._capacity:
            raise ApiError(
                429,
                f"{self.answers} answers are running or waiting, and this server takes {self._capacity}; retry later",
                code="queue_full",
                headers={"Retry-After": str(self._retry_after_s())},
            )

    def enter(self, answers: int) -> None:
        """Take so many answers in, or raise what `check` raises; `leave` lets them out."""
        self.check(answers)
        self.answers += answers
        self._idle.clear()

    def leave(self, answers: int, took_s: float) -> None:
        """Answers have ended, after so many seconds."""
        self.answers -= answers
        self._mean_s += 0.1 * (took_s - self._mean_s)
        if not self.answers:
            self._idle.set()

    async def drained(self, timeout_s: float) -> bool:
        """Take none any more, and wait for the last to leave. Returns whether it did in time."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def _retry_after_s(self) -> int:
        """When a place should be free: those inside end one after another, so many at a time."""
        return max(1, min(60, math.ceil(self._mean_s / self._together)))


# cancelled: the client went away; refused: the server ended first
Outcome = Literal["finished", "cancelled", "timeout", "error", "refused"]


class ProgressListener(Protocol):
    """Hears of answers while they are under way, on the event loop's thread."""

    def token(self) -> None:
        """A token of an answer came."""

    def first_token(self, ttft_s: float) -> None:
        """An answer's first token came, this long after its request."""

    def finished(self, tpot_s: float) -> None:
        """An answer of more than one token ended; each after the first took this long, on average."""


class NoProgress:
    """A `ProgressListener` that nobody looks at."""

    def token(self) -> None: ...

    def first_token(self, ttft_s: float) -> None: ...

    def finished(self, tpot_s: float) -> None: ...


@dataclass
class Timings:
    """Of one request, by the monotonic clock; `ttft_s` and `tpot_s` have an entry for each answer that has one."""

    prompt_tokens: int
    answers: int
    started_s: float
    progress: ProgressListener
    outcome: Outcome = "finished"
    message: str = ""  # what failed
    total_s: float = 0.0
    completion_tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    _first_s: dict[int, float] = field(default_factory=dict)
    _last_s: dict[int, float] = field(default_factory=dict)

    def token(self, answer: int) -> None:
        """A token of an answer is here."""
        now_s = time.monotonic()
        if answer not in self._first_s:
            self._first_s[answer] = now_s
            self.ttft_s.append(now_s - self.started_s)
            self.progress.first_token(self.ttft_s[-1])
        self.progress.token()
        self._last_s[answer] = now_s

    def end(self, outcome: Outcome, tokens: Sequence[int]) -> None:
        """The request has ended, with so many tokens in each answer."""
        self.outcome = outcome
        self.completion_tokens = sum(tokens)
        self.total_s = time.monotonic() - self.started_s
        for answer, first_s in self._first_s.items():
            if tokens[answer] > 1:
                self.tpot_s.append((self._last_s[answer] - first_s) / (tokens[answer] - 1))
                self.progress.finished(self.tpot_s[-1])


KEEPALIVE_S = 15.0
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class ClientGone(Exception):  # noqa: N818 - nothing is wrong
    """The client has closed its connection: nobody is left to answer."""


class RequestContext:
    """Where running requests live: the worker, the admission, and who is told."""

    def __init__(
        self,
        worker: Worker,
        admission: Admission,
        timeout_s: float,
        on_end: Callable[[Timings], None],
        progress: ProgressListener,
    ) -> None:
        self.worker = worker
        self.admission = admission
        self.timeout_s = timeout_s
        self.on_end = on_end
        self.progress = progress


@dataclass(frozen=True)
class _Event:
    answer: int  # of the request
    what: Token | Finished | Literal["gone", "timeout"]


class RequestRun:
    """The answers to one request, from `start` to `close`.

    Args:
        shelter: of the server.
        jobs: one for each answer; their names are replaced by unique ones.
        answers: what comes of them.
        prompt_tokens: of all prompts together.
        arrived_s: when the request came, by the monotonic clock.
    """

    def __init__(
        self,
        request_context: RequestContext,
        jobs: Sequence[Job],
        answers: Sequence[Answer],
        prompt_tokens: int,
        arrived_s: float,
    ) -> None:
        self._shelter = request_context
        self._answers = list(answers)
        prefix = uuid.uuid4().hex
        self._jobs = [replace(job, name=f"{prefix}-{i}") for i, job in enumerate(jobs)]
        self._index = {job.name: i for i, job in enumerate(self._jobs)}
        self._open: set[int] = set()
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._cleanup: list[Callable[[], object]] = []
        self.timings = Timings(prompt_tokens, len(self._jobs), arrived_s, request_context.progress)

    @property
    def completion_tokens(self) -> int:
        return sum(answer.tokens for answer in self._answers)

    @property
    def texts(self) -> list[str]:
        """What was answered so far, choice by choice."""
        return [answer.text for answer in self._answers]

    @property
    def timeout_s(self) -> float:
        return self._shelter.timeout_s

    def start(self, receive: Receive) -> None:
        """Submit the jobs.

        Args:
            receive: of the request, its body read; then it only tells that the client went away.

        Raises:
            ApiError: there is no room, or a prompt that never fits.
        """
        self._shelter.admission.enter(len(self._jobs))
        self._cleanup.append(self._leave)
        try:
            for i, job in enumerate(self._jobs):
                self._shelter.worker.submit(job, self._listen)
                self._open.add(i)
        except ValueError as error:
            self._abandon()
            raise ApiError(400, str(error), code="context_length_exceeded") from error
        except RuntimeError as error:
            self._abandon()
            if self._shelter.worker.failure() is not None:
                raise model_failed() from error
            raise ApiError(503, "the server is shutting down", code="shutting_down") from error
        left_s = self.timings.started_s + self._shelter.timeout_s - time.monotonic()
        timer = self._loop.call_later(left_s, self._events.put_nowait, _Event(-1, "timeout"))
        watch = self._loop.create_task(self._watch(receive))
        self._cleanup += [timer.cancel, watch.cancel]

    async def pieces(self) -> AsyncIterator[TextPiece | None]:
        """Pieces of all answers as they come; `None` now and then while nothing does, for `KEEPALIVE_S`.

        Raises:
            ClientGone: the client went away.
            ApiError: the time is over, or the model failed.
        """
        while self._open:
            try:
                event = await asyncio.wait_for(self._events.get(), KEEPALIVE_S)
            except TimeoutError:
                yield None
                continue
            if event.what == "gone":
                self.close("cancelled")
                raise ClientGone
            if event.what == "timeout":
                self.close("timeout")
                raise ApiError(504, f"not finished after {self._shelter.timeout_s:g} seconds", code="request_timeout")
            if event.answer in self._open and (piece := self._heard(event.answer, event.what)) is not None:
                yield piece
        self.close("finished")

    def close(self, outcome: Outcome) -> None:
        """Cancel what still runs, and leave. The first call's outcome counts."""
        if self._cleanup:
            self.timings.end(outcome, [answer.tokens for answer in self._answers])
            self._abandon()
            self._shelter.on_end(self.timings)

    def _abandon(self) -> None:
        for i in self._open:
            self._shelter.worker.cancel(self._jobs[i].name)
        self._open.clear()
        for call in self._cleanup:
            call()
        self._cleanup.clear()

    def _heard(self, index: int, what: Token | Finished) -> TextPiece | None:
        answer = self._answers[index]
        if isinstance(what, Token):
            self.timings.token(index)
            piece = answer.hear(what)
            if answer.ended:  # by a stop string, which the worker knows nothing of
                self._shelter.worker.cancel(self._jobs[index].name)
                self._open.discard(index)
            return piece
        if what.reason in {"error", "cancelled"}:
            self.timings.message = what.message
            self.close("error" if what.reason == "error" else "refused")
            if what.reason == "error":
                raise ApiError(500, "the model failed on this request; the server's log says why", code="model_error")
            raise ApiError(503, "the server has shut down", code="shutting_down")
        self._open.discard(index)
        return answer.end(what)

    def _listen(self, name: str, what: Token | Finished) -> None:
        """Called from the model's thread."""
        with suppress(RuntimeError):  # the loop has ended: so has whoever asked
            self._loop.call_soon_threadsafe(self._events.put_nowait, _Event(self._index[name], what))

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(_Event(-1, "gone"))

    def _leave(self) -> None:
        self._shelter.admission.leave(len(self._jobs), time.monotonic() - self.timings.started_s)
