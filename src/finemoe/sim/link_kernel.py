"""The modelled link: one transfer at a time per device, urgent ones first, prefetches in between. Kernels.

Times are in units of one layer's compute. A prefetch that is pre-empted finishes the chunk that is on the wire, keeps
its slot, and goes on when nothing urgent is left.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from finemoe.jit import kernel
from finemoe.policy.cache_state import (
    LOADING,
    NONE,
    RESIDENT,
    CacheState,
    Scores,
    allocate_slot,
    begin_prefetch,
    next_prefetch_candidate,
    release_slot,
)

Ints = npt.NDArray[np.int64]

MARGIN, SWITCH, TRANSFER, CHUNKS, READY_FIRST, CAPACITY, SLOWDOWN = range(7)  # of the rules
NOW, STALL, DUE = range(3)  # of the clock; from DUE on, what the policy said last counts
HITS, LATE, MISSES, ACCESSES = range(4)  # of the counts
MOVED, LANDED, DROPPED, USED = range(4)  # of Wire.sums: all but the last as if everything were urgent
FETCHED, PREFETCHED, WITHDRAWN = range(3)  # of what the log tells


class Wire(NamedTuple):
    """State of the links. `X` is `L * E`."""

    time: Scores  # [devices], up to which a link was simulated
    busy: Scores  # [devices], until then a pre-empted chunk is on the wire
    takes: Scores  # [X], time that an expert in flight takes, if it is urgent all the way
    left: Scores  # [X], of that, what is still to come
    factors: Scores  # [n], of transfers, one after the other; see Noise
    begun: Ints  # [1], transfers
    queue: Ints  # [devices, X], urgent experts, a ring
    head: Ints  # [devices]
    queued: Ints  # [devices]
    prefetch: Ints  # [devices], the one under way or pre-empted, or NONE
    ready: Ints  # [X], needed experts in the order in which they became ready
    readied: Ints  # [1]
    sums: Scores  # [4]
    log: Ints  # [n, 3]: what was done, to which expert, whose slot it took; n is 0 if nobody wants to know
    logged: Ints  # [1]


def make_wire(size: int, devices: int, factors: Scores, log: int = 0) -> Wire:
    """Idle links at time 0. `log` is how many actions there is room for."""

    def zeros(*shape: int) -> Ints:
        return np.zeros(shape, np.int64)

    return Wire(
        time=np.zeros(devices), busy=np.zeros(devices), takes=np.zeros(size),
        left=np.zeros(size), factors=factors, begun=zeros(1), queue=zeros(devices, size),
        head=zeros(devices), queued=zeros(devices), prefetch=np.full(devices, NONE), ready=zeros(size),
        readied=zeros(1), sums=np.zeros(4), log=zeros(log, 3), logged=zeros(1),
    )  # fmt: skip


class World(NamedTuple):
    """All that a replay changes."""

    cache: CacheState
    wire: Wire
    retention_priority: Scores  # [X], the policy's, as far as they count
    prefetch_priority: Scores  # [X], the same; empty if it never prefetches
    lagged_retention_priority: Scores  # [X], the policy's
    lagged_prefetch_priority: Scores  # [X] or empty, the policy's
    rules: Scores  # [7]
    clock: Scores  # [3]
    counts: Ints  # [4]
    waiting: npt.NDArray[np.bool_]  # [E], scratch: which needs of a layer wait for a slot


@kernel
def note(wire: Wire, what: int, expert: int, victim: int) -> None:
    """Writes an action into the log, as long as there is room."""
    row = wire.logged[0]
    if row < len(wire.log):
        wire.log[row, 0], wire.log[row, 1], wire.log[row, 2] = what, expert, victim
        wire.logged[0] += 1


@kernel
def depart(wire: Wire, rules: Scores, expert: int) -> None:
    """An expert's way begins. No two need take the same time."""
    factor = wire.factors[wire.begun[0] % len(wire.factors)]
    wire.begun[0] += 1
    wire.takes[expert] = wire.left[expert] = rules[TRANSFER] * factor


@kernel
def enqueue(wire: Wire, device: int, expert: int) -> None:
    """Puts an expert at the end of a link's urgent queue."""
    room = wire.queue.shape[1]
    wire.queue[device, (wire.head[device] + wire.queued[device]) % room] = expert
    wire.queued[device] += 1


@kernel
def fetch(cache: CacheState, wire: Wire, retention_priority: Scores, rules: Scores, expert: int) -> bool:
    """Begins an urgent fetch; false if no slot can be had."""
    device = cache.device[expert]
    victim = allocate_slot(cache, retention_priority, device)
    if victim == NONE:
        return False
    cache.status[expert] = LOADING
    depart(wire, rules, expert)
    enqueue(wire, device, expert)
    note(wire, FETCHED, expert, victim)
    return True


