"""Second by second: what a sampler makes of counters that only grow, or are reset."""

from __future__ import annotations

import threading
import time

import pytest

from finemoe.serving import live
from finemoe.serving.live import KEPT, Live, LiveSource, Progress
from finemoe.serving.scheduler.job import Load
from tests.serving.fake_offload import FakeOffload


def make() -> tuple[Live, FakeOffload, Progress, list[float]]:
    offload, progress, now_s = FakeOffload(4, 4), Progress(), [0.0]
    return Live(LiveSource(offload, progress, lambda: Load(3, 7, 1, 2)), lambda: now_s[0]), offload, progress, now_s


def test_a_sample_is_what_came_since_the_last_one() -> None:
    sampler, offload, progress, now_s = make()
    offload.came(hits=6, late=1, misses=3, bytes_read=4000, stall_s=0.5)
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


def test_after_a_reset_all_is_new_and_nothing_is_negative() -> None:
    sampler, offload, _, now_s = make()
    offload.came(hits=100, bytes_read=9000)
    now_s[0] = 1.0
    sampler.sample()
    offload.came(hits=-103, bytes_read=-9200)
    now_s[0] = 2.0
    sample = sampler.sample()
    assert sample.hit_rate == 1
    assert sample.bytes_s == 500


def test_ten_minutes_are_kept_and_told_from_where_one_left_off() -> None:
    sampler, _, _, now_s = make()
    for second in range(KEPT + 20):
        now_s[0] = float(second)
        last = sampler.sample()
    columns = sampler.since(0)
    assert {len(column) for column in columns.values()} == {KEPT}
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


def test_what_is_told_from_many_threads_is_taken_once() -> None:
    progress = Progress()

    def tell() -> None:
        for _ in range(500):
            progress.token()

    threads = [threading.Thread(target=tell) for _ in range(4)]
    for thread in threads:
        thread.start()
    taken = 0
    while any(thread.is_alive() for thread in threads):
        taken += progress.take().tokens
    assert taken + progress.take().tokens == 2000
