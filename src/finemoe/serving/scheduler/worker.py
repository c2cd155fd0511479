"""The model's thread: jobs join and leave a running batch, a forward pass at a time."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from finemoe.errors import FinemoeError, UnsupportedModelError
from finemoe.model.observer import PackedRequest
from finemoe.serving.config import ServeConfig
from finemoe.serving.schedule import OVERTAKEN, Expected, Waiting, choose, overtaken
from finemoe.serving.scheduler.job import Finished, Job, Listener, Load, Token
from finemoe.serving.scheduler.paged_batch import PagedBatch, Part
from finemoe.serving.scheduler.sampler import Sampler
from finemoe.serving.scheduler.sequential import SingleBatch
from finemoe.system import end_openmp_threads
from finemoe.types import DECODE, PREFILL

PATIENCE = 0.1  # of a request's timeout: who has waited for so long is next
_LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class _RunningJob:
    """A job between its submission and its end."""

    job: Job
    listener: Listener
    limit: int  # tokens that it may have: `max_tokens`, or what the cache holds
    sampler: Sampler
    tokens: int = 0  # of its answer, so far
    request: int = -1  # what the policy knows it by
    cancelled: bool = False
    came_s: float = field(default_factory=time.monotonic)
    expected: Expected | None = None  # what it will use; the policy's thread may still fill it in
    overtaken: int = 0


class _Chore(NamedTuple):
    """What is to be done while no job is at hand."""

    call: Callable[[], object]
    done: threading.Event


class BatchingWorker:
    """Runs jobs on a thread of its own, as many of them together as fit; a `Worker`.

    Nobody else may run the model until it is closed; closing the model is its owner's business. A job that fills the
    key-value cache ends as one of `max_tokens` does. The model's own penalties and suppressed tokens are not applied.

    Args:
        model: from `finemoe.load`.
        config: how answers run together.

    Attributes:
        batches: whether jobs share forward passes. Models that transformers can't batch run one job at a time.
        capacity_tokens: the longest prompt with its answer that the key-value cache holds.

    Raises:
        ConfigError: the key-value cache is too small for anything.
    """

    def __init__(self, model: Any, config: ServeConfig | None = None) -> None:
        self._model = model
        self._config = config or ServeConfig()
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        self._taken: dict[str, _RunningJob] = {}  # jobs that the batch knows; the thread's alone
        self._waiting: list[_RunningJob] = []  # for a place in the batch, in the order in which they came; the same
        self._proven = False  # a forward pass has gone through
        self._batch: PagedBatch | SingleBatch
        try:
            self._batch = PagedBatch(
                model, self._config.key_value_bytes, self._config.max_batch_tokens, self._config.max_running
            )
        except UnsupportedModelError as error:
            self._batch = self._single(error)
        end_openmp_threads()  # that filled the cache here: the model's thread needs the cores
        self._changed = threading.Condition()  # guards what follows
        self._jobs: dict[str, _RunningJob] = {}  # submitted and not ended
        self._arrived: deque[_RunningJob] = deque()  # of these, not taken yet
        self._load = Load(0, 0, self._batch.blocks, self._batch.blocks)
        self._draining = False
        self._closing = False
        self._failure: str | None = None
        self._chores: list[_Chore] = []
        self._thread = threading.Thread(target=self._run, name="finemoe-model", daemon=True)
        self._thread.start()

    @property
    def batches(self) -> bool:
        return isinstance(self._batch, PagedBatch)

    @property
    def capacity_tokens(self) -> int:
        return self._batch.capacity_tokens

    def run_when_idle(self, call: Callable[[], object], timeout_s: float) -> bool:
        """Have the model's thread do something while it has no job; returns when it is done.

        Args:
            call: must be quick, as jobs wait for it. What it raises goes into the log.
            timeout_s: to wait for such a moment.

        Returns:
            Whether it was done: not if there was no such moment in time, or the worker was closed.
        """
        chore = _Chore(call, threading.Event())
        with self._changed:
            self._chores.append(chore)
            self._changed.notify_all()
        deadline_s = time.monotonic() + timeout_s
        while self._thread.is_alive() and (left_s := deadline_s - time.monotonic()) > 0:
            if chore.done.wait(min(left_s, 1.0)):
                return True
        with self._changed:
            if chore in self._chores:
                self._chores.remove(chore)
                return False
        return chore.done.wait(timeout_s)  # it has just been begun

    def submit(self, job: Job, listener: Listener) -> None:
        """Take a job. `Finished` is the last thing its listener hears, and is heard exactly once.

        Raises:
            ValueError: the job can't be run: its prompt is empty, no token ids, or longer than the cache; the message
                says so.
            RuntimeError: the worker is draining or closed, or has failed.
        """
        prompt, capacity = job.prompt, self.capacity_tokens
        if not prompt:
            raise ValueError("the prompt is empty; there is nothing to continue")
        if len(prompt) > capacity:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, and the key-value cache holds {capacity}; shorten it, or give "
                "the server more --cache-bytes"
            )
        if min(prompt) < 0 or max(prompt) >= self._vocabulary:
            raise ValueError(
                f"the prompt has tokens that the model does not know; ids go from 0 to {self._vocabulary - 1}"
            )
        if job.max_tokens < 1:
            raise ValueError(f"max_tokens is {job.max_tokens}, and an answer has at least 1")
        running = _RunningJob(job, listener, min(job.max_tokens, capacity - len(prompt) + 1), Sampler(job))
        with self._changed:
            if self._failure is not None:
                raise RuntimeError(self._failure)
            if self._draining or self._closing:
                raise RuntimeError("the server is shutting down; it takes no more jobs")
            if job.name in self._jobs:
                raise ValueError(f"there is a job called {job.name!r} already")
            self._jobs[job.name] = running
            self._arrived.append(running)
            self._changed.notify_all()

    def cancel(self, name: str) -> None:
        """End a job within one step, its slots and cache freed; unknown names (it has just finished) are ignored."""
        with self._changed:
            if name in self._jobs:
                self._jobs[name].cancelled = True
                self._changed.notify_all()

    def load(self) -> Load:
        with self._changed:
            last = self._load
            return Load(last.running, len(self._jobs) - last.running, last.free_cache_blocks, last.cache_blocks)

    def failure(self) -> str | None:
        """Why no job can run any more, in one line, if the thread has ended by itself; else `None`."""
        with self._changed:
            return self._failure

    def drain(self, timeout_s: float) -> bool:
        """Take no more jobs and wait for those at hand. Returns whether all finished; the others are cancelled."""
        with self._changed:
            self._draining = True
            finished = self._changed.wait_for(lambda: not self._jobs, timeout_s)
            for running in self._jobs.values():
                running.cancelled = True
            self._changed.notify_all()
        return finished

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        last = Finished("cancelled")
        failure = None
        try:
            while self._take():
                self._step()
        except BaseException as error:  # noqa: BLE001 - whatever it is, jobs must hear of it
            _LOG.exception("the model's thread has failed")
            failure = f"the model's thread has failed ({_message(error)})"
            last = Finished("error", failure)
            self._taken.clear()
            self._waiting.clear()
            with suppress(Exception):  # it may be what has failed
                self._batch.clear()
        finally:
            with self._changed:
                self._closing = True
                self._failure = failure
            for running in list(self._jobs.values()):
                self._end(running, last)
            self._batch.close()

    def _take(self) -> bool:
        """Wait for something to do, and let jobs join and leave. Returns whether to go on."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._jobs or self._chores)
            if self._closing:
                return False
            chores = [] if self._jobs else self._chores.copy()
            if chores:
                self._chores.clear()
            arrived, cancelled = list(self._arrived), [each for each in self._jobs.values() if each.cancelled]
            self._arrived.clear()
        for chore in chores:
            try:
                chore.call()
            except Exception:  # noqa: BLE001 - someone else's code
                _LOG.exception("what was to be done at rest has failed")
            chore.done.set()
        for running in cancelled:
            self._end(running, Finished("cancelled"))
        self._waiting += [running for running in arrived if not running.cancelled]
        if self._config.schedule == "overlap":
            for running in arrived:
                self._model.finemoe.predict_request(running.job.prompt, partial(setattr, running, "expected"))
        self._admit()
        return True

    def _admit(self) -> None:
        """Hand on those who wait: all, for the batch takes them in turn; or as many as run, by their experts."""
        if not self._waiting:
            return
        chosen: Sequence[int] = range(len(self._waiting))
        if self._config.schedule == "overlap":
            places = (self._config.max_running if self.batches else 1) - len(self._taken)
            chosen = self._chosen_by_experts(max(0, places))
        for index in chosen:
            running = self._waiting[index]
            self._taken[running.job.name] = running
            self._batch.add(running.job.name, running.job.prompt)
        self._waiting = [each for index, each in enumerate(self._waiting) if index not in chosen]

    def _chosen_by_experts(self, places: int) -> list[int]:
        """Of those who wait; whoever has waited for long is overtaken no more."""
        lately_s = time.monotonic() - PATIENCE * self._config.request_timeout_s
        waiting = [
            Waiting(each.expected, OVERTAKEN - each.overtaken if each.came_s > lately_s else 0)
            for each in self._waiting
        ]
        chosen = choose(waiting, [each.expected for each in self._taken.values()], places)
        for index, each in enumerate(self._waiting):
            if index not in chosen:
                each.overtaken += overtaken(index, chosen)
        return chosen

    def _step(self) -> None:
        """One forward pass, if there is anything to compute."""
        parts: list[Part] = []
        try:
            parts = self._batch.prepare()
            if not parts:
                return
            with self._changed:
                self._count()
            observer = self._model.finemoe.observer
            with nullcontext() if observer is None else observer.packed([self._piece(part) for part in parts]):
                logits = self._batch.run()
            answering = [self._taken[part.name] for part in parts if part.answers]
            chosen = self._choose(answering, logits)
            self._batch.advance([0 if isinstance(token, Exception) else token.id for token in chosen])
        except Exception as error:  # noqa: BLE001 - belongs to the jobs of this pass
            self._fail(parts, error)
            return
        self._proven = True
        for running, token in zip(answering, chosen, strict=True):
            self._deliver(running, token)

    def _piece(self, part: Part) -> PackedRequest:
        running = self._taken[part.name]
        if part.fresh:
            running.request = self._model.finemoe.observer.new_request()
        return PackedRequest(running.request, PREFILL if part.prompt else DECODE, part.tokens)

    @staticmethod
    def _choose(answering: list[_RunningJob], logits: Tensor) -> list[Token | Exception]:
        """Each job's next token, or why there is none; a job's trouble is its own."""
        likeliest = logits.argmax(-1).tolist()
        chosen: list[Token | Exception] = []
        for row, running in enumerate(answering):
            try:
                plain = running.cancelled or running.sampler.plain
                chosen.append(Token(likeliest[row]) if plain else running.sampler.choose(logits[row]))
            except Exception as error:  # noqa: BLE001 - a grammar is someone else's code
                chosen.append(error)
        return chosen

    def _deliver(self, running: _RunningJob, token: Token | Exception) -> None:
        """Tell a job of its next token, and end it if that was its last."""
        if running.cancelled:
            self._end(running, Finished("cancelled"))
        elif isinstance(token, Exception):
            self._end(running, Finished("error", _message(token)))
        else:
            running.tokens += 1
            self._tell(running, token)
            if token.id in running.job.stop:
                self._end(running, Finished("stop"))
            elif running.tokens >= running.limit:
                self._end(running, Finished("length"))

    def _fail(self, parts: list[Part], error: Exception) -> None:
        """A pass has failed: so have its jobs; or, if it could not even be prepared, all jobs that were taken."""
        if not self._proven and parts and self.batches and not isinstance(error, FinemoeError):
            # some models show only now that they can't be batched; no answer has begun
            self._batch.close()
            self._batch = self._single(error)
            for running in self._taken.values():
                self._batch.add(running.job.name, running.job.prompt)
            return
        if not isinstance(error, FinemoeError):
            _LOG.error("a forward pass has failed", exc_info=error)
        failed = [self._taken[part.name] for part in parts] or list(self._taken.values())
        if not parts:
            self._batch.clear()
        for running in failed:
            self._end(running, Finished("error", _message(error)))

    def _single(self, error: Exception) -> SingleBatch:
        _LOG.warning("jobs run one at a time: %s", _message(error))
        return SingleBatch(self._model, self._config.key_value_bytes)

    def _end(self, running: _RunningJob, finished: Finished) -> None:
        """Let go of what a job holds, and tell it."""
        name = running.job.name
        if self._taken.pop(name, None) is not None:
            self._batch.remove(name)
        elif running in self._waiting:
            self._waiting.remove(running)
        with self._changed:
            if self._jobs.pop(name, None) is None:
                return
            self._count()
            self._changed.notify_all()
        self._tell(running, finished)

    def _tell(self, running: _RunningJob, news: Token | Finished) -> None:
        try:
            running.listener(running.job.name, news)
        except Exception:  # noqa: BLE001 - a listener is someone else's code
            _LOG.exception("the listener of job %s has failed", running.job.name)
            running.cancelled = True  # nobody listens

    def _count(self) -> None:
        blocks, running = self._batch.blocks, self._batch.running
        self._load = Load(running, 0, blocks - self._batch.used_blocks, blocks)


def _message(error: BaseException) -> str:
    """One line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, FinemoeError | ValueError) else f"{type(error).__name__}: {text}"
