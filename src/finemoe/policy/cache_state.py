"""State of the expert cache as flat arrays, and its transitions as kernels.

`CacheManager` (engine) and the simulator both keep a `CacheState` and change it only through these kernels.

Expert `e` of layer `l` has index `l * E + e`. Life of an expert: `ABSENT` -> `LOADING` (it owns a slot) -> `RESIDENT`
-> `ABSENT` (evicted). A pinned or loading expert is never a victim.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from finemoe.jit import compiled_as, kernel

Scores = npt.NDArray[np.float64]

ABSENT, LOADING, RESIDENT = 0, 1, 2  # CacheState.status
NO_EXPERT = 255  # CacheState.device of an index without an expert: its layer has fewer than E
FREE, NONE = -1, -2  # in place of an expert's index: a free slot was used; there is no slot, or no candidate
EVICTED, PREFETCHED, PREFETCHED_USED, WASTED, REGRETTED, THROTTLED = range(6)  # CacheState.counters
TRIED, GAINED, LOST, THROTTLE = range(4)  # CacheState.prefetch_balance
WINDOW = 256  # prefetches, a few iterations' worth, after which throttling is decided
THROTTLE_ITERATIONS = 64  # after that many without prefetch it is tried again: other requests may be more predictable


class CacheState(NamedTuple):
    """State of a cache of `C` slots, spread over devices. Arrays have length `L * E` unless a shape is given.

    Counters: `EVICTED` experts; `PREFETCHED` prefetches begun, of them `PREFETCHED_USED`, and `WASTED`, which lost
    their slot unused; `REGRETTED` accesses to experts that had been evicted for a prefetch; `THROTTLED` iterations.
    """

    status: npt.NDArray[np.uint8]
    pinned: npt.NDArray[np.bool_]  # needed by the current layer, and not used yet
    unused_prefetch: npt.NDArray[np.bool_]  # loading or resident by a prefetch, and not needed since
    evicted_for_prefetch: npt.NDArray[np.bool_]  # absent, because a prefetch took its slot
    device: npt.NDArray[np.uint8]  # which device it is cached on: round-robin, or `NO_EXPERT`
    free_slots: npt.NDArray[np.int64]  # [devices]
    counters: npt.NDArray[np.int64]  # [6]
    prefetch_balance: npt.NDArray[np.int64]  # [4], see `throttle_prefetch`


def make_cache_state(layers: int, experts: int, capacity: int, devices: int = 1) -> CacheState:
    """An empty cache. Every device has `capacity // devices` slots, and the first `capacity % devices` one more."""
    size = layers * experts
    return CacheState(
        status=np.zeros(size, np.uint8),
        pinned=np.zeros(size, np.bool_),
        unused_prefetch=np.zeros(size, np.bool_),
        evicted_for_prefetch=np.zeros(size, np.bool_),
        device=(np.arange(size) % devices).astype(np.uint8),
        free_slots=np.array([(capacity + devices - 1 - i) // devices for i in range(devices)], np.int64),
        counters=np.zeros(6, np.int64),
        prefetch_balance=np.zeros(4, np.int64),
    )


def _choose_victim_loop(cache: CacheState, retention_priority: Scores, device: int) -> int:
    victim = NONE
    for expert in range(len(retention_priority)):
        if cache.status[expert] != RESIDENT or cache.pinned[expert] or cache.device[expert] != device:
            continue
        if victim == NONE or retention_priority[expert] < retention_priority[victim]:
            victim = expert
    return victim


@compiled_as(_choose_victim_loop)
def choose_victim(cache: CacheState, retention_priority: Scores, device: int) -> int:
    """The unpinned resident expert of lowest retention priority (ties: the lowest index), or `NONE`."""
    evictable = (cache.status == RESIDENT) & ~cache.pinned & (cache.device == device)
    victim = int(np.where(evictable, retention_priority, np.inf).argmin())
    if evictable[victim]:
        return victim
    victim = int(evictable.argmax())  # all candidates have priority +inf, or there is none
    return victim if evictable[victim] else NONE


@kernel
def allocate_slot(cache: CacheState, retention_priority: Scores, device: int) -> int:
    """Takes a free slot, or else evicts. Returns `FREE`, the index of the evicted expert, or `NONE`: no slot."""
    if cache.free_slots[device] > 0:
        cache.free_slots[device] -= 1
        return FREE
    victim = choose_victim(cache, retention_priority, device)
    if victim != NONE:
        cache.status[victim] = ABSENT
        cache.counters[EVICTED] += 1
        if cache.unused_prefetch[victim]:
            cache.unused_prefetch[victim] = False
            cache.counters[WASTED] += 1
    return victim


@kernel
def access(cache: CacheState, expert: int) -> int:
    """The current layer needs this expert: pins it. Returns its status."""
    cache.pinned[expert] = True
    if cache.unused_prefetch[expert]:
        cache.unused_prefetch[expert] = False
        cache.counters[PREFETCHED_USED] += 1
        cache.prefetch_balance[GAINED] += 1
    elif cache.evicted_for_prefetch[expert]:
        cache.evicted_for_prefetch[expert] = False
        cache.counters[REGRETTED] += 1
        cache.prefetch_balance[LOST] += 1
    return int(cache.status[expert])


@kernel
def access_all(cache: CacheState, experts: npt.NDArray[np.int64], statuses: npt.NDArray[np.uint8]) -> int:
    """`access` for all experts that a layer needs, in order; fills in `statuses`. Returns how many are absent."""
    absent = 0
    for i in range(len(experts)):
        statuses[i] = access(cache, experts[i])
        absent += statuses[i] == ABSENT
    return absent


@kernel
def begin_prefetch(cache: CacheState, retention_priority: Scores, expert: int) -> int:
    """Takes a slot for a prefetch; one must be available. Returns the evicted expert, or `FREE`."""
    victim = allocate_slot(cache, retention_priority, cache.device[expert])
    cache.status[expert] = LOADING
    cache.unused_prefetch[expert] = True
    cache.evicted_for_prefetch[expert] = False
    if victim >= 0:
        cache.evicted_for_prefetch[victim] = True
    cache.counters[PREFETCHED] += 1
    cache.prefetch_balance[TRIED] += 1
    return victim


@kernel
def throttle_prefetch(cache: CacheState) -> None:
    """Called when an iteration begins: suspends prefetching for `THROTTLE_ITERATIONS` if it does not pay.

    Decided after every `WINDOW` prefetches (`TRIED`). They pay if more prefetched experts were used (`GAINED`) than
    experts that were evicted for them were needed again (`LOST`). The transfers themselves count as free, because
    prefetches only use an idle link. `prefetch_balance[THROTTLE]` is the number of iterations still to go without.
    """
    if cache.prefetch_balance[THROTTLE] > 0:
        cache.prefetch_balance[THROTTLE] -= 1
    elif cache.prefetch_balance[TRIED] >= WINDOW:
        if cache.prefetch_balance[GAINED] <= cache.prefetch_balance[LOST]:
            cache.prefetch_balance[THROTTLE] = THROTTLE_ITERATIONS
        cache.prefetch_balance[:THROTTLE] = 0
    cache.counters[THROTTLED] += cache.prefetch_balance[THROTTLE] > 0


@kernel
def release_slot(cache: CacheState, expert: int) -> None:
    """A load failed or was cancelled: the expert is absent and its slot free."""
    cache.status[expert] = ABSENT
    cache.free_slots[cache.device[expert]] += 1
    if cache.unused_prefetch[expert]:
        cache.unused_prefetch[expert] = False
        cache.counters[WASTED] += 1


def _highest_priority_absent_loop(cache: CacheState, prefetch_priority: Scores, device: int) -> int:
    best = NONE
    for expert in range(len(prefetch_priority)):
        if not prefetch_priority[expert] > 0 or cache.status[expert] != ABSENT or cache.device[expert] != device:
            continue
        if best == NONE or prefetch_priority[expert] > prefetch_priority[best]:
            best = expert
    return best


@compiled_as(_highest_priority_absent_loop)
def highest_priority_absent(cache: CacheState, prefetch_priority: Scores, device: int) -> int:
    """The absent expert of highest positive prefetch priority (ties: the lowest index), or `NONE`."""
    candidates = (cache.status == ABSENT) & (prefetch_priority > 0) & (cache.device == device)
    best = int(np.where(candidates, prefetch_priority, -np.inf).argmax())
    return best if candidates[best] else NONE


@kernel
def next_prefetch_candidate(
    cache: CacheState, retention_priority: Scores, prefetch_priority: Scores, margin: float, device: int
) -> int:
    """The absent expert of highest positive prefetch priority, if it may take a slot; otherwise `NONE`.

    It may take a free slot, or a victim's if its prefetch priority exceeds the victim's retention priority by more than
    `margin`. With a margin of `-inf` the two scores are not comparable: then it must exceed the victim's prefetch
    priority. `NONE` while throttled, and for an empty `prefetch_priority` (a policy without prefetch).
    """
    best = (
        highest_priority_absent(cache, prefetch_priority, device)
        if len(prefetch_priority) and cache.prefetch_balance[THROTTLE] == 0
        else NONE
    )
    if best == NONE:
        return NONE
    if cache.free_slots[device] > 0:
        return best
    victim = choose_victim(cache, retention_priority, device)
    if victim == NONE:
        return NONE
    if margin == -np.inf:
        return best if prefetch_priority[best] > prefetch_priority[victim] else NONE
    return best if prefetch_priority[best] > retention_priority[victim] + margin else NONE


@kernel
def begin_next_prefetch(
    cache: CacheState,
    retention_priority: Scores,
    prefetch_priority: Scores,
    margin: float,
    device: int,
    chosen: npt.NDArray[np.int64],
) -> None:
    """Begins the next prefetch, if there is a candidate; `chosen` `[2]`: the expert (or `NONE`) and its victim."""
    chosen[0] = next_prefetch_candidate(cache, retention_priority, prefetch_priority, margin, device)
    if chosen[0] != NONE:
        chosen[1] = begin_prefetch(cache, retention_priority, chosen[0])


@kernel
def should_continue_prefetch(
    cache: CacheState,
    retention_priority: Scores,
    prefetch_priority: Scores,
    margin: float,
    switch: float,
    device: int,
    expert: int,
) -> bool:
    """Whether a prefetch in flight should continue rather than be cancelled.

    Cancelled are prefetches whose priority is no longer positive, is below the retention priority of every resident
    expert (if the scores are comparable), or is less than `1 / switch` of the next candidate's.
    """
    if not prefetch_priority[expert] > 0:
        return False
    if margin != -np.inf:
        rival = choose_victim(cache, retention_priority, device)
        if rival != NONE and prefetch_priority[expert] < retention_priority[rival]:
            return False
    if switch == np.inf:
        return True
    other = next_prefetch_candidate(cache, retention_priority, prefetch_priority, margin, device)
    return other == NONE or not prefetch_priority[other] > switch * prefetch_priority[expert]
