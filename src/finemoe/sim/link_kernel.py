"""The modelled link: one transfer at a time per device, demand loads before prefetches. Kernels.

Times are in units of one layer's compute for one token. Experts are flat indices `l * E + e`. A preempted prefetch
finishes the chunk in transfer, keeps its slot, and resumes when no demand load is left.
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

MARGIN, SWITCH, TRANSFER, CHUNKS, READY_FIRST, CAPACITY, SLOWDOWN = range(7)  # SimState.params
NOW, STALL, DUE = range(3)  # SimState.clock; at DUE the pending priorities take effect
HITS, LATE, MISSES, ACCESSES = range(4)  # SimState.counts
MOVED, LANDED, DROPPED, USED = range(4)  # LinkState.totals, times; without slowdown but for USED
FETCHED, PREFETCHED, CANCELLED = range(3)  # LinkState.log: action


class LinkState(NamedTuple):
    """State of the links. `X` is `L * E`."""

    time: Scores  # [devices], simulated up to this time
    busy: Scores  # [devices], when a preempted chunk has finished
    duration: Scores  # [X], transfer time of an expert in flight as a demand load
    remaining: Scores  # [X], the part of `duration` still to transfer
    duration_factors: Scores  # [n], of transfers in order, see `Noise`
    started: Ints  # [1], transfers started
    queue: Ints  # [devices, X], demand loads, a ring buffer
    head: Ints  # [devices], of the ring buffer
    queued: Ints  # [devices], entries of the ring buffer
    prefetch: Ints  # [devices], the prefetch in transfer or preempted, or NONE
    ready: Ints  # [X], experts that the layer needs, in the order in which they became resident
    ready_count: Ints  # [1], entries of `ready`
    totals: Scores  # [4]
    log: Ints  # [n, 3]: action, expert, victim; n is 0 without a log
    log_length: Ints  # [1], entries of `log`


def make_link_state(size: int, devices: int, duration_factors: Scores, log: int = 0) -> LinkState:
    """Idle links at time 0, with a log of at most `log` actions."""

    def zeros(*shape: int) -> Ints:
        return np.zeros(shape, np.int64)

    return LinkState(
        time=np.zeros(devices), busy=np.zeros(devices), duration=np.zeros(size), remaining=np.zeros(size),
        duration_factors=duration_factors, started=zeros(1), queue=zeros(devices, size), head=zeros(devices),
        queued=zeros(devices), prefetch=np.full(devices, NONE), ready=zeros(size), ready_count=zeros(1),
        totals=np.zeros(4), log=zeros(log, 3), log_length=zeros(1),
    )  # fmt: skip


class SimState(NamedTuple):
    """The mutable state of a simulation."""

    cache: CacheState
    link: LinkState
    retention_priority: Scores  # [X], in effect
    prefetch_priority: Scores  # [X], in effect; empty if the policy never prefetches
    pending_retention_priority: Scores  # [X], the policy's own array
    pending_prefetch_priority: Scores  # [X] or empty, the policy's own array
    params: Scores  # [7]
    clock: Scores  # [3]
    counts: Ints  # [4]
    waiting: npt.NDArray[np.bool_]  # [E], scratch: which experts that a layer needs wait for a slot


@kernel
def log_action(link: LinkState, what: int, expert: int, victim: int) -> None:
    """Appends an action to the log, if there is room."""
    row = link.log_length[0]
    if row < len(link.log):
        link.log[row, 0], link.log[row, 1], link.log[row, 2] = what, expert, victim
        link.log_length[0] += 1


@kernel
def start_transfer(link: LinkState, params: Scores, expert: int) -> None:
    """Sets a transfer's duration. It is not yet queued."""
    factor = link.duration_factors[link.started[0] % len(link.duration_factors)]
    link.started[0] += 1
    link.duration[expert] = link.remaining[expert] = params[TRANSFER] * factor


@kernel
def enqueue(link: LinkState, device: int, expert: int) -> None:
    """Appends an expert to a link's queue of demand loads."""
    room = link.queue.shape[1]
    link.queue[device, (link.head[device] + link.queued[device]) % room] = expert
    link.queued[device] += 1


@kernel
def fetch(cache: CacheState, link: LinkState, retention_priority: Scores, params: Scores, expert: int) -> bool:
    """Starts a demand load; false if no slot is available."""
    device = cache.device[expert]
    victim = allocate_slot(cache, retention_priority, device)
    if victim == NONE:
        return False
    cache.status[expert] = LOADING
    start_transfer(link, params, expert)
    enqueue(link, device, expert)
    log_action(link, FETCHED, expert, victim)
    return True


