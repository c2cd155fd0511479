"""What a worker promises: each job ends exactly once, whatever goes wrong, and nothing is left over."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation.continuous_batching import ContinuousMixin

import finemoe
from finemoe.errors import ConfigError, UnsupportedModelError
from finemoe.serving.config import ServeConfig
from finemoe.serving.schedule import OVERTAKEN
from finemoe.serving.scheduler.job import Finished, Job, Load, Token, Worker
from finemoe.serving.scheduler.paged_batch import PagedBatch
from finemoe.serving.scheduler.worker import BatchingWorker
from finemoe.store import DiskStore
from finemoe.types import ByteRange
from tests.serving.conftest import a_prompt, greedy, serving
from tests.serving.listening import Ear
from tests.serving.test_server import until
from tests.tiny import Make

LONG = 400  # tokens: more than a test waits for


def test_it_is_what_the_border_asks_for(offloaded: Any) -> None:
    with serving(offloaded) as worker:
        contract: Worker = worker
        assert contract.load() == Load(0, 0, worker.load().cache_blocks, worker.load().cache_blocks)


def test_a_stop_token_ends_the_answer_and_is_reported(offloaded: Any, whole: Any) -> None:
    prompt, ear = a_prompt(9), Ear()
    expected = greedy(whole, prompt, 12)
    last = expected[7]
    with serving(offloaded) as worker:
        worker.submit(Job("job", prompt, 12, stop=frozenset({last, -5})), ear)
        assert ear.wait("job") == [Finished("stop")]
    assert ear.ids("job") == expected[: expected.index(last) + 1]


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job("job", [], 5), "the prompt is empty"),
        (Job("job", [5, -1], 5), "does not know; ids go from 0 to"),
        (Job("job", [5, 1_000_000], 5), "does not know; ids go from 0 to"),
        (Job("job", [5], 0), "max_tokens is 0"),
        (Job("job", [5] * 1_000_000, 5), r"the prompt has 1000000 tokens, and the key-value cache holds \d+; shorten"),
        (Job("runs", [5], 5), "there is a job called 'runs' already"),
    ],
)
def test_what_can_not_be_run_is_refused_at_once(offloaded: Any, job: Job, message: str) -> None:
    with serving(offloaded) as worker:
        worker.submit(Job("runs", a_prompt(5), LONG), Ear())
        with pytest.raises(ValueError, match=message) as caught:
            worker.submit(job, Ear())
        assert "\n" not in str(caught.value)


def test_a_cache_that_holds_nothing_is_refused(offloaded: Any) -> None:
    with pytest.raises(ConfigError, match=r"^--cache-bytes: 1.0 KiB holds too few tokens; this model takes .* each"):
        BatchingWorker(offloaded, ServeConfig(cache_bytes="1KiB"))


def test_a_cancelled_job_ends_within_one_step_and_frees_its_blocks(offloaded: Any) -> None:
    steps: list[int] = []
    ear = Ear(lambda name, news: steps.append(len(steps)) if name == "stays" else None)
    with serving(offloaded) as worker:
        for name in ("stays", "goes"):
            worker.submit(Job(name, a_prompt(40), LONG), ear)
        ear.wait_for_tokens("goes", 3)
        held = worker.load().free_cache_blocks
        before = len(steps)
        worker.cancel("goes")
        worker.cancel("nobody")
        assert ear.wait("goes") == [Finished("cancelled")]
        assert len(steps) <= before + 2  # the step under way, and one that may have begun in between
        assert worker.load().running == 1
        assert worker.load().free_cache_blocks > held
        worker.cancel("stays")
        ear.wait("stays")
        load = worker.load()
        assert load == Load(0, 0, load.cache_blocks, load.cache_blocks)


def test_a_job_can_be_cancelled_while_it_waits(offloaded: Any) -> None:
    ear = Ear()
    with serving(offloaded, max_running=1) as worker:
        worker.submit(Job("first", a_prompt(4), LONG), ear)
        worker.submit(Job("second", a_prompt(4), LONG), ear)
        ear.wait_for_tokens("first", 2)
        assert (worker.load().running, worker.load().waiting) == (1, 1)
        worker.cancel("second")
        assert ear.wait("second") == [Finished("cancelled")]
        assert not ear.tokens["second"]
        worker.cancel("first")
        ear.wait("first")


def test_a_read_error_fails_the_jobs_of_its_step_alone(
    offloaded: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(store: DiskStore, run: ByteRange, _start_bytes: int, _into: memoryview) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), store.name(run.file))

    def heal(_name: str, news: Token | Finished) -> None:
        if isinstance(news, Finished):
            patch.undo()

    def breaks(_name: str, news: Token | Finished) -> None:
        if isinstance(news, Token) and not broken.is_set():
            broken.set()
            offloaded.finemoe.evict_all()
            patch.setattr(DiskStore, "read", fails)

    broken, ear, heals = threading.Event(), Ear(breaks), Ear(heal)
    with monkeypatch.context() as patch, serving(offloaded, max_running=2) as worker:
        worker.submit(Job("one", a_prompt(4), LONG), ear)
        worker.submit(Job("two", a_prompt(4), LONG), heals)
        worker.submit(Job("waits", a_prompt(6), 5), ear)
        for end in [*ear.wait("one"), *heals.wait("two")]:
            assert end.reason == "error"
            assert end.message.endswith("Input/output error")
            assert "can't read expert" in end.message
        assert ear.wait("waits") == [Finished("length")]
        offloaded.finemoe.check_integrity()
    assert ear.ids("waits") == greedy(whole, a_prompt(6), 5)


class Breaks:
    """A constraint that fails at its third token."""

    def __init__(self) -> None:
        self.tokens = 0

    def mask(self, logits: Tensor) -> Tensor:
        return logits

    def accept(self, token: int) -> None:
        self.tokens += 1
        if self.tokens == 3:
            raise KeyError(token)


def test_a_constraint_that_fails_is_the_trouble_of_its_job_alone(offloaded: Any, whole: Any) -> None:
    ear, prompt = Ear(), a_prompt(8)
    with serving(offloaded) as worker:
        worker.submit(Job("breaks", prompt, 9, constraint=Breaks()), ear)
        worker.submit(Job("other", prompt, 9), ear)
        [broken, other] = ear.wait("breaks", "other")
    assert (broken.reason, broken.message.partition(":")[0]) == ("error", "KeyError")
    assert len(ear.ids("breaks")) == 2
    assert other == Finished("length")
    assert ear.ids("other") == greedy(whole, prompt, 9)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_listener_that_fails_is_heard_out_and_harms_nobody_else(offloaded: Any) -> None:
    def fails(name: str, news: Token | Finished) -> None:
        heard.append(news)
        raise RuntimeError(name)

    heard: list[Token | Finished] = []
    ear = Ear()
    with serving(offloaded) as worker:
        worker.submit(Job("deaf", a_prompt(5), LONG), fails)
        worker.submit(Job("other", a_prompt(5), 12), ear)
        assert ear.wait("other") == [Finished("length")]
        worker.submit(Job("after", a_prompt(5), 2), ear)
        assert ear.wait("after") == [Finished("length")]
        assert worker.load().running == 0
    assert [type(news) for news in heard] == [Token, Finished]


def test_a_thread_that_fails_says_so_to_every_job(offloaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise MemoryError("no more")

    ear = Ear()
    with serving(offloaded, max_running=1) as worker:
        worker.submit(Job("runs", a_prompt(5), LONG), ear)
        worker.submit(Job("waits", a_prompt(5), LONG), ear)
        ear.wait_for_tokens("runs", 1)
        assert worker.failure() is None
        monkeypatch.setattr(worker, "_deliver", fails)
        failed = Finished("error", "the model's thread has failed (MemoryError: no more)")
        assert ear.wait("runs", "waits") == [failed, failed]
        assert worker.failure() == failed.message
        with pytest.raises(RuntimeError, match="has failed"):
            worker.submit(Job("late", a_prompt(5), 20), ear)


def test_who_needs_the_experts_of_those_that_run_goes_first(offloaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 3, 4, .. tokens; the even ones are told to use one half of the experts, the odd ones the other."""

    def predict_request(prompt: list[int], reply: Callable[[Any], object]) -> None:
        expected = np.zeros((1, 2))
        expected[0, len(prompt) % 2] = 1.0
        reply(expected)

    monkeypatch.setattr(offloaded.finemoe, "predict_request", predict_request)
    began: list[str] = []
    ear = Ear(lambda name, _: began.append(name) if name not in began else None)
    with serving(offloaded, max_running=2, schedule="overlap") as worker:
        worker.submit(Job("4 long", a_prompt(4), LONG), ear)
        ear.wait_for_tokens("4 long", 1)
        with worker._changed:  # they come together
            for length in (3, 5, 6, 8, 7, 10):
                worker.submit(Job(f"{length}", a_prompt(length), 3), ear)
            worker._jobs["3"].overtaken = OVERTAKEN - 2
            assert worker.load().waiting == 6
        worker.cancel("7")
        ear.wait("3", "5", "6", "7", "8", "10")
        worker.cancel("4 long")
        ear.wait("4 long")
    assert [name for name in began if name != "7"] == ["4 long", "6", "8", "3", "10", "5"]


