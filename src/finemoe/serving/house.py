"""What the endpoints share: one of each, for as long as the server runs."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import Request

from finemoe.serving.admission import Admission
from finemoe.serving.answer import Answer
from finemoe.serving.job import Job
from finemoe.serving.metrics import Metrics
from finemoe.serving.prompts import Prompts
from finemoe.serving.running import Running, Shelter
from finemoe.serving.served import Served
from finemoe.serving.timings import Progress, Unwatched


class House:
    """A server's inside.

    Args:
        served: the model.
        progress: is told of tokens as they come.
    """

    def __init__(self, served: Served, progress: Progress | None = None) -> None:
        self.served = served
        self.metrics = Metrics(served)
        self.prompts = Prompts(served)
        self.admission = Admission(served.config.capacity, served.config.max_running)
        self._shelter = Shelter(
            served.worker,
            self.admission,
            served.config.request_timeout_s,
            self.metrics.ended,
            progress or Unwatched(),
        )

    def run(self, request: Request, jobs: Sequence[Job], answers: Sequence[Answer], prompt_tokens: int) -> Running:
        """Start the answers to a request."""
        running = Running(self._shelter, jobs, answers, prompt_tokens, request.state.arrived_s)
        running.start(request.receive)
        return running
