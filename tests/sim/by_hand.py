"""Schedules, traces and policies written out in a test, whose results are computed by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finemoe.policy import Policy
from finemoe.policy.lru_lfu import RECENCY, make_ranking, visit
from finemoe.sim.hardware import Machine
from finemoe.sim.simulator import Outcome, Simulation
from finemoe.sim.workload import Floats, Schedule, TraceView
from finemoe.trace import RequestTrace, Trace, TraceHeader, TraceWriter, open_trace
from finemoe.types import Routed, Step

Needs = Sequence[Sequence[Sequence[int]]]  # by iteration and layer: experts
Priorities = Mapping[int, Mapping[tuple[int, int], float]]
NONE: tuple[int, ...] = ()


def schedule(needs: Needs, experts: int, tokens: Sequence[int] | None = None) -> Schedule:
    """A schedule of one request; one token per iteration unless `tokens` is given."""
    layers, iterations = len(needs[0]), len(needs)
    events = [[layer * experts + e for e in need] for iteration in needs for layer, need in enumerate(iteration)]
    ends = np.cumsum(tokens or [1] * iterations)
    return Schedule(
        layers=layers,
        experts=experts,
        steps=np.arange(iterations + 1),
        request=np.zeros(iterations, np.int64),
        iteration=np.arange(iterations),
        rows=np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1).astype(np.int64),
        phases=np.ones(iterations, np.uint8),
        ptr=np.cumsum([0, *map(len, events)]).astype(np.int64),
        needs=np.array([expert for event in events for expert in event], np.int64),
    )


class NeedsOnly(TraceView):
    """A view without gates, lookahead or steps."""

    def __init__(self) -> None:
        """Needs no trace."""

    @property
    def active(self) -> int:
        return 1

    def gates(self, schedule: Schedule, iteration: int) -> Floats | None:
        return None

    def lookahead(self, schedule: Schedule, iteration: int) -> Floats | None:
        return None

    def steps(self, schedule: Schedule, iteration: int) -> list[Step]:
        return []


class ScriptedPolicy(Policy):
    """LRU with prescribed prefetch priorities.

    Args:
        priorities: from event `i` on (-1: from the beginning), the only priorities above 0, by layer and expert.
    """

    prefetches = True

    def __init__(self, layers: int, experts: int, priorities: Priorities) -> None:
        super().__init__(layers, experts)
        self.ranking = make_ranking(layers, experts, -1.0)
        self.retention_priority = self.ranking.retention_priority
        self.priorities = priorities
        self.event = -1

    def begin(self, steps: Sequence[Step]) -> None:
        if self.event == -1:
            self._next()

    def routed(self, event: Routed) -> None:
        visit(RECENCY, 1.0, self.ranking, event.layer, np.asarray(event.experts, np.int64), np.empty(0, np.int64))
        self._next()

    def _next(self) -> None:
        if self.event in self.priorities:
            self.prefetch_priority[:] = 0.0
            for expert, prefetch_priority in self.priorities[self.event].items():
                self.prefetch_priority[expert] = prefetch_priority
        self.event += 1


def simulate(plan: Schedule, policy: Policy, capacity: int, link_ratio: float, **machine: Any) -> Outcome:
    """Simulates a schedule with a log of all actions."""
    return Simulation(plan, NeedsOnly(), policy, Machine(capacity, link_ratio, **machine), log=1000).run()


def write_trace(path: Path, requests: Iterable[RequestTrace], **header: Any) -> Trace:
    """A trace of these requests, with their sizes unless `header` overrides them."""
    made = list(requests)
    _, layers, active = made[0].expert_ids.shape
    present = tuple(
        name for name in ("weights", "probs", "embeddings", "lookahead") if getattr(made[0], name) is not None
    )
    sizes = {"model": "by-hand", "layers": layers, "experts": 8, "active": active, "fields": present} | header
    with TraceWriter(path, TraceHeader(**sizes)) as writer:
        for request in made:
            writer.add(request)
    return open_trace(path)


def request(
    expert_ids: Any, counts: Sequence[int] | None = None, *, first_token: int = 0, **fields: Any
) -> RequestTrace:
    """A request of these experts `[n, L, K]`.

    Args:
        counts: token rows of each iteration; one each by default. A first one of several tokens is a prompt.
        first_token: first of its consecutive token ids.
        fields: optional columns.
    """
    ids = np.asarray(expert_ids, np.uint8)
    counts = counts or [1] * len(ids)
    return RequestTrace(
        phases=np.array([int(count == 1) for count in counts], np.uint8),
        rows=np.concatenate([[0], np.cumsum(counts)]),
        token_ids=np.arange(first_token, first_token + len(ids), dtype=np.int32),
        expert_ids=ids,
        **fields,
    )