def test_a_waiting_answer_is_foreseen_by_the_policy_and_can_be_cancelled(tiny: Make) -> None:
    ear = Ear()
    with (
        finemoe.load(tiny(), expert_memory="40%", policy="finemoe", map_store="none") as model,
        serving(model, max_running=1, schedule="overlap") as worker,
    ):
        worker.submit(Job("teaches", a_prompt(5), 3), ear)
        assert ear.wait("teaches") == [Finished("length")]
        worker.submit(Job("ends", a_prompt(4), 2), ear)  # the policy hears that the one before is over
        ear.wait("ends")
        worker.submit(Job("runs", a_prompt(5), LONG), ear)
        ear.wait_for_tokens("runs", 1)
        worker.submit(Job("waits", a_prompt(5), 20), ear)
        running = worker._jobs["waits"]
        until(lambda: running.expected is not None)
        assert running.expected is not None
        assert len(running.expected) == model.finemoe.stats().layers
        worker.cancel("waits")
        assert ear.wait("waits") == [Finished("cancelled")]
        worker.cancel("runs")
        ear.wait("runs")
        worker.submit(Job("after", a_prompt(5), 2), ear)
        assert ear.wait("after") == [Finished("length")]


def test_draining_finishes_what_runs_and_takes_no_more(offloaded: Any) -> None:
    ear = Ear()
    with serving(offloaded) as worker:
        worker.submit(Job("runs", a_prompt(5), 20), ear)
        assert worker.drain(60)
        assert ear.wait("runs") == [Finished("length")]
        with pytest.raises(RuntimeError, match="shutting down"):
            worker.submit(Job("late", a_prompt(5), 20), ear)


