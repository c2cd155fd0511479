"""The worker ends each job exactly once, whatever fails, and frees everything."""

from __future__ import annotations

import errno
import os
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.continuous_batching import ContinuousMixin

import finemoe
from finemoe.errors import ConfigError, UnsupportedModelError
from finemoe.serving.config import ServeConfig
from finemoe.serving.scheduler.job import Finished, Job, Token, Worker, WorkerLoad
from finemoe.serving.scheduler.paged_batch import PagedBatch
from finemoe.serving.scheduler.worker import BatchingWorker
from finemoe.store import DiskStore
from finemoe.types import ByteRange
from tests.serving.conftest import a_prompt, greedy, serving
from tests.serving.recording_listener import RecordingListener
from tests.tiny import Make

LONG = 400  # tokens: more than any test waits for


def test_it_implements_worker(offloaded: Any) -> None:
    with serving(offloaded) as worker:
        protocol: Worker = worker
        assert protocol.load() == WorkerLoad(0, 0, worker.load().cache_blocks, worker.load().cache_blocks)


def test_a_stop_token_ends_the_answer_and_is_reported(offloaded: Any, eager_model: Any) -> None:
    prompt, listener = a_prompt(9), RecordingListener()
    expected = greedy(eager_model, prompt, 12)
    last = expected[7]
    with serving(offloaded) as worker:
        worker.submit(Job("job", prompt, 12, stop=frozenset({last, -5})), listener)
        assert listener.wait("job") == [Finished("stop")]
    assert listener.ids("job") == expected[: expected.index(last) + 1]


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job("job", [], 5), "the prompt is empty"),
        (Job("job", [5, -1], 5), "outside the model's vocabulary; ids go from 0 to"),
        (Job("job", [5, 1_000_000], 5), "outside the model's vocabulary; ids go from 0 to"),
        (Job("job", [5], 0), "max_tokens is 0"),
        (Job("job", [5] * 1_000_000, 5), r"the prompt has 1000000 tokens, and the key-value cache holds \d+; shorten"),
        (Job("runs", [5], 5), "a job named 'runs' already exists"),
    ],
)
def test_invalid_jobs_are_refused_at_once(offloaded: Any, job: Job, message: str) -> None:
    with serving(offloaded) as worker:
        worker.submit(Job("runs", a_prompt(5), LONG), RecordingListener())
        with pytest.raises(ValueError, match=message) as caught:
            worker.submit(job, RecordingListener())
        assert "\n" not in str(caught.value)


def test_a_cache_without_a_block_is_refused(offloaded: Any) -> None:
    with pytest.raises(ConfigError, match=r"^--cache-bytes: 1.0 KiB holds too few tokens; this model takes .* each"):
        BatchingWorker(offloaded, ServeConfig(cache_bytes="1KiB"))


def test_a_cancelled_job_ends_within_one_step_and_frees_its_blocks(offloaded: Any) -> None:
    steps: list[int] = []
    listener = RecordingListener(lambda name, event: steps.append(len(steps)) if name == "stays" else None)
    with serving(offloaded) as worker:
        for name in ("stays", "leaves"):
            worker.submit(Job(name, a_prompt(40), LONG), listener)
        listener.wait_for_tokens("leaves", 3)
        held = worker.load().free_cache_blocks
        before = len(steps)
        worker.cancel("leaves")
        worker.cancel("unknown")
        assert listener.wait("leaves") == [Finished("cancelled")]
        assert len(steps) <= before + 2  # the running pass, and one that may have started in between
        assert worker.load().running == 1
        assert worker.load().free_cache_blocks > held
        worker.cancel("stays")
        listener.wait("stays")
        load = worker.load()
        assert load == WorkerLoad(0, 0, load.cache_blocks, load.cache_blocks)


def test_a_job_can_be_cancelled_while_it_waits(offloaded: Any) -> None:
    listener = RecordingListener()
    with serving(offloaded, max_running=1) as worker:
        worker.submit(Job("first", a_prompt(4), LONG), listener)
        worker.submit(Job("second", a_prompt(4), LONG), listener)
        listener.wait_for_tokens("first", 2)
        assert (worker.load().running, worker.load().waiting) == (1, 1)
        worker.cancel("second")
        assert listener.wait("second") == [Finished("cancelled")]
        assert not listener.tokens["second"]
        worker.cancel("first")
        listener.wait("first")


