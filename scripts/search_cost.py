"""What a policy's thoughts cost, on one core and with nothing beside them: a full store, and requests of a trace.

python scripts/search_cost.py STORE.trace HELD-OUT.trace --policy finemoe,expert-map --requests 3

The store's trace is learned over and over until the policy's store is as large as it gets (`--rows`: or so large). Then
the other trace's requests are lived through one after another, one token at a time but for prompts, and each event is
timed: an iteration's begin, a layer's gate, and its end. The goal is 200 us a layer.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from finemoe.jit import compiler
from finemoe.policy import Policy, make_policy
from finemoe.sim.workload import TraceView, make_schedule
from finemoe.trace import open_trace
from finemoe.types import Routed

MOST_PASSES = 1000  # over the store's trace; a policy that keeps no more by then is full


def fill(policy: Policy, store: TraceView, rows: int | None) -> int:
    """Learns until nothing more is kept. Returns how many iterations the policy keeps."""
    kept = -1
    for _ in range(MOST_PASSES):
        for recorded in store.recorded(range(len(store.trace))):
            policy.learn(recorded)
            if rows is not None and size(policy) >= rows:
                return size(policy)
        if size(policy) == kept:
            break
        kept = size(policy)
    return size(policy)


def size(policy: Any) -> int:
    store = getattr(policy, "store", policy)
    return int(store.size)


def live(policy: Policy, trace: str, requests: int, jit: Any) -> dict[str, list[float]]:
    """Microseconds of each event of decoding."""
    took: dict[str, list[float]] = {"begin": [], "layer": [], "end": []}

    def timed(name: str, what: Callable[..., None], *arguments: Any) -> None:
        begin_s = time.perf_counter()
        what(*arguments)
        took[name].append(1e6 * (time.perf_counter() - begin_s))

    with open_trace(trace) as held_out:
        schedule = make_schedule(held_out, range(min(requests, len(held_out))), 1, jit)
        evidence, seen = TraceView(held_out, jit=jit), policy.needs | policy.uses
        for iteration in range(len(schedule)):
            gates = evidence.gates(schedule, iteration) if "gates" in seen else None
            ahead = evidence.lookahead(schedule, iteration) if "lookahead" in seen else None
            timed("begin", policy.begin, evidence.steps(schedule, iteration))
            for layer in range(schedule.layers):
                event = iteration * schedule.layers + layer
                needed = schedule.needs[schedule.ptr[event] : schedule.ptr[event + 1]] - layer * schedule.experts
                own = None if gates is None else gates[:, layer], None if ahead is None else ahead[:, layer]
                timed("layer", policy.routed, Routed(layer, needed, *own, evidence.active))
            timed("end", policy.end)
            if schedule.tokens[iteration] > 1:  # a prompt
                for name, count in (("begin", 1), ("layer", schedule.layers), ("end", 1)):
                    del took[name][-count:]
    return took


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("store")
    parser.add_argument("trace")
    parser.add_argument("--policy", default="finemoe,expert-map")
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--rows", type=int, help="stop learning at so many (default: what the store holds)")
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    jit = compiler()
    print(f"{'':14s}{'rows':>8s}{'MiB':>8s}{'begin us':>18s}{'layer us':>18s}{'end us':>18s}   mean (95th percentile)")
    for name in given.policy.split(","):
        with open_trace(given.store) as trace:
            header, store = trace.header, TraceView(trace, jit=jit)
            policy = make_policy(name, header.layers, header.experts, jit=jit)
            before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            rows = fill(policy, store, given.rows)
        live(policy, given.trace, 1, jit)  # so that everything is compiled
        took = live(policy, given.trace, given.requests, jit)
        grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024
        figures = [f"{np.mean(each):.0f} ({np.percentile(each, 95):.0f})" for each in took.values()]
        print(f"{name:14s}{rows:8d}{grown_mib:8.0f}" + "".join(f"{figure:>18s}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
