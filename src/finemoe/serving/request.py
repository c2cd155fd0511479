"""The life of a generation request: admission, jobs, timeout, disconnect, timings.

`RequestRun` submits one job per answer and merges everything that can happen to them (tokens, ends, the timeout, the
client's disconnect) into one queue of events.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from finemoe.serving.detokenizer import ChoiceOutput, TextPiece
from finemoe.serving.errors import ApiError, model_failed
from finemoe.serving.scheduler.job import Finished, Job, Token, Worker

KEEPALIVE_S = 15.0
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
# cancelled: the client disconnected; refused: the server shut down first
Outcome = Literal["finished", "cancelled", "timeout", "error", "refused"]


class ProgressListener(Protocol):
    """Gets the progress of running answers, on the event loop's thread."""

    def token(self) -> None:
        """A token was generated."""

    def first_token(self, ttft_s: float) -> None:
        """The first token of an answer was generated, `ttft_s` after its request."""

    def finished(self, tpot_s: float) -> None:
        """An answer of more than one token finished; `tpot_s` is its mean time per token after the first."""


class NoProgress:
    """A `ProgressListener` that ignores everything."""

    def token(self) -> None: ...

    def first_token(self, ttft_s: float) -> None: ...

    def finished(self, tpot_s: float) -> None: ...


class ClientDisconnected(Exception):  # noqa: N818 - not an error of the server
    """The client closed its connection."""


class Admission:
    """Admission control: bounds the number of answers that run or wait; admits none during shutdown.

    Args:
        capacity: answers that may run or wait.
        max_running: answers that run at the same time.

    Attributes:
        answers: admitted and not released.
        draining: whether the server is shutting down.
    """

    def __init__(self, capacity: int, max_running: int) -> None:
        self.draining = False
        self.answers = 0
        self._capacity = capacity
        self._max_running = max_running
        self._mean_s = 1.0  # moving average of an answer's duration
        self._idle = asyncio.Event()
        self._idle.set()

    def check(self, answers: int) -> None:
        """Raises unless so many answers would be admitted now.

        Raises:
            ApiError: 400 if they never fit, 429 if the queue is full, 503 if the server is shutting down.
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})
        if answers > self._capacity:
            raise ApiError(
                400,
                f"n: {answers} answers at once; this server takes at most {self._capacity}",
                param="n",
                code="too_many",
            )
        if self.answers + answers > self._capacity:
            raise ApiError(
                429,
                f"{self.answers} answers are running or waiting, and this server takes {self._capacity}; retry later",
                code="queue_full",
                headers={"Retry-After": str(self._retry_after_s())},
            )

    def admit(self, answers: int) -> None:
        """Admits so many answers, or raises as `check` does. Pair it with `release`."""
        self.check(answers)
        self.answers += answers
        self._idle.clear()

    def release(self, answers: int, duration_s: float) -> None:
        """Frees the places of answers that have ended after `duration_s`."""
        self.answers -= answers
        self._mean_s += 0.1 * (duration_s - self._mean_s)
        if not self.answers:
            self._idle.set()

    async def drain(self, timeout_s: float) -> bool:
        """Stops admitting and waits for all answers to end. Returns whether they did within `timeout_s`."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def _retry_after_s(self) -> int:
        """Expected seconds until a place is free: the mean duration over the number of answers that run at a time."""
        return max(1, min(60, math.ceil(self._mean_s / self._max_running)))


@dataclass
class RequestTimings:
    """Timings and token counts of one request, by the monotonic clock.

    Attributes:
        message: why it failed, for the log.
        ttft_s: time to first token of each answer that has one.
        tpot_s: mean time per token after the first of each answer that has more than one.
    """

    prompt_tokens: int
    answers: int
    started_s: float
    progress: ProgressListener
    outcome: Outcome = "finished"
    message: str = ""
    total_s: float = 0.0
    completion_tokens: int = 0
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)
    _first_s: dict[int, float] = field(default_factory=dict)
    _last_s: dict[int, float] = field(default_factory=dict)

    def token(self, answer: int) -> None:
        """Records a token of an answer."""
        now_s = time.monotonic()
        if answer not in self._first_s:
            self._first_s[answer] = now_s
            self.ttft_s.append(now_s - self.started_s)
            self.progress.first_token(self.ttft_s[-1])
        self.progress.token()
        self._last_s[answer] = now_s

    def end(self, outcome: Outcome, tokens: Sequence[int]) -> None:
        """Records the end of the request, with the number of tokens of each answer."""
        self.outcome = outcome
        self.completion_tokens = sum(tokens)
        self.total_s = time.monotonic() - self.started_s
        for answer, first_s in self._first_s.items():
            if tokens[answer] > 1:
                self.tpot_s.append((self._last_s[answer] - first_s) / (tokens[answer] - 1))
                self.progress.finished(self.tpot_s[-1])


@dataclass(frozen=True)
class RequestContext:
    """What every request of a server needs.

    Attributes:
        on_end: called with the timings of each request that has ended.
    """

    worker: Worker
    admission: Admission
    timeout_s: float
    on_end: Callable[[RequestTimings], None]
    progress: ProgressListener