def test_what_takes_too_long_to_drain_is_cancelled(offloaded: Any) -> None:
    ear = Ear()
    with serving(offloaded) as worker:
        worker.submit(Job("runs", a_prompt(5), LONG), ear)
        ear.wait_for_tokens("runs", 1)
        assert not worker.drain(0.01)
        assert ear.wait("runs") == [Finished("cancelled")]


def test_closing_ends_every_job_once_and_leaves_the_model_as_it_was(offloaded: Any, whole: Any) -> None:
    ear, names = Ear(), [str(number) for number in range(9)]
    attention = offloaded.config._attn_implementation
    worker = BatchingWorker(offloaded, ServeConfig(cache_bytes="1MiB", max_batch_tokens=16, max_running=2))
    for name in names:
        worker.submit(Job(name, a_prompt(5), LONG), ear)
    worker.close()
    assert ear.wait(*names) == [Finished("cancelled")] * 9
    with pytest.raises(RuntimeError, match="shutting down"):
        worker.submit(Job("late", a_prompt(5), 20), ear)
    worker.cancel("late")
    worker.close()  # again
    assert worker.load().running == worker.load().waiting == 0
    assert offloaded.config._attn_implementation == attention
    assert greedy(offloaded, a_prompt(5), 6) == greedy(whole, a_prompt(5), 6)


def test_a_listener_may_close_the_worker(offloaded: Any) -> None:
    ear = Ear(lambda _name, _news: worker.close())
    worker = BatchingWorker(offloaded, ServeConfig(cache_bytes="1MiB", max_batch_tokens=16, max_running=2))
    worker.submit(Job("job", a_prompt(5), LONG), ear)
    assert ear.wait("job") == [Finished("cancelled")]
    worker.close()


