"""One layer under the virtual clock: book what it needs, move, compute ready first. Kernels.

The plain twin of this is the engine itself, driven by a link that a test controls (tests/sim/test_agreement.py).
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
from finemoe.policy.eviction import Ranking, visit
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
    Wire,
    World,
    cancel,
    elapse,
    enqueue,
    fetch,
    next_landing,
    preempt,
)

Flags = npt.NDArray[np.bool_]


@kernel
def fill(cache: CacheState, wire: Wire, retention_priority: Scores, rules: Scores, needs: Ints, waiting: Flags) -> int:
    """Begins the fetches that wait for a slot, in order. Returns how many go on waiting."""
    stuck = 0
    for i in range(len(needs)):
        if waiting[i]:
            if fetch(cache, wire, retention_priority, rules, needs[i]):
                waiting[i] = False
            else:
                stuck += 1
    return stuck


@kernel
def book_needs(cache: CacheState, wire: Wire, counts: Ints, needs: Ints, waiting: Flags) -> None:
    """Pins what a layer needs, and tells hits, late hits and misses apart. A prefetch that is needed becomes urgent."""
    wire.readied[0] = 0
    for i in range(len(needs)):
        expert = needs[i]
        waiting[i] = False
        status = access(cache, expert)
        if status == RESIDENT:
            counts[HITS] += 1
            wire.ready[wire.readied[0]] = expert
            wire.readied[0] += 1
        elif status == LOADING:
            counts[LATE] += 1
            wire.prefetch[cache.device[expert]] = NONE
            enqueue(wire, cache.device[expert], expert)
        else:
            counts[MISSES] += 1
            waiting[i] = True
    counts[ACCESSES] += len(needs)


@kernel
def route(world: World, needs: Ints) -> int:
    """The gate has spoken: books the needs and sends for what is missing.

    A prefetch that is not wanted any more, or whose slot is needed, is withdrawn; any other waits until nothing urgent
    is left.

    Returns:
        How many needed experts wait for a slot.
    """
    cache, wire, retention_priority, prefetch_priority, rules = (
        world.cache,
        world.wire,
        world.retention_priority,
        world.prefetch_priority,
        world.rules,
    )
    book_needs(cache, wire, world.counts, needs, world.waiting)
    stuck = fill(cache, wire, retention_priority, rules, needs, world.waiting)
    for device in range(len(wire.time)):
        expert = wire.prefetch[device]
        if expert == NONE:
            continue
        wanted = should_continue_prefetch(
            cache, retention_priority, prefetch_priority, rules[MARGIN], rules[SWITCH], device, expert
        )
        if stuck > 0 or not wanted:
            cancel(cache, wire, device)
            stuck = fill(cache, wire, retention_priority, rules, needs, world.waiting)
        elif wire.queued[device] > 0:
            preempt(wire, rules, device, world.clock[NOW])
    return stuck


@kernel
def check_laws(world: World) -> None:
    """Raises if an expert, a slot, an access or a byte was lost or made up. Between layers, when nothing is in use."""
    cache, wire, counts, rules = world.cache, world.wire, world.counts, world.rules
    occupied, in_use, partial = 0, 0, 0.0
    for expert in range(len(cache.status)):  # without branches: this runs after every layer
        occupied += cache.status[expert] != ABSENT
        in_use += cache.pinned[expert]
        partial += (cache.status[expert] == LOADING) * (wire.takes[expert] - wire.left[expert])
    if in_use > 0:
        raise RuntimeError("an expert is in use although no layer runs")
    if occupied + cache.free_slots.sum() != rules[CAPACITY] or cache.free_slots.min() < 0:
        raise RuntimeError("slots were lost or made up")
    if counts[HITS] + counts[LATE] + counts[MISSES] != counts[ACCESSES]:
        raise RuntimeError("hits, late hits and misses are not all accesses")
    accounted = wire.sums[LANDED] + wire.sums[DROPPED] + partial
    if abs(wire.sums[MOVED] - accounted) > 1e-6 * max(1.0, accounted):
        raise RuntimeError("bytes moved are not bytes that came")


@kernel
def serve(world: World, needs: Ints, compute: float, ahead: float) -> None:
    """Runs a layer from its gate to its end, then `ahead` more: the next layer up to its gate.

    Experts compute as they become ready, or, by the rules, all after the last has come (where they fit).

    Args:
        needs: flat indices of the distinct experts needed, ascending.
        compute: time that all of them take together, shared equally.

    Raises:
        RuntimeError: an expert would run that is not there, or a law of `check_laws` is broken.
    """
    cache, wire, retention_priority, rules, clock, waiting = (
        world.cache, world.wire, world.retention_priority, world.rules, world.clock, world.waiting,
    )  # fmt: skip
    now = clock[NOW]
    stuck = route(world, needs)
    undone, taken = len(needs), 0
    if undone == 0:
        now += compute
    while undone > 0:
        landing = next_landing(wire)
        if wire.readied[0] > taken and (rules[READY_FIRST] > 0 or landing == np.inf):
            expert = wire.ready[taken]
            if cache.status[expert] != RESIDENT or not cache.pinned[expert]:
                raise RuntimeError("an expert runs that is not there, or could be evicted")
            taken += 1
            undone -= 1
            now += compute / len(needs)
            elapse(world, now)
            cache.pinned[expert] = False
            if stuck > 0:
                stuck = fill(cache, wire, retention_priority, rules, needs, waiting)
        else:
            if landing == np.inf:
                raise RuntimeError("a needed expert will never come")
            clock[STALL] += landing - now
            now = landing
            elapse(world, now)
    now += ahead
    elapse(world, now)
    clock[NOW] = now
    check_laws(world)


@kernel
def pass_time(world: World, duration: float) -> None:
    """Computes what needs no expert: a layer up to its gate, or what is outside of layers."""
    world.clock[NOW] += duration
    elapse(world, world.clock[NOW])


@kernel
def replay_ranked(  # noqa: PLR0917 - called in one place, with all that compiled code can't look up for itself
    world: World, ranking: Ranking, kind: int, decay: float, ptr: Ints, needs: Ints, next_use: Ints, scales: Scores,
    times: Scores, before_gate: float, gap: float, span: Ints,
) -> None:  # fmt: skip
    """Replays iterations under an on-demand policy, without leaving compiled code.

    Args:
        ptr: `[S * L + 1]`; event `i * L + l` needs `needs[ptr[..]:ptr[.. + 1]]`, flat indices.
        next_use: aligned with `needs` where the ranking looks ahead, else empty.
        scales: `[S]`, compute of a layer in units of one token's.
        times: `[S]`, filled with how long each iteration took, up to the end of its last layer.
        before_gate: share of a layer's compute before its gate.
        gap: time from there to the next iteration.
        span: first iteration, the one after the last.
    """
    layers, experts = ranking.retention_priority.shape
    nothing = np.empty(0, np.int64)
    for step in range(span[0], span[1]):
        begin = world.clock[NOW]
        before = before_gate * scales[step]
        after = scales[step] - before
        pass_time(world, before)
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
            serve(world, needed, after, before if layer < layers - 1 else 0.0)
        times[step] = world.clock[NOW] - begin
        if gap > 0:
            pass_time(world, gap)