def test_a_read_error_fails_the_jobs_of_its_step_alone(
    offloaded: Any, eager_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(store: DiskStore, run: ByteRange, _start_bytes: int, _into: memoryview) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), store.name(run.file))

    def heal(_name: str, event: Token | Finished) -> None:
        if isinstance(event, Finished):
            patch.undo()

    def breaks(_name: str, event: Token | Finished) -> None:
        if isinstance(event, Token) and not broken.is_set():
            broken.set()
            offloaded.finemoe.evict_all()
            patch.setattr(DiskStore, "read", fails)

    broken, listener, healing = threading.Event(), RecordingListener(breaks), RecordingListener(heal)
    with monkeypatch.context() as patch, serving(offloaded, max_running=2) as worker:
        worker.submit(Job("one", a_prompt(4), LONG), listener)
        worker.submit(Job("two", a_prompt(4), LONG), healing)
        worker.submit(Job("waits", a_prompt(6), 5), listener)
        for end in [*listener.wait("one"), *healing.wait("two")]:
            assert end.reason == "error"
            assert end.message.endswith("Input/output error")
            assert "can't read expert" in end.message
        assert listener.wait("waits") == [Finished("length")]
        offloaded.finemoe.check_integrity()
    assert listener.ids("waits") == greedy(eager_model, a_prompt(6), 5)


class FailingConstraint:
    """Fails at its third token."""

    def __init__(self) -> None:
        self.tokens = 0

    def mask(self, logits: Tensor) -> Tensor:
        return logits

    def accept(self, token: int) -> None:
        self.tokens += 1
        if self.tokens == 3:
            raise KeyError(token)


def test_a_failing_constraint_fails_only_its_job(offloaded: Any, eager_model: Any) -> None:
    listener, prompt = RecordingListener(), a_prompt(8)
    with serving(offloaded) as worker:
        worker.submit(Job("breaks", prompt, 9, constraint=FailingConstraint()), listener)
        worker.submit(Job("other", prompt, 9), listener)
        [broken, other] = listener.wait("breaks", "other")
    assert (broken.reason, broken.message.partition(":")[0]) == ("error", "KeyError")
    assert len(listener.ids("breaks")) == 2
    assert other == Finished("length")
    assert listener.ids("other") == greedy(eager_model, prompt, 9)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failing_listener_still_gets_finished_and_affects_no_other_job(offloaded: Any) -> None:
    def fails(name: str, event: Token | Finished) -> None:
        events.append(event)
        raise RuntimeError(name)

    events: list[Token | Finished] = []
    listener = RecordingListener()
    with serving(offloaded) as worker:
        worker.submit(Job("failing", a_prompt(5), LONG), fails)
        worker.submit(Job("other", a_prompt(5), 12), listener)
        assert listener.wait("other") == [Finished("length")]
        worker.submit(Job("after", a_prompt(5), 2), listener)
        assert listener.wait("after") == [Finished("length")]
        assert worker.load().running == 0
    assert [type(event) for event in events] == [Token, Finished]


