"""Schedules, traces and policies that a test writes down itself, so that what must come out is known by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finemoe.policy import Policy
from finemoe.policy.eviction import RECENCY, make_ranking, visit
from finemoe.sim.hardware import Machine
from finemoe.sim.simulator import Outcome, Replay
from finemoe.sim.workload import Floats, Schedule, TraceView
from finemoe.trace import RequestTrace, Trace, TraceHeader, TraceWriter, open_trace
from finemoe.types import Routed, Step

Needs = Sequence[Sequence[Sequence[int]]]  # of each iteration, of each layer: experts
Wants = Mapping[int, Mapping[tuple[int, int], float]]
NONE: tuple[int, ...] = ()


def schedule(needs: Needs, experts: int, tokens: Sequence[int] | None = None) -> Schedule:
    """One request; an iteration has one token unless `tokens` says otherwise."""
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


class Blind(TraceView):
    """Nothing but needs can be seen."""

    def __init__(self) -> None:
        """There is no trace."""

    @property
    def active(self) -> int:
        return 1

    def gates(self, schedule: Schedule, iteration: int) -> Floats | None:
        return None

    def lookahead(self, schedule: Schedule, iteration: int) -> Floats | None:
        return None

    def steps(self, schedule: Schedule, iteration: int) -> list[Step]:
        return []


class Script(Policy):
    """LRU that prefetches what it is told to.

    Args:
        wants: from event i on (-1: from the very beginning) these experts are wanted and no others: how much, by layer
            and expert.
    """

    prefetches = True

    def __init__(self, layers: int, experts: int, wants: Wants) -> None:
        super().__init__(layers, experts)
        self.ranking = make_ranking(layers, experts, -1.0)
        self.retention_priority = self.ranking.retention_priority
        self.wants = wants
        self.event = -1

    def begin(self, steps: Sequence[Step]) -> None:
        if self.event == -1:
            self._next()

    def routed(self, event: Routed) -> None:
        visit(RECENCY, 1.0, self.ranking, event.layer, np.asarray(event.experts, np.int64), np.empty(0, np.int64))
        self._next()

    def _next(self) -> None:
        if self.event in self.wants:
            self.prefetch_priority[:] = 0.0
            for expert, prefetch_priority in self.wants[self.event].items():
                self.prefetch_priority[expert] = prefetch_priority
        self.event += 1


def play(plan: Schedule, policy: Policy, capacity: int, link_ratio: float, **machine: Any) -> Outcome:
    """The outcome, with the log of all actions."""
    return Replay(plan, Blind(), policy, Machine(capacity, link_ratio, **machine), log=1000).run()


def write_trace(path: Path, requests: Iterable[RequestTrace], **header: Any) -> Trace:
    """A trace of these requests; the header's sizes are theirs unless told otherwise."""
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
        first_token: its token ids count up from here.
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
