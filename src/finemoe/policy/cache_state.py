"""The cache's bookkeeping: what is resident, in flight and in use, and whose slot is taken. Kernels over flat arrays.

Expert `e` of layer `l` has the index `l * E + e`. Life of an expert: absent -> loading (it owns a slot) -> resident ->
absent (its slot was taken). What is pinned or loading is never a victim.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from finemoe.jit import compiled_as, kernel

Scores = npt.NDArray[np.float64]

ABSENT, LOADING, RESIDENT = 0, 1, 2
NO_EXPERT = 255  # Book.device of what there is not: experts that a layer has less than the largest
FREE, NONE = -1, -2  # instead of a victim's index: a free slot was there; there is nothing to be had
EVICTED, PREFETCHED, PREFETCHED_USED, WASTED, REGRETTED, THROTTLED = range(6)  # of Book.tally
TRIED, GAINED, LOST, THROTTLE = range(4)  # of Book.account
WINDOW = 256  # prefetches over which it is judged whether they pay: a few iterations' worth
THROTTLE_ITERATIONS = 64  # then they are tried again: other requests may be more predictable


class CacheState(NamedTuple):
    """State of a cache of `C` slots, spread over devices. Arrays of length `L * E` unless said otherwise."""

    status: npt.NDArray[np.uint8]
    pinned: npt.NDArray[np.bool_]  # needed by the layer under way, and not used yet
    unused_prefetch: npt.NDArray[np.bool_]  # came, or is coming, by prefetch, and was not needed yet
    evicted_for_prefetch: npt.NDArray[np.bool_]  # absent, because its slot went to a prefetch
    device: npt.NDArray[np.uint8]  # where it lives: round-robin, or `NO_EXPERT`
    room: npt.NDArray[np.int64]  # [devices], free slots
    counters: npt.NDArray[np.int64]  # [6], see above
    prefetch_balance: npt.NDArray[np.int64]  # [4]: what prefetches brought and cost, see `throttle_prefetch`


def make_cache_state(layers: int, experts: int, capacity: int, devices: int = 1) -> CacheState:
    """An empty cache. Device `i` has `capacity // devices` slots, the first ones one more if it does not divide."""
    size = layers * experts
    return CacheState(
        status=np.zeros(size, np.uint8),
        pinned=np.zeros(size, np.bool_),
        unused_prefetch=np.zeros(size, np.bool_),
        evicted_for_prefetch=np.zeros(size, np.bool_),
        device=(np.arange(size) % devices).astype(np.uint8),
        room=np.array([(capacity + devices - 1 - i) // devices for i in range(devices)], np.int64),
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
    """The resident of lowest worth that nothing needs now (ties: the lowest index), or `NONE`."""
    may_go = (cache.status == RESIDENT) & ~cache.pinned & (cache.device == device)
    victim = int(np.where(may_go, retention_priority, np.inf).argmin())
    if may_go[victim]:
        return victim
    victim = int(may_go.argmax())  # every candidate is worth +inf, and argmin met another first; or there is none
    return victim if may_go[victim] else NONE


@kernel
def allocate_slot(cache: CacheState, retention_priority: Scores, device: int) -> int:
    """Takes a slot: `FREE`, or the index of the victim that lost its own, or `NONE`."""
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
    """A layer needs this expert now: pins it. Returns its status."""
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
    """`access` of all that a layer needs, in order; `statuses` is filled in. Returns how many are absent."""
    absent = 0
    for i in range(len(experts)):
        statuses[i] = access(cache, experts[i])
        absent += statuses[i] == ABSENT
    return absent


@kernel
def begin_prefetch(cache: CacheState, retention_priority: Scores, expert: int) -> int:
    """Takes a slot for a prefetch that `next_prefetch_candidate` named. Returns the victim, or `FREE`."""
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
    """An iteration begins: after every `WINDOW` prefetches, pauses them if they did not pay.

    They pay if more of them were needed than of the experts that had made room for them. Moving them costs nothing
    here, as they only use a link that is idle.
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
    """What was loading will not come: its slot is free."""
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
    """The absent expert that is wanted most (ties: the lowest index), or `NONE` if none is wanted."""
    candidates = (cache.status == ABSENT) & (prefetch_priority > 0) & (cache.device == device)
    best = int(np.where(candidates, prefetch_priority, -np.inf).argmax())
    return best if candidates[best] else NONE


@kernel
def next_prefetch_candidate(
    cache: CacheState, retention_priority: Scores, prefetch_priority: Scores, margin: float, device: int
) -> int:
    """The absent expert of highest positive `prefetch_priority` (which may be empty), or `NONE`, as while throttled.

    Its prefetch priority must exceed the victim's retention priority by more than `margin`. With a margin of `-inf` the
    two scores are not comparable; then it must only exceed the victim's prefetch priority.
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
    """Begins the next prefetch, if there is a candidate. `chosen` `[2]` becomes the expert and its victim."""
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
    """Whether a prefetch under way is worth going on with: wanted, worth its slot, and no other is wanted far more."""
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
