"""How much a better prediction could save: the policy `finemoe` replayed with parts of the future told to it.

python scripts/what_if_known.py TRACE --expert-memory 0.25 --link-ratio 1 4 --requests 6

What the running token needs, or the next one, or those after it, is told as certain; everything else is predicted as
always. Requests are held back from the store's share of the trace, never from its test share. The clock is the study's:
a layer waits for all its experts, a prefetch gives way at any time.
"""

from __future__ import annotations

import argparse

import numpy as np

from finemoe.jit import compiler
from finemoe.policy.finemoe.policy import FinemoePolicy
from finemoe.sim.hardware import Machine
from finemoe.sim.simulator import Replay
from finemoe.sim.workload import Schedule, TraceView, make_schedule
from finemoe.trace import open_trace, split

TOLD: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (0, 1), (2, 3, 4, 5), (0, 1, 2, 3, 4, 5))


class Told(FinemoePolicy):
    """Knows what the iterations at these distances (0: the running one) need."""

    def tell(self, schedule: Schedule, distances: tuple[int, ...]) -> None:
        self._distances, self._schedule, self._iteration = distances, schedule, -1
        flat = np.zeros((len(schedule), self.layers * self.experts))
        iteration = np.repeat(np.arange(len(schedule)), np.diff(schedule.ptr[:: self.layers]))
        flat[iteration, schedule.needs] = 1.0
        self._needs = flat.reshape(len(schedule), self.layers, self.experts)

    def begin(self, steps: object) -> None:
        self._iteration += 1
        super().begin(steps)  # type: ignore[arg-type] # handed on

    def _update_scores(self, now: int) -> None:
        chances = next(iter(self._running.values())).search.probabilities
        for distance in self._distances:
            later = self._iteration + distance
            if later < len(self._needs) and self._schedule.request[later] == self._schedule.request[self._iteration]:
                first = now + 1 if distance == 0 else 0
                chances[distance, first:] = self._needs[later, first:]
        super()._update_scores(now)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--expert-memory", type=float, default=0.25)
    parser.add_argument("--link-ratio", type=float, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--requests", type=int, default=6)
    arguments = parser.parse_args()
    jit = compiler()
    trace = open_trace(arguments.trace)
    kept, _ = split(len(trace), 0.7, 0)
    learned, held = kept[: len(kept) * 4 // 5], kept[len(kept) * 4 // 5 :]
    evidence = TraceView(trace, jit=jit)
    schedule = make_schedule(trace, held[: arguments.requests].tolist(), 1, jit)
    layers, experts = trace.header.layers, trace.header.experts
    print("| told | " + " | ".join(f"r = {ratio:g}" for ratio in arguments.link_ratio) + " |")
    print("|---|" + "---:|" * len(arguments.link_ratio))
    for told in TOLD:
        cells = []
        for ratio in arguments.link_ratio:
            policy = Told(layers, experts, jit=jit)
            policy.tell(schedule, told)
            for recorded in evidence.recorded(learned.tolist()):
                policy.learn(recorded)
            machine = Machine(int(arguments.expert_memory * layers * experts), ratio, chunks=0, ready_first=False)
            outcome = Replay(schedule, evidence, policy, machine, jit).run()
            cells.append(f"{outcome.total / outcome.iterations / layers:.3f}")
        name = ", ".join("this token" if d == 0 else f"t+{d}" for d in told) or "nothing"
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
