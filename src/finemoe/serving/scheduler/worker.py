"""Continuous batching on the model thread: jobs join and leave the batch between forward passes."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from finemoe.errors import FinemoeError, UnsupportedModelError
from finemoe.model.observer import PackedRequest
from finemoe.serving.config import ServeConfig
from finemoe.serving.scheduler.job import Finished, Job, JobListener, Token, WorkerLoad
from finemoe.serving.scheduler.paged_batch import PagedBatch, ScheduledRequest
from finemoe.serving.scheduler.sampler import Sampler
from finemoe.serving.scheduler.sequential import SequentialBatch
from finemoe.system import end_openmp_threads
from finemoe.types import DECODE, PREFILL

_LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class _JobState:
    """Bookkeeping for a job between its submission and its end."""

    job: Job
    listener: JobListener
    limit: int  # most tokens of the answer: `max_tokens`, or what the cache holds
    sampler: Sampler
    tokens: int = 0  # generated so far
    request: int = -1  # the request's number in policy events
    cancelled: bool = False


class _IdleTask(NamedTuple):
    """A call for the model thread to make while it has no job."""

    call: Callable[[], object]
    done: threading.Event


class BatchingWorker:
    """Runs jobs on one model thread, batched as far as they fit; implements `Worker`.

    Until `close`, nothing else may run the model; the caller closes the model itself. A job that fills the key-value
    cache finishes with reason `length`. Penalties and suppressed tokens of the model's `generation_config` are not
    applied.

    Args:
        model: from `finemoe.load`.
        config: limits of the batch and of the key-value cache.

    Attributes:
        batches: whether jobs share forward passes. Models that transformers can't batch run one job at a time.
        capacity_tokens: the longest prompt plus answer that the key-value cache holds.

    Raises:
        ConfigError: the key-value cache is too small.
    """

    def __init__(self, model: Any, config: ServeConfig | None = None) -> None:
        self._model = model
        self._config = config or ServeConfig()
        self._vocabulary_size = model.get_input_embeddings().weight.shape[0]
        self._in_batch: dict[str, _JobState] = {}  # jobs handed to the batch; used by the model thread only
        self._pass_succeeded = False  # at least one forward pass has completed
        self._batch: PagedBatch | SequentialBatch
        try:
            self._batch = PagedBatch(
                model, self._config.key_value_bytes, self._config.max_batch_tokens, self._config.max_running
            )
        except UnsupportedModelError as error:
            self._batch = self._sequential(error)
        end_openmp_threads()  # OpenMP threads that filled the cache would compete with the model thread for cores
        self._changed = threading.Condition()  # guards all fields below
        self._jobs: dict[str, _JobState] = {}  # submitted and not ended
        self._new_jobs: deque[_JobState] = deque()  # of these, not handed to the batch yet
        self._load = WorkerLoad(0, 0, self._batch.blocks, self._batch.blocks)
        self._draining = False
        self._closing = False
        self._failure: str | None = None
        self._idle_tasks: list[_IdleTask] = []
        self._thread = threading.Thread(target=self._run, name="finemoe-model", daemon=True)
        self._thread.start()

    @property
    def batches(self) -> bool:
        return isinstance(self._batch, PagedBatch)

    @property
    def capacity_tokens(self) -> int:
        return self._batch.capacity_tokens

    def run_when_idle(self, call: Callable[[], object], timeout_s: float) -> bool:
        """Run `call` on the model thread while it has no job; blocks until it has run.

        Args:
            call: must be quick, because jobs wait for it. Its exceptions are logged.
            timeout_s: how long to wait for the model thread to be idle.

        Returns:
            Whether `call` ran; `False` if the thread was not idle in time, or the worker was closed.
        """
        task = _IdleTask(call, threading.Event())
        with self._changed:
            self._idle_tasks.append(task)
            self._changed.notify_all()
        deadline_s = time.monotonic() + timeout_s
        while self._thread.is_alive() and (left_s := deadline_s - time.monotonic()) > 0:
            if task.done.wait(min(left_s, 1.0)):
                return True
        with self._changed:
            if task in self._idle_tasks:
                self._idle_tasks.remove(task)
                return False
        return task.done.wait(timeout_s)  # the model thread has just started it

    def submit(self, job: Job, listener: JobListener) -> None:
        """Queue a job. `Finished` is the last event that its listener gets, exactly once.

        Raises:
            ValueError: the job can't run: its prompt is empty, has invalid token ids, or is longer than the cache; or
                its name is taken.
            RuntimeError: the worker is draining or closed, or has failed.
        """
        prompt, capacity = job.prompt, self.capacity_tokens
        if not prompt:
            raise ValueError("the prompt is empty")
        if len(prompt) > capacity:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, and the key-value cache holds {capacity}; shorten it, or give "
                "the server more --cache-bytes"
            )
        if min(prompt) < 0 or max(prompt) >= self._vocabulary_size:
            raise ValueError(
                f"the prompt has token ids outside the model's vocabulary; ids go from 0 to {self._vocabulary_size - 1}"
            )
        if job.max_tokens < 1:
            raise ValueError(f"max_tokens is {job.max_tokens}; it must be at least 1")
        running = _JobState(job, listener, min(job.max_tokens, capacity - len(prompt) + 1), Sampler(job))
        with self._changed:
            if self._failure is not None:
                raise RuntimeError(self._failure)
            if self._draining or self._closing:
                raise RuntimeError("the server is shutting down; it accepts no more jobs")
            if job.name in self._jobs:
                raise ValueError(f"a job named {job.name!r} already exists")
            self._jobs[job.name] = running
            self._new_jobs.append(running)
            self._changed.notify_all()

    def cancel(self, name: str) -> None:
        """End a job within one forward pass and free its cache; unknown or finished names are ignored."""
        with self._changed:
            if name in self._jobs:
                self._jobs[name].cancelled = True
                self._changed.notify_all()

    def load(self) -> WorkerLoad:
        with self._changed:
            last = self._load
            return WorkerLoad(last.running, len(self._jobs) - last.running, last.free_cache_blocks, last.cache_blocks)

    def failure(self) -> str | None:
        """The error that ended the model thread, in one line; `None` while it is healthy."""
        with self._changed:
            return self._failure

    def drain(self, timeout_s: float) -> bool:
        """Refuse new jobs and wait for the others; those unfinished after `timeout_s` are cancelled.

        Returns:
            Whether all jobs finished in time.
        """
        with self._changed:
            self._draining = True
            finished = self._changed.wait_for(lambda: not self._jobs, timeout_s)
            for running in self._jobs.values():
                running.cancelled = True
            self._changed.notify_all()
        return finished

    def close(self) -> None:
        """Cancel all jobs and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        last = Finished("cancelled")
        failure = None
        try:
            while self._update_jobs():
                self._step()
        except BaseException as error:  # noqa: BLE001 - every job must get its `Finished`, whatever the error
            _LOG.exception("the model's thread has failed")
            failure = f"the model's thread has failed ({_message(error)})"
            last = Finished("error", failure)
            self._in_batch.clear()
            with suppress(Exception):  # the batch itself may be what failed
                self._batch.clear()
        finally:
            with self._changed:
                self._closing = True
                self._failure = failure
            for running in list(self._jobs.values()):
                self._end(running, last)
            self._batch.close()

    def _update_jobs(self) -> bool:
        """Wait for work; run idle tasks, remove cancelled jobs, add new ones. Returns `False` when closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._jobs or self._idle_tasks)
            if self._closing:
                return False
            tasks = [] if self._jobs else self._idle_tasks.copy()
            if tasks:
                self._idle_tasks.clear()
            new, cancelled = list(self._new_jobs), [each for each in self._jobs.values() if each.cancelled]
            self._new_jobs.clear()
        for task in tasks:
            try:
                task.call()
            except Exception:  # noqa: BLE001 - the call is the caller's code
                _LOG.exception("a task run while idle has failed")
            task.done.set()
        for running in cancelled:
            self._end(running, Finished("cancelled"))
        for running in new:
            if not running.cancelled:
                self._in_batch[running.job.name] = running
                self._batch.add(running.job.name, running.job.prompt)
        return True

    def _step(self) -> None:
        """One forward pass, if the batch has anything to compute: schedule, run, sample, deliver."""
        scheduled: list[ScheduledRequest] = []
        try:
            scheduled = self._batch.prepare()
            if not scheduled:
                return
            with self._changed:
                self._update_load()
            observer = self._model.finemoe.observer
            with nullcontext() if observer is None else observer.packed([self._packed(each) for each in scheduled]):
                logits = self._batch.run()
            sampling = [self._in_batch[each.name] for each in scheduled if each.samples]
            tokens = self._sample(sampling, logits)
            self._batch.advance([0 if isinstance(token, Exception) else token.id for token in tokens])
        except Exception as error:  # noqa: BLE001 - fails the jobs of this pass only
            self._fail(scheduled, error)
            return
        self._pass_succeeded = True
        for running, token in zip(sampling, tokens, strict=True):
            self._deliver(running, token)

    def _packed(self, scheduled: ScheduledRequest) -> PackedRequest:
        running = self._in_batch[scheduled.name]
        if scheduled.is_new:
            running.request = self._model.finemoe.observer.new_request()
        return PackedRequest(running.request, PREFILL if scheduled.is_prefill else DECODE, scheduled.tokens)

    @staticmethod
    def _sample(sampling: list[_JobState], logits: Tensor) -> list[Token | Exception]:
        """The next token of each job, from logits `[n, V]`. A sampling error fails only its job."""
        greedy = logits.argmax(-1).tolist()
        tokens: list[Token | Exception] = []
        for row, running in enumerate(sampling):
            try:
                is_greedy = running.cancelled or running.sampler.is_greedy
                tokens.append(Token(greedy[row]) if is_greedy else running.sampler.sample(logits[row]))
            except Exception as error:  # noqa: BLE001 - the grammar library's errors
                tokens.append(error)
        return tokens

    def _deliver(self, running: _JobState, token: Token | Exception) -> None:
        """Pass a token to the job's listener, and end the job if it was the last."""
        if running.cancelled:
            self._end(running, Finished("cancelled"))
        elif isinstance(token, Exception):
            self._end(running, Finished("error", _message(token)))
        else:
            running.tokens += 1
            self._notify(running, token)
            if token.id in running.job.stop:
                self._end(running, Finished("stop"))
            elif running.tokens >= running.limit:
                self._end(running, Finished("length"))

    def _fail(self, scheduled: list[ScheduledRequest], error: Exception) -> None:
        """End the jobs of a failed pass; all jobs of the batch if scheduling itself failed."""
        if not self._pass_succeeded and scheduled and self.batches and not isinstance(error, FinemoeError):
            # Some models only show in their first pass that they can't be batched. No job has a token yet: start over.
            self._batch.close()
            self._batch = self._sequential(error)
            for running in self._in_batch.values():
                self._batch.add(running.job.name, running.job.prompt)
            return
        if not isinstance(error, FinemoeError):
            _LOG.error("a forward pass has failed", exc_info=error)
        failed = [self._in_batch[each.name] for each in scheduled] or list(self._in_batch.values())
        if not scheduled:
            self._batch.clear()
        for running in failed:
            self._end(running, Finished("error", _message(error)))

    def _sequential(self, error: Exception) -> SequentialBatch:
        _LOG.warning("jobs run one at a time: %s", _message(error))
        return SequentialBatch(self._model, self._config.key_value_bytes)

    def _end(self, running: _JobState, finished: Finished) -> None:
        """Free what a job holds, and notify its listener."""
        name = running.job.name
        if self._in_batch.pop(name, None) is not None:
            self._batch.remove(name)
        with self._changed:
            if self._jobs.pop(name, None) is None:
                return
            self._update_load()
            self._changed.notify_all()
        self._notify(running, finished)

    def _notify(self, running: _JobState, event: Token | Finished) -> None:
        try:
            running.listener(running.job.name, event)
        except Exception:  # noqa: BLE001 - the listener is the caller's code
            _LOG.exception("the listener of job %s has failed", running.job.name)
            running.cancelled = True  # no one receives its tokens any more

    def _update_load(self) -> None:
        blocks, running = self._batch.blocks, self._batch.running
        self._load = WorkerLoad(running, 0, blocks - self._batch.used_blocks, blocks)


def _message(error: BaseException) -> str:
    """An error in one line, with its type unless it is our own."""
    text = " ".join(str(error).split())
    return text if isinstance(error, FinemoeError | ValueError) else f"{type(error).__name__}: {text}"