def test_a_failure_of_the_thread_ends_every_job_with_its_error(offloaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("no more")

    listener = RecordingListener()
    with serving(offloaded, max_running=1) as worker:
        worker.submit(Job("runs", a_prompt(5), LONG), listener)
        worker.submit(Job("waits", a_prompt(5), LONG), listener)
        listener.wait_for_tokens("runs", 1)
        assert worker.failure() is None
        monkeypatch.setattr(worker, "_deliver", fails)
        failed = Finished("error", "the model's thread has failed (MemoryError: no more)")
        assert listener.wait("runs", "waits") == [failed, failed]
        assert worker.failure() == failed.message
        with pytest.raises(RuntimeError, match="has failed"):
            worker.submit(Job("late", a_prompt(5), 20), listener)


def test_draining_finishes_running_jobs_and_refuses_new_ones(offloaded: Any) -> None:
    listener = RecordingListener()
    with serving(offloaded) as worker:
        worker.submit(Job("runs", a_prompt(5), 20), listener)
        assert worker.drain(60)
        assert listener.wait("runs") == [Finished("length")]
        with pytest.raises(RuntimeError, match="shutting down"):
            worker.submit(Job("late", a_prompt(5), 20), listener)


def test_jobs_unfinished_after_the_drain_timeout_are_cancelled(offloaded: Any) -> None:
    listener = RecordingListener()
    with serving(offloaded) as worker:
        worker.submit(Job("runs", a_prompt(5), LONG), listener)
        listener.wait_for_tokens("runs", 1)
        assert not worker.drain(0.01)
        assert listener.wait("runs") == [Finished("cancelled")]


def test_closing_ends_every_job_once_and_restores_the_model(offloaded: Any, eager_model: Any) -> None:
    listener, names = RecordingListener(), [str(number) for number in range(9)]
    attention = offloaded.config._attn_implementation
    worker = BatchingWorker(offloaded, ServeConfig(cache_bytes="1MiB", max_batch_tokens=16, max_running=2))
    for name in names:
        worker.submit(Job(name, a_prompt(5), LONG), listener)
    worker.close()
    assert listener.wait(*names) == [Finished("cancelled")] * 9
    with pytest.raises(RuntimeError, match="shutting down"):
        worker.submit(Job("late", a_prompt(5), 20), listener)
    worker.cancel("late")
    worker.close()  # again
    assert worker.load().running == worker.load().waiting == 0
    assert offloaded.config._attn_implementation == attention
    assert greedy(offloaded, a_prompt(5), 6) == greedy(eager_model, a_prompt(5), 6)


def test_a_listener_may_close_the_worker(offloaded: Any) -> None:
    listener = RecordingListener(lambda _name, _event: worker.close())
    worker = BatchingWorker(offloaded, ServeConfig(cache_bytes="1MiB", max_batch_tokens=16, max_running=2))
    worker.submit(Job("job", a_prompt(5), LONG), listener)
    assert listener.wait("job") == [Finished("cancelled")]
    worker.close()


def test_an_unsupported_version_of_transformers_is_named_in_one_line(
    offloaded: Any, eager_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise AttributeError("no batching here")

    monkeypatch.setattr(ContinuousMixin, "init_continuous_batching", gone)
    with pytest.raises(UnsupportedModelError, match=r"^continuous batching of transformers .* install a version from"):
        PagedBatch(offloaded, 1 << 20, 16, 4)
    listener = RecordingListener()
    with serving(offloaded) as worker:  # falls back to one job at a time
        assert not worker.batches
        worker.submit(Job("job", a_prompt(5), 6), listener)
        listener.wait("job")
    assert listener.ids("job") == greedy(eager_model, a_prompt(5), 6)


def test_a_model_whose_first_batched_pass_fails_runs_one_job_at_a_time(
    offloaded: Any, eager_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_batch: PagedBatch) -> Tensor:
        raise RuntimeError("index_copy_(): Source/destination tensor must have same slice shapes.")

    monkeypatch.setattr(PagedBatch, "run", fails)
    listener = RecordingListener()
    with serving(offloaded) as worker:
        for name in ("one", "two"):
            worker.submit(Job(name, a_prompt(5), 6), listener)
        assert listener.wait("one", "two") == [Finished("length")] * 2
        assert not worker.batches
    assert listener.ids("one") == listener.ids("two") == greedy(eager_model, a_prompt(5), 6)


def test_sequential_jobs_can_be_cancelled_and_can_fail(tiny: Make) -> None:
    listener = RecordingListener()
    with finemoe.load(tiny("deepseek_v3"), expert_memory="60%") as model, serving(model) as worker:
        for name in ("runs", "waits", "fails", "last"):
            broken = FailingConstraint() if name == "fails" else None
            worker.submit(Job(name, a_prompt(5), 6 if name == "last" else LONG, constraint=broken), listener)
        listener.wait_for_tokens("runs", 2)
        for name in ("waits", "runs"):
            worker.cancel(name)
        ends = listener.wait("runs", "waits", "fails", "last")
        assert [end.reason for end in ends] == ["cancelled", "cancelled", "error", "length"]
        assert worker.load() == WorkerLoad(0, 0, worker.load().cache_blocks, worker.load().cache_blocks)


def test_300_jobs_with_random_cancels_free_everything(offloaded: Any) -> None:
    draw = torch.Generator().manual_seed(1)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=draw))

    doomed = {f"job-{number}": below(8) for number in range(300) if below(3) == 0}

    def cancel(name: str, event: Token | Finished) -> None:
        if isinstance(event, Token) and len(listener.tokens[name]) == doomed.get(name):
            worker.cancel(name)

    listener, threads = RecordingListener(cancel), threading.active_count()
    with serving(offloaded, max_running=8) as worker:
        for number in range(300):
            job = Job(f"job-{number}", a_prompt(1 + below(40), number), 1 + below(8), temperature=float(below(2)))
            worker.submit(job, listener)
            if below(10) == 0:
                worker.cancel(f"job-{below(number + 1)}")
        ends = listener.wait(*(f"job-{number}" for number in range(300)), timeout_s=200)
        assert {end.reason for end in ends} == {"length", "cancelled"}
        load = worker.load()
        assert load == WorkerLoad(0, 0, load.cache_blocks, load.cache_blocks)
        batch = worker._batch
        assert isinstance(batch, PagedBatch)
        assert not batch._states and not worker._in_batch and not worker._jobs
        assert not any(allocator.block_table for allocator in batch._allocators)
    assert threading.active_count() == threads
    assert not offloaded.finemoe._engine.pool._pins


def test_run_when_idle_waits_until_there_is_no_job(offloaded: Any) -> None:
    done: list[str] = []
    with serving(offloaded) as worker:
        assert worker.run_when_idle(lambda: done.append(threading.current_thread().name), 10.0)
        assert done == ["finemoe-model"]
        listener = RecordingListener()
        worker.submit(Job("job", a_prompt(5), LONG), listener)
        assert not worker.run_when_idle(lambda: done.append("too late"), 0.05)
        worker.cancel("job")
        assert listener.wait("job") == [Finished("cancelled")]
        assert worker.run_when_idle(lambda: 1 // 0, 10.0), "an exception of the call does not affect the worker"
        assert worker.failure() is None
    assert not worker.run_when_idle(lambda: done.append("closed"), 10.0)
    assert len(done) == 1
