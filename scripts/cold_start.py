"""How soon a policy that learns pays: requests of a trace one after another, from an empty store.

python scripts/cold_start.py TRACE --policy lru,expert-map,finemoe --expert-memory 0.25 --link-ratio 1 --requests 80

Every request begins with an empty pool, so that what is seen is what the policy knows, not what happens to be resident.
Prints hit rate and time per layer of blocks of requests: the 1st, the 2nd, the 3rd and 4th, the 5th to 8th, and so on,
that the policy meets.
"""

from __future__ import annotations

import argparse
from itertools import pairwise

import numpy as np

from finemoe.jit import compiler
from finemoe.policy import make_policy, policy_class
from finemoe.sim.hardware import Machine
from finemoe.sim.simulator import Replay
from finemoe.sim.workload import TraceView, make_schedule
from finemoe.trace import open_trace


def blocks(requests: int) -> list[int]:
    """Where blocks begin, and the end: 0, 1, 2, 4, 8, .."""
    bounds = [0]
    while bounds[-1] < requests:
        bounds.append(min(requests, max(1, 2 * bounds[-1])))
    return bounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--policy", default="lru,expert-map,finemoe")
    parser.add_argument("--expert-memory", type=float, default=0.25, help="share of all routed experts")
    parser.add_argument("--link-ratio", type=float, default=1.0)
    parser.add_argument("--requests", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0, help="of the requests' order")
    arguments = parser.parse_args()
    jit = compiler()
    with open_trace(arguments.trace) as trace:
        header, evidence = trace.header, TraceView(trace, jit=jit)
        order = np.random.default_rng(arguments.seed).permutation(len(trace))[: arguments.requests]
        bounds = blocks(len(order))
        machine = Machine(int(arguments.expert_memory * header.layers * header.experts + 1e-9), arguments.link_ratio)
        print(f"{'policy':20s}" + "".join(f"{f'{a + 1}-{b}':>16s}" for a, b in pairwise(bounds)))
        for name in arguments.policy.split(","):
            options = {"jit": jit} if policy_class(name).compiles else {}
            policy = make_policy(name, header.layers, header.experts, **options)
            line = f"{name:20s}"
            for first, last in pairwise(bounds):
                hits, accesses, total, layers = 0, 0, 0.0, 0
                for index in order[first:last]:
                    done = Replay(make_schedule(trace, [int(index)], 1, jit), evidence, policy, machine, jit).run()
                    hits, accesses = hits + done.hits, accesses + done.hits + done.late + done.misses
                    total, layers = total + done.total, layers + done.iterations * done.layers
                line += f"{hits / accesses:9.1%} {total / layers:6.3f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
