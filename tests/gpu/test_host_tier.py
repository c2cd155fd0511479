"""The host tier and the device slots: what is evicted, and what is never evicted."""

from __future__ import annotations

import pytest

from finemoe.errors import BudgetError, InvariantError
from finemoe.gpu.cpu_device import CpuDevice
from finemoe.gpu.host_tier import HostTier
from finemoe.gpu.slot_pool import DeviceSlotPool, slots_per_device
from finemoe.policy import CacheManager, Policy
from finemoe.types import ExpertId

A, B, C, D = (ExpertId(0, expert) for expert in range(4))
SLOT_BYTES = 64


def read(tier: HostTier, expert: ExpertId) -> bool:
    if tier.reserve(expert) is None:
        return False
    tier.landed(expert)
    return True


@pytest.fixture
def tier() -> HostTier:
    return HostTier([A, B, C, D], 2, SLOT_BYTES, [CpuDevice()])


def test_the_least_recently_used_expert_is_evicted(tier: HostTier) -> None:
    assert read(tier, A)
    assert read(tier, B)
    assert tier.acquire(A) is not None
    tier.release(A)
    assert read(tier, C)
    assert [each for each in (A, B, C) if tier.holds(each)] == [A, C]


def test_the_expert_with_the_lowest_priority_is_evicted(tier: HostTier) -> None:
    tier.priority = lambda expert: {A: 2.0, B: 1.0}.get(expert, 0.0)
    assert read(tier, A)
    assert read(tier, B)
    assert read(tier, C)
    assert not tier.holds(B)
    assert read(tier, D)
    assert [each for each in (A, C, D) if tier.holds(each)] == [A, D]


def test_experts_that_are_copied_or_read_are_not_evicted(tier: HostTier) -> None:
    assert read(tier, A)
    assert tier.acquire(A) is not None
    assert tier.acquire(A) is not None
    assert tier.reserve(B) is not None
    assert tier.reserve(C) is None
    tier.release(A)
    assert tier.reserve(C) is None
    tier.release(A)
    assert tier.reserve(C) is not None
    assert not tier.holds(A)


def test_free_slots_are_filled_in_order_with_failed_reads_last(tier: HostTier) -> None:
    assert tier.next_absent() == A
    assert tier.reserve(A) is not None
    tier.failed(A)
    assert tier.next_absent() == B
    assert read(tier, B)
    assert read(tier, C)
    assert tier.next_absent() is None  # no free slot


def test_slots_are_split_over_devices_as_in_the_cache_manager() -> None:
    for slots in range(3, 12):
        for devices in range(1, 4):
            cache = CacheManager(2, 8, slots, Policy(2, 8), devices).cache
            assert slots_per_device(slots, devices) == tuple(cache.free_slots)


def test_an_expert_gets_a_slot_on_its_device() -> None:
    pool = DeviceSlotPool([CpuDevice(), CpuDevice()], 3, SLOT_BYTES, lambda each: each.expert % 2)
    assert [pool.device_of_slot(pool.reserve(each, None)) for each in (A, B, C)] == [0, 1, 0]
    with pytest.raises(InvariantError, match="no free slot"):
        pool.reserve(D, None)
    assert [tuple(memory.shape) for memory in pool.memory] == [(2, SLOT_BYTES), (1, SLOT_BYTES)]
    pool.check_integrity()


def test_a_device_without_enough_memory_is_named() -> None:
    with pytest.raises(
        BudgetError, match=r"--expert-memory: 640 B for 10 experts on cpu, but only 100 B are available"
    ):
        DeviceSlotPool([CpuDevice(memory_bytes=100)], 10, SLOT_BYTES)
