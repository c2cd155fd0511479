"""The jobs of one request on their way: everything that can happen to them comes through one queue."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from finemoe.serving.admission import Admission
from finemoe.serving.answer import Answer, Piece
from finemoe.serving.errors import ApiError, model_failed
from finemoe.serving.job import Finished, Job, Token, Worker
from finemoe.serving.timings import Outcome, Progress, Timings

KEEPALIVE_S = 15.0
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class ClientGone(Exception):  # noqa: N818 - nothing is wrong
    """The client has closed its connection: nobody is left to answer."""


class Shelter:
    """Where running requests live: the worker, the admission, and who is told."""

    def __init__(
        self,
        worker: Worker,
        admission: Admission,
        timeout_s: float,
        on_end: Callable[[Timings], None],
        progress: Progress,
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


class Running:
    """The answers to one request, from `start` to `close`.

    Args:
        shelter: of the server.
        jobs: one for each answer; their names are replaced by unique ones.
        answers: what comes of them.
        prompt_tokens: of all prompts together.
        arrived_s: when the request came, by the monotonic clock.
    """

    def __init__(
        self, shelter: Shelter, jobs: Sequence[Job], answers: Sequence[Answer], prompt_tokens: int, arrived_s: float
    ) -> None:
        self._shelter = shelter
        self._answers = list(answers)
        prefix = uuid.uuid4().hex
        self._jobs = [replace(job, name=f"{prefix}-{i}") for i, job in enumerate(jobs)]
        self._index = {job.name: i for i, job in enumerate(self._jobs)}
        self._open: set[int] = set()
        self._events: asyncio.Queue[_Event] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._cleanup: list[Callable[[], object]] = []
        self.timings = Timings(prompt_tokens, len(self._jobs), arrived_s, shelter.progress)

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

    async def pieces(self) -> AsyncIterator[Piece | None]:
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

    def _heard(self, index: int, what: Token | Finished) -> Piece | None:
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