def test_a_version_of_transformers_that_batches_otherwise_is_named_in_one_line(
    offloaded: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **__: object) -> None:
        raise AttributeError("no batching here")

    monkeypatch.setattr(ContinuousMixin, "init_continuous_batching", gone)
    with pytest.raises(UnsupportedModelError, match=r"^continuous batching of transformers .* install a version from"):
        PagedBatch(offloaded, 1 << 20, 16, 4)
    ear = Ear()
    with serving(offloaded) as worker:  # one at a time, then
        assert not worker.batches
        worker.submit(Job("job", a_prompt(5), 6), ear)
        ear.wait("job")
    assert ear.ids("job") == greedy(whole, a_prompt(5), 6)


def test_a_model_that_shows_in_its_first_pass_that_it_can_not_be_batched_is_not(
    offloaded: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_batch: PagedBatch) -> Tensor:
        raise RuntimeError("index_copy_(): Source/destination tensor must have same slice shapes.")

    monkeypatch.setattr(PagedBatch, "run", fails)
    ear = Ear()
    with serving(offloaded) as worker:
        for name in ("one", "two"):
            worker.submit(Job(name, a_prompt(5), 6), ear)
        assert ear.wait("one", "two") == [Finished("length")] * 2
        assert not worker.batches
    assert ear.ids("one") == ear.ids("two") == greedy(whole, a_prompt(5), 6)


def test_jobs_one_at_a_time_can_be_cancelled_and_fail_too(tiny: Make) -> None:
    ear = Ear()
    with finemoe.load(tiny("deepseek_v3"), expert_memory="60%") as model, serving(model) as worker:
        for name in ("runs", "waits", "fails", "last"):
            broken = Breaks() if name == "fails" else None
            worker.submit(Job(name, a_prompt(5), 6 if name == "last" else LONG, constraint=broken), ear)
        ear.wait_for_tokens("runs", 2)
        for name in ("waits", "runs"):
            worker.cancel(name)
        ends = ear.wait("runs", "waits", "fails", "last")
        assert [end.reason for end in ends] == ["cancelled", "cancelled", "error", "length"]
        assert worker.load() == Load(0, 0, worker.load().cache_blocks, worker.load().cache_blocks)


def test_300_jobs_with_cancels_at_any_time_leave_nothing_behind(offloaded: Any) -> None:
    draw = torch.Generator().manual_seed(1)

    def below(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=draw))

    doomed = {f"job-{number}": below(8) for number in range(300) if below(3) == 0}

    def cancel(name: str, news: Token | Finished) -> None:
        if isinstance(news, Token) and len(ear.tokens[name]) == doomed.get(name):
            worker.cancel(name)

    ear, threads = Ear(cancel), threading.active_count()
    with serving(offloaded, max_running=8) as worker:
        for number in range(300):
            job = Job(f"job-{number}", a_prompt(1 + below(40), number), 1 + below(8), temperature=float(below(2)))
            worker.submit(job, ear)
            if below(10) == 0:
                worker.cancel(f"job-{below(number + 1)}")
        ends = ear.wait(*(f"job-{number}" for number in range(300)), timeout_s=200)
        assert {end.reason for end in ends} == {"length", "cancelled"}
        load = worker.load()
        assert load == Load(0, 0, load.cache_blocks, load.cache_blocks)
        batch = worker._batch
        assert isinstance(batch, PagedBatch)
        assert not batch._states and not worker._taken and not worker._jobs
        assert not any(allocator.block_table for allocator in batch._allocators)
    assert threading.active_count() == threads
    assert not offloaded.finemoe._engine.pool._pins


def test_at_rest_waits_for_a_moment_without_a_job(offloaded: Any) -> None:
    done: list[str] = []
    with serving(offloaded) as worker:
        assert worker.run_when_idle(lambda: done.append(threading.current_thread().name), 10.0)
        assert done == ["finemoe-model"]
        ear = Ear()
        worker.submit(Job("job", a_prompt(5), LONG), ear)
        assert not worker.run_when_idle(lambda: done.append("too late"), 0.05)
        worker.cancel("job")
        assert ear.wait("job") == [Finished("cancelled")]
        assert worker.run_when_idle(lambda: 1 // 0, 10.0), "what it raises is not the worker's"
        assert worker.failure() is None
    assert not worker.run_when_idle(lambda: done.append("closed"), 10.0)
    assert len(done) == 1
