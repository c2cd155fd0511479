"""One layer under the virtual clock: access the experts it needs, load the missing, compute what is ready. Kernels.

The engine is the reference implementation: tests/sim/test_agreement.py drives it on a virtual link and compares.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from finemoe.jit import kernel
from finemoe.policy.cache_state import (
    ABSENT,
    LOADING,
    NONE,
    RESIDENT,
    CacheState,
    Scores,
    access,
    should_continue_prefetch,
)
from finemoe.policy.lru_lfu import Ranking, visit
from finemoe.sim.link_kernel import (
    ACCESSES,
    CAPACITY,
    DROPPED,
    HITS,
    LANDED,
    LATE,
    MARGIN,
    MISSES,
    MOVED,
    NOW,
    READY_FIRST,
    STALL,
    SWITCH,
    Ints,
    LinkState,
    SimState,
    advance_until,
    cancel,
    enqueue,
    fetch,
    next_landing,
    preempt,
)

Flags = npt.NDArray[np.bool_]


@kernel
def submit_waiting(
    cache: CacheState, link: LinkState, retention_priority: Scores, params: Scores, needs: Ints, waiting: Flags
) -> int:
    """Starts the demand loads that wait for a slot, in order. Returns how many still wait."""
    waits = 0
    for i in range(len(needs)):
        if waiting[i]:
            if fetch(cache, link, retention_priority, params, needs[i]):
                waiting[i] = False
            else:
                waits += 1
    return waits


@kernel
def access_experts(cache: CacheState, link: LinkState, counts: Ints, needs: Ints, waiting: Flags) -> None:
    """Pins the needed experts and counts hits, late hits and misses. A needed prefetch becomes a demand load."""
    link.ready_count[0] = 0
    for i in range(len(needs)):
        expert = needs[i]
        waiting[i] = False
        status = access(cache, expert)
        if status == RESIDENT:
            counts[HITS] += 1
            link.ready[link.ready_count[0]] = expert
            link.ready_count[0] += 1
        elif status == LOADING:
            counts[LATE] += 1
            link.prefetch[cache.device[expert]] = NONE
            enqueue(link, cache.device[expert], expert)
        else:
            counts[MISSES] += 1
            waiting[i] = True
    counts[ACCESSES] += len(needs)


@kernel
def demand_load(state: SimState, needs: Ints) -> int:
    """Routing is known: accesses the needed experts and starts demand loads of the missing ones.

    A prefetch is cancelled if the policy no longer wants it or its slot is needed; otherwise demand loads preempt it.

    Returns:
        The number of needed experts that wait for a slot.
    """
    cache, link, retention_priority, prefetch_priority, params = (
        state.cache,
        state.link,
        state.retention_priority,
        state.prefetch_priority,
        state.params,
    )
    access_experts(cache, link, state.counts, needs, state.waiting)
    waits = submit_waiting(cache, link, retention_priority, params, needs, state.waiting)
    for device in range(len(link.time)):
        expert = link.prefetch[device]
        if expert == NONE:
            continue
        keep = should_continue_prefetch(
            cache, retention_priority, prefetch_priority, params[MARGIN], params[SWITCH], device, expert
        )
        if waits > 0 or not keep:
            cancel(cache, link, device)
            waits = submit_waiting(cache, link, retention_priority, params, needs, state.waiting)
        elif link.queued[device] > 0:
            preempt(link, params, device, state.clock[NOW])
    return waits


@kernel
def check_invariants(state: SimState) -> None:
    """Raises `RuntimeError` unless slots, accesses and transfers add up and nothing is pinned. Runs between layers."""
    cache, link, counts, params = state.cache, state.link, state.counts, state.params
    occupied, in_use, partial = 0, 0, 0.0
    for expert in range(len(cache.status)):  # without branches, as this runs after every layer
        occupied += cache.status[expert] != ABSENT
        in_use += cache.pinned[expert]
        partial += (cache.status[expert] == LOADING) * (link.duration[expert] - link.remaining[expert])
    if in_use > 0:
        raise RuntimeError("an expert is pinned between layers")
    if occupied + cache.free_slots.sum() != params[CAPACITY] or cache.free_slots.min() < 0:
        raise RuntimeError("occupied and free slots do not add up to the capacity")
    if counts[HITS] + counts[LATE] + counts[MISSES] != counts[ACCESSES]:
        raise RuntimeError("hits, late hits and misses do not add up to the accesses")
    accounted = link.totals[LANDED] + link.totals[DROPPED] + partial
    if abs(link.totals[MOVED] - accounted) > 1e-6 * max(1.0, accounted):
        raise RuntimeError("moved transfer time is not that of completed, cancelled and current transfers")


@kernel
def run_layer(state: SimState, needs: Ints, compute: float, ahead: float) -> None:
    """Runs a layer from its gate to its end, then the next layer up to its gate.

    Experts compute as they become resident or, without `READY_FIRST`, once no demand load is in transfer.

    Args:
        needs: flat indices of the distinct experts needed, ascending.
        compute: time of all needed experts together, shared equally.
        ahead: time of the next layer up to its gate.

    Raises:
        RuntimeError: an expert would compute that is not resident and pinned, or `check_invariants` fails.
    """
    cache, link, retention_priority, params, clock, waiting = (
        state.cache, state.link, state.retention_priority, state.params, state.clock, state.waiting,
    )  # fmt: skip
    now = clock[NOW]
    waits = demand_load(state, needs)
    uncomputed, taken = len(needs), 0
    if uncomputed == 0:
        now += compute
    while uncomputed > 0:
        landing = next_landing(link)
        if link.ready_count[0] > taken and (params[READY_FIRST] > 0 or landing == np.inf):
            expert = link.ready[taken]
            if cache.status[expert] != RESIDENT or not cache.pinned[expert]:
                raise RuntimeError("an expert computes that is not resident, or not pinned")
            taken += 1
            uncomputed -= 1
            now += compute / len(needs)
            advance_until(state, now)
            cache.pinned[expert] = False
            if waits > 0:
                waits = submit_waiting(cache, link, retention_priority, params, needs, waiting)
        else:
            if landing == np.inf:
                raise RuntimeError("a needed expert is neither resident nor in transfer")
            clock[STALL] += landing - now
            now = landing
            advance_until(state, now)
    now += ahead
    advance_until(state, now)
    clock[NOW] = now
    check_invariants(state)


@kernel
def advance_clock(state: SimState, duration: float) -> None:
    """Advances the clock by compute that needs no expert: a layer up to its gate, or the gap between iterations."""
    state.clock[NOW] += duration
    advance_until(state, state.clock[NOW])


@kernel
def replay_on_demand(  # noqa: PLR0917 - one caller; compiled code takes its inputs as plain arguments
    state: SimState, ranking: Ranking, kind: int, decay: float, ptr: Ints, needs: Ints, next_use: Ints, scales: Scores,
    times: Scores, before_gate: float, gap: float, span: Ints,
) -> None:  # fmt: skip
    """Replays iterations under an on-demand policy in one compiled call.

    Args:
        kind, decay: of the ranking, see `policy.eviction.visit`.
        ptr: `[S * L + 1]`; event `i * L + l` needs `needs[ptr[..]:ptr[.. + 1]]`, flat indices.
        next_use: aligned with `needs` if the ranking knows the future, else empty.
        scales: `[S]`, compute of a layer in units of one token's.
        times: `[S]`, filled in: duration of each iteration, to the end of its last layer.
        before_gate: share of a layer's compute before its gate.
        gap: time from the last layer of an iteration to the first of the next.
        span: the first iteration, and the one after the last.
    """
    layers, experts = ranking.retention_priority.shape
    nothing = np.empty(0, np.int64)
    for step in range(span[0], span[1]):
        begin = state.clock[NOW]
        before = before_gate * scales[step]
        after = scales[step] - before
        advance_clock(state, before)
        for layer in range(layers):
            first, last = ptr[step * layers + layer], ptr[step * layers + layer + 1]
            needed = needs[first:last]
            visit(
                kind,
                decay,
                ranking,
                layer,
                needed - layer * experts,
                next_use[first:last] if len(next_use) else nothing,
            )
            run_layer(state, needed, after, before if layer < layers - 1 else 0.0)
        times[step] = state.clock[NOW] - begin
        if gap > 0:
            advance_clock(state, gap)