@kernel
def cancel(cache: CacheState, wire: Wire, device: int) -> None:
    """Drops a link's prefetch; what came of it is lost."""
    expert = wire.prefetch[device]
    wire.sums[DROPPED] += wire.takes[expert] - wire.left[expert]
    wire.prefetch[device] = NONE
    release_slot(cache, expert)
    note(wire, WITHDRAWN, expert, NONE)


@kernel
def preempt(wire: Wire, rules: Scores, device: int, now: float) -> None:
    """Makes a link's prefetch wait for what is urgent, once the chunk on the wire is complete."""
    expert = wire.prefetch[device]
    if rules[CHUNKS] <= 0 or wire.takes[expert] <= 0:
        return
    chunk = wire.takes[expert] / rules[CHUNKS]
    rest = wire.left[expert] % chunk
    if wire.left[expert] - rest <= 1e-12:  # its last chunk: it lands before anything else
        wire.prefetch[device] = NONE
        room = wire.queue.shape[1]
        wire.head[device] = (wire.head[device] - 1) % room
        wire.queue[device, wire.head[device]] = expert
        wire.queued[device] += 1
        return
    wire.left[expert] -= rest
    wire.sums[MOVED] += rest
    wire.sums[USED] += rest * rules[SLOWDOWN]
    wire.busy[device] = now + rest * rules[SLOWDOWN]


@kernel
def land(cache: CacheState, wire: Wire, expert: int) -> None:
    """An expert's last byte has come."""
    wire.sums[MOVED] += wire.left[expert]
    wire.sums[LANDED] += wire.takes[expert]
    wire.left[expert] = 0.0
    cache.status[expert] = RESIDENT
    if cache.pinned[expert]:
        wire.ready[wire.readied[0]] = expert
        wire.readied[0] += 1


@kernel
def advance(
    cache: CacheState,
    wire: Wire,
    retention_priority: Scores,
    prefetch_priority: Scores,
    rules: Scores,
    device: int,
    until: float,
) -> None:
    """Simulates one link up to a time. Idle, it prefetches what is wanted most."""
    now = wire.time[device]
    while True:
        start = max(now, wire.busy[device])
        urgent = wire.queued[device] > 0
        throttle = 1.0 if urgent else rules[SLOWDOWN]
        if urgent:
            expert = wire.queue[device, wire.head[device]]
        else:
            if start >= until:
                break
            expert = wire.prefetch[device]
            if expert == NONE:
                expert = next_prefetch_candidate(cache, retention_priority, prefetch_priority, rules[MARGIN], device)
                if expert == NONE:
                    break
                victim = begin_prefetch(cache, retention_priority, expert)
                depart(wire, rules, expert)
                wire.prefetch[device] = expert
                note(wire, PREFETCHED, expert, victim)
        done = start + wire.left[expert] * throttle
        if done > until:
            if until > start:
                moved = (until - start) / throttle
                wire.left[expert] -= moved
                wire.sums[MOVED] += moved
                wire.sums[USED] += until - start
            break
        wire.sums[USED] += done - start
        if urgent:
            wire.head[device] = (wire.head[device] + 1) % wire.queue.shape[1]
            wire.queued[device] -= 1
        else:
            wire.prefetch[device] = NONE
        land(cache, wire, expert)
        now = done
    wire.time[device] = until


@kernel
def advance_all(
    cache: CacheState, wire: Wire, retention_priority: Scores, prefetch_priority: Scores, rules: Scores, until: float
) -> None:
    """Simulates every link up to a time."""
    for device in range(len(wire.time)):
        if wire.queued[device] == 0 and len(prefetch_priority) == 0:  # on demand, and nothing is
            wire.time[device] = until
        else:
            advance(cache, wire, retention_priority, prefetch_priority, rules, device, until)


@kernel
def elapse(world: World, until: float) -> None:
    """Simulates every link up to a time. On the way, what the policy said comes to count when it is due."""
    cache, wire, retention_priority, prefetch_priority, rules, clock = (
        world.cache,
        world.wire,
        world.retention_priority,
        world.prefetch_priority,
        world.rules,
        world.clock,
    )
    if clock[DUE] <= until:
        advance_all(cache, wire, retention_priority, prefetch_priority, rules, clock[DUE])
        retention_priority[:] = world.lagged_retention_priority
        prefetch_priority[:] = world.lagged_prefetch_priority
        clock[DUE] = np.inf
    advance_all(cache, wire, retention_priority, prefetch_priority, rules, until)


@kernel
def next_landing(wire: Wire) -> float:
    """When the next urgent expert will have come; infinity if none is under way."""
    soonest = np.inf
    for device in range(len(wire.time)):
        if wire.queued[device] > 0:
            expert = wire.queue[device, wire.head[device]]
            soonest = min(soonest, max(wire.time[device], wire.busy[device]) + wire.left[expert])
    return soonest