@dataclass(frozen=True)
class _Event:
    answer: int  # index in the request; -1: the whole request
    what: Token | Finished | Literal["disconnected", "timeout"]


class RequestRun:
    """Runs the answers of one request, from `start` to `close`.

    Args:
        request_context: of the server.
        jobs: one per answer; their names are replaced by unique ones.
        outputs: one per answer, fed with the tokens of its job.
        prompt_tokens: of all prompts together.
        arrived_s: when the request arrived, by the monotonic clock.
    """

    def __init__(
        self,
        request_context: RequestContext,
        jobs: Sequence[Job],
        outputs: Sequence[ChoiceOutput],
        prompt_tokens: int,
        arrived_s: float,
    ) -> None:
        self._context = request_context
        self._outputs = list(outputs)
        prefix = uuid.uuid4().hex
        self._jobs = [replace(job, name=f"{prefix}-{i}") for i, job in enumerate(jobs)]
        self._index = {job.name: i for i, job in enumerate(self._jobs)}
        self._unfinished: set[int] = set()
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._cleanup: list[Callable[[], object]] = []
        self.timings = RequestTimings(prompt_tokens, len(self._jobs), arrived_s, request_context.progress)

    @property
    def completion_tokens(self) -> int:
        return sum(output.num_tokens for output in self._outputs)

    @property
    def texts(self) -> list[str]:
        """The text of each answer so far."""
        return [output.text for output in self._outputs]

    @property
    def timeout_s(self) -> float:
        return self._context.timeout_s

    def start(self, receive: Receive) -> None:
        """Submits the jobs.

        Args:
            receive: of the ASGI request, whose body has been read; from here on it only reports the disconnect.

        Raises:
            ApiError: the request is not admitted, or a prompt never fits the cache.
        """
        self._context.admission.admit(len(self._jobs))
        self._cleanup.append(self._release)
        try:
            for i, job in enumerate(self._jobs):
                self._context.worker.submit(job, self._on_event)
                self._unfinished.add(i)
        except ValueError as error:
            self._abort()
            raise ApiError(400, str(error), code="context_length_exceeded") from error
        except RuntimeError as error:
            self._abort()
            if self._context.worker.failure() is not None:
                raise model_failed() from error
            raise ApiError(503, "the server is shutting down", code="shutting_down") from error
        left_s = self.timings.started_s + self._context.timeout_s - time.monotonic()
        timer = self._loop.call_later(left_s, self._events.put_nowait, _Event(-1, "timeout"))
        watch = self._loop.create_task(self._watch_disconnect(receive))
        self._cleanup += [timer.cancel, watch.cancel]

    async def pieces(self) -> AsyncIterator[TextPiece | None]:
        """Pieces of all answers in the order of their generation; `None` after each `KEEPALIVE_S` without one.

        Raises:
            ClientDisconnected: the client closed its connection.
            ApiError: the request timed out, or the model failed.
        """
        while self._unfinished:
            try:
                event = await asyncio.wait_for(self._events.get(), KEEPALIVE_S)
            except TimeoutError:
                yield None
                continue
            if event.what == "disconnected":
                self.close("cancelled")
                raise ClientDisconnected
            if event.what == "timeout":
                self.close("timeout")
                raise ApiError(504, f"not finished after {self._context.timeout_s:g} seconds", code="request_timeout")
            if event.answer in self._unfinished and (piece := self._process(event.answer, event.what)) is not None:
                yield piece
        self.close("finished")

    def close(self, outcome: Outcome) -> None:
        """Cancels unfinished jobs and releases the places. Only the first call has an effect."""
        if self._cleanup:
            self.timings.end(outcome, [output.num_tokens for output in self._outputs])
            self._abort()
            self._context.on_end(self.timings)

    def _abort(self) -> None:
        for i in self._unfinished:
            self._context.worker.cancel(self._jobs[i].name)
        self._unfinished.clear()
        for call in self._cleanup:
            call()
        self._cleanup.clear()

    def _process(self, index: int, event: Token | Finished) -> TextPiece | None:
        output = self._outputs[index]
        if isinstance(event, Token):
            self.timings.token(index)
            piece = output.append(event)
            if output.ended:  # by a stop string, which the worker does not know of
                self._context.worker.cancel(self._jobs[index].name)
                self._unfinished.discard(index)
            return piece
        if event.reason in {"error", "cancelled"}:
            self.timings.message = event.message
            self.close("error" if event.reason == "error" else "refused")
            if event.reason == "error":
                raise ApiError(500, "the model failed on this request; the server's log says why", code="model_error")
            raise ApiError(503, "the server has shut down", code="shutting_down")
        self._unfinished.discard(index)
        return output.finish(event)

    def _on_event(self, name: str, event: Token | Finished) -> None:
        """The listener of all jobs; runs on the model thread."""
        with suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, _Event(self._index[name], event))

    async def _watch_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(_Event(-1, "disconnected"))

    def _release(self) -> None:
        self._context.admission.release(len(self._jobs), time.monotonic() - self.timings.started_s)
