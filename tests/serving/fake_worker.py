"""A `Worker` without a model: a script gives the tokens."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from finemoe.serving.scheduler.job import Finished, Job, JobListener, Token, WorkerLoad

Script = Callable[[Job], Iterator[int]]
END = 0  # end-of-sequence id of the tiny tokenizer


@dataclass
class _Running:
    job: Job
    listener: JobListener
    script: Iterator[int]
    left: int
    draw: random.Random


class FakeWorker:
    """Generates one token per step of each running job, on its own thread.

    Args:
        script: returns the tokens of a job's answer; may raise `OSError`. A token that the job's constraint forbids is
            replaced by a random allowed one.
        max_running: jobs that run at the same time.
        vocabulary_size: columns of the logits that a constraint masks.
    """

    def __init__(self, script: Script, max_running: int = 4, vocabulary_size: int = 258) -> None:
        self.script = script
        self.jobs: list[Job] = []
        self.cancelled: list[str] = []
        self.may_step = threading.Event()  # while cleared, the model hangs
        self.may_step.set()
        self.longest_prompt = 1 << 20
        self.failed: str | None = None
        self._max_running = max_running
        self._vocabulary_size = vocabulary_size
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Job, JobListener]] = deque()
        self._running: dict[str, _Running] = {}
        self._accepting = True
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fake-worker", daemon=True)
        self._thread.start()

    def submit(self, job: Job, listener: JobListener) -> None:
        if len(job.prompt) > self.longest_prompt:
            raise ValueError(f"the prompt's {len(job.prompt)} tokens never fit the key-value cache")
        with self._changed:
            if not self._accepting or self.failed:
                raise RuntimeError("the worker accepts no more jobs")
            self.jobs.append(job)
            self._waiting.append((job, listener))
            self._changed.notify_all()

    def cancel(self, name: str) -> None:
        with self._changed:
            self.cancelled.append(name)
            listeners = [self._running.pop(name).listener] if name in self._running else []
            listeners += [listener for job, listener in self._waiting if job.name == name]
            self._waiting = deque(entry for entry in self._waiting if entry[0].name != name)
            self._changed.notify_all()
        for listener in listeners:
            listener(name, Finished("cancelled"))

    def load(self) -> WorkerLoad:
        with self._changed:
            return WorkerLoad(len(self._running), len(self._waiting), 64 - len(self._running), 64)

    def failure(self) -> str | None:
        return self.failed

    def drain(self, timeout_s: float) -> bool:
        with self._changed:
            self._accepting = False
            done = self._changed.wait_for(lambda: not self._running and not self._waiting, timeout_s)
            left = [*self._running, *(job.name for job, _ in self._waiting)]
        for name in left:
            self.cancel(name)
        return done

    def close(self) -> None:
        self.drain(0)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.may_step.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._running or self._waiting)
                if self._closed:
                    return
                while self._waiting and len(self._running) < self._max_running:
                    job, listener = self._waiting.popleft()
                    self._running[job.name] = _Running(
                        job, listener, self.script(job), job.max_tokens, random.Random(str(job.seed))
                    )
                running = list(self._running.values())
            self.may_step.wait()
            for one in running:
                self._step(one)

    def _step(self, one: _Running) -> None:
        job = one.job
        try:
            token = self._masked(one, next(one.script, END))
        except OSError as error:
            self._finish(one, Finished("error", str(error)))
            return
        with self._changed:
            if job.name not in self._running:
                return  # cancelled in the meantime
        top_logprobs = () if job.logprobs is None else tuple((token + i, -0.5 - i) for i in range(job.logprobs))
        one.listener(job.name, Token(token, None if job.logprobs is None else -0.5, top_logprobs))
        one.left -= 1
        if token in job.stop:
            self._finish(one, Finished("stop"))
        elif not one.left:
            self._finish(one, Finished("length"))

    def _masked(self, one: _Running, token: int) -> int:
        job = one.job
        if job.constraint is None:
            return token
        allowed = torch.isfinite(job.constraint.mask(torch.zeros(self._vocabulary_size))).nonzero()[:, 0].tolist()
        chosen: int = token if token in allowed else one.draw.choice(allowed)
        job.constraint.accept(chosen)
        return chosen

    def _finish(self, one: _Running, finished: Finished) -> None:
        with self._changed:
            if self._running.pop(one.job.name, None) is None:
                return
            self._changed.notify_all()
        one.listener(one.job.name, finished)