@kernel
def cancel(cache: CacheState, link: LinkState, device: int) -> None:
    """Cancels a link's prefetch and frees its slot; the bytes already moved are lost."""
    expert = link.prefetch[device]
    link.totals[DROPPED] += link.duration[expert] - link.remaining[expert]
    link.prefetch[device] = NONE
    release_slot(cache, expert)
    log_action(link, CANCELLED, expert, NONE)


@kernel
def preempt(link: LinkState, params: Scores, device: int, now: float) -> None:
    """Preempts a link's prefetch after the chunk in transfer; in its last chunk it is completed first."""
    expert = link.prefetch[device]
    if params[CHUNKS] <= 0 or link.duration[expert] <= 0:
        return
    chunk = link.duration[expert] / params[CHUNKS]
    rest = link.remaining[expert] % chunk
    if link.remaining[expert] - rest <= 1e-12:  # its last chunk: it completes before any demand load
        link.prefetch[device] = NONE
        room = link.queue.shape[1]
        link.head[device] = (link.head[device] - 1) % room
        link.queue[device, link.head[device]] = expert
        link.queued[device] += 1
        return
    link.remaining[expert] -= rest
    link.totals[MOVED] += rest
    link.totals[USED] += rest * params[SLOWDOWN]
    link.busy[device] = now + rest * params[SLOWDOWN]


@kernel
def land(cache: CacheState, link: LinkState, expert: int) -> None:
    """Completes a transfer: the expert is resident."""
    link.totals[MOVED] += link.remaining[expert]
    link.totals[LANDED] += link.duration[expert]
    link.remaining[expert] = 0.0
    cache.status[expert] = RESIDENT
    if cache.pinned[expert]:
        link.ready[link.ready_count[0]] = expert
        link.ready_count[0] += 1


@kernel
def advance_link(
    cache: CacheState,
    link: LinkState,
    retention_priority: Scores,
    prefetch_priority: Scores,
    params: Scores,
    device: int,
    until: float,
) -> None:
    """Simulates one link up to `until`. An idle link starts the prefetch of highest priority."""
    now = link.time[device]
    while True:
        start = max(now, link.busy[device])
        urgent = link.queued[device] > 0
        slowdown = 1.0 if urgent else params[SLOWDOWN]
        if urgent:
            expert = link.queue[device, link.head[device]]
        else:
            if start >= until:
                break
            expert = link.prefetch[device]
            if expert == NONE:
                expert = next_prefetch_candidate(cache, retention_priority, prefetch_priority, params[MARGIN], device)
                if expert == NONE:
                    break
                victim = begin_prefetch(cache, retention_priority, expert)
                start_transfer(link, params, expert)
                link.prefetch[device] = expert
                log_action(link, PREFETCHED, expert, victim)
        done = start + link.remaining[expert] * slowdown
        if done > until:
            if until > start:
                moved = (until - start) / slowdown
                link.remaining[expert] -= moved
                link.totals[MOVED] += moved
                link.totals[USED] += until - start
            break
        link.totals[USED] += done - start
        if urgent:
            link.head[device] = (link.head[device] + 1) % link.queue.shape[1]
            link.queued[device] -= 1
        else:
            link.prefetch[device] = NONE
        land(cache, link, expert)
        now = done
    link.time[device] = until


@kernel
def advance_links(
    cache: CacheState,
    link: LinkState,
    retention_priority: Scores,
    prefetch_priority: Scores,
    params: Scores,
    until: float,
) -> None:
    """Simulates all links up to `until`."""
    for device in range(len(link.time)):
        if link.queued[device] == 0 and len(prefetch_priority) == 0:  # no demand load, and the policy never prefetches
            link.time[device] = until
        else:
            advance_link(cache, link, retention_priority, prefetch_priority, params, device, until)


@kernel
def advance_until(state: SimState, until: float) -> None:
    """Simulates all links up to `until`; pending priorities take effect at their due time."""
    cache, link, retention_priority, prefetch_priority, params, clock = (
        state.cache,
        state.link,
        state.retention_priority,
        state.prefetch_priority,
        state.params,
        state.clock,
    )
    if clock[DUE] <= until:
        advance_links(cache, link, retention_priority, prefetch_priority, params, clock[DUE])
        retention_priority[:] = state.pending_retention_priority
        prefetch_priority[:] = state.pending_prefetch_priority
        clock[DUE] = np.inf
    advance_links(cache, link, retention_priority, prefetch_priority, params, until)


@kernel
def next_landing(link: LinkState) -> float:
    """The time at which the next demand load completes; infinity without one."""
    soonest = np.inf
    for device in range(len(link.time)):
        if link.queued[device] > 0:
            expert = link.queue[device, link.head[device]]
            soonest = min(soonest, max(link.time[device], link.busy[device]) + link.remaining[expert])
    return soonest
