"""Samples from counters that grow, or are reset."""

from __future__ import annotations

import threading
import time

import pytest

from finemoe.serving import live
from finemoe.serving.live import MAX_SAMPLES, LiveSampler, LiveSource, ProgressCounters
from finemoe.serving.scheduler.job import WorkerLoad
from tests.serving.fake_model_handle import FakeModelHandle


def make() -> tuple[LiveSampler, FakeModelHandle, ProgressCounters, list[float]]:
    offload, progress, now_s = FakeModelHandle(4, 4), ProgressCounters(), [0.0]
    return (
        LiveSampler(LiveSource(offload, progress, lambda: WorkerLoad(3, 7, 1, 2)), lambda: now_s[0]),
        offload,
        progress,
        now_s,
    )


def test_a_sample_covers_the_time_since_the_last_one() -> None:
    sampler, offload, progress, now_s = make()
    offload.advance(hits=6, late=1, misses=3, bytes_read=4000, stall_s=0.5)
    progress.token()
    progress.token(4)
    for ttft_s in (0.5, 1.5):
        progress.first_token(ttft_s)
    progress.finished(0.25)
    now_s[0] = 2.0
    sample = sampler.sample()
    assert (sample.tok_s, sample.ttft_s, sample.tpot_s) == (2.5, 1.0, 0.25)
    assert (sample.hit_rate, sample.bytes_s, sample.stall_share) == (0.6, 2000, 0.25)
    assert (sample.running, sample.waiting) == (3, 7)
    now_s[0] = 3.0
    quiet = sampler.sample()
    assert (quiet.tok_s, quiet.bytes_s, quiet.stall_share) == (0, 0, 0)
    assert quiet.ttft_s is quiet.tpot_s is quiet.hit_rate is None


def test_counters_that_were_reset_give_no_negative_samples() -> None:
    sampler, offload, _, now_s = make()
    offload.advance(hits=100, bytes_read=9000)
    now_s[0] = 1.0
    sampler.sample()
    offload.advance(hits=-103, bytes_read=-9200)
    now_s[0] = 2.0
    sample = sampler.sample()
    assert sample.hit_rate == 1
    assert sample.bytes_s == 500


def test_ten_minutes_are_kept_and_returned_from_a_time_on() -> None:
    sampler, _, _, now_s = make()
    for second in range(MAX_SAMPLES + 20):
        now_s[0] = float(second)
        last = sampler.sample()
    columns = sampler.since(0)
    assert {len(column) for column in columns.values()} == {MAX_SAMPLES}
    assert columns["time_s"] == sorted(columns["time_s"])
    assert sampler.since(last.time_s)["time_s"] == []
    assert len(sampler.since(columns["time_s"][-4])["running"]) <= 3


def test_the_thread_samples_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "INTERVAL_S", 0.01)
    sampler, _, _, _ = make()
    sampler.start()
    deadline_s = time.monotonic() + 10
    while len(sampler.since(0)["time_s"]) < 3 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    sampler.stop()
    assert len(sampler.since(0)["time_s"]) >= 3
    assert not any(thread.name == "finemoe-live" for thread in threading.enumerate())


def test_tokens_from_many_threads_are_counted_once() -> None:
    progress = ProgressCounters()

    def count() -> None:
        for _ in range(500):
            progress.token()

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    total = 0
    while any(thread.is_alive() for thread in threads):
        total += progress.take().tokens
    assert total + progress.take().tokens == 2000
