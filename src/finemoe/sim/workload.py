"""The workload of a simulation: the schedule of iterations, and what a policy may observe of the trace.

A schedule does not depend on the policy, so all cells of a sweep share one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.jit import Jit, interpreted, kernel
from finemoe.sim.link_kernel import Ints
from finemoe.trace import RequestTrace, Trace
from finemoe.types import Recorded, Step

Floats = npt.NDArray[np.float32]

_MOST_CACHED = 64  # requests with emulated lookahead


@dataclass(frozen=True, eq=False)
class Schedule:
    """`S` iterations, in each of which at most `B` requests take a step; `M` steps in all.

    Attributes:
        steps: `[S + 1]`; iteration `i` has the steps `steps[i]` up to `steps[i + 1]`.
        request: `[M]`, index in the trace of the request that takes the step.
        iteration: `[M]`, index among that request's iterations.
        rows: `[M, 2]`, first and last + 1 of its token rows in the trace's columns.
        phases: `[M]`, `PREFILL` or `DECODE`.
        ptr: `[S * L + 1]`; layer `l` of iteration `i` needs `needs[ptr[i * L + l]:ptr[i * L + l + 1]]`.
        needs: flat indices `l * E + e`, ascending within a layer.
    """

    layers: int
    experts: int
    steps: Ints
    request: Ints
    iteration: Ints
    rows: Ints
    phases: npt.NDArray[np.uint8]
    ptr: Ints
    needs: Ints

    def __len__(self) -> int:
        """The number of iterations."""
        return len(self.steps) - 1

    @property
    def tokens(self) -> Ints:
        """`[S]`, token rows of each iteration."""
        sums: Ints = np.add.reduceat(self.rows[:, 1] - self.rows[:, 0], self.steps[:-1])
        return sums


def make_schedule(trace: Trace, requests: Sequence[int], interleave: int = 1, jit: Jit[Any] = interpreted) -> Schedule:
    """Schedules `requests` in this order, `interleave` at a time; the next one starts when one has ended."""
    iterations = _column(trace, "iterations")
    first_iteration = np.concatenate([[0], np.cumsum(iterations)])
    row_counts = _column(trace, "rows")
    first_row = np.concatenate([[0], np.cumsum(row_counts)])
    phases = trace.column("phases")
    assert phases is not None
    queue = list(requests)
    running: list[list[int]] = []  # [request, iteration]
    members: list[tuple[int, int]] = []
    steps = [0]
    while queue or running:
        while queue and len(running) < interleave:
            running.append([queue.pop(0), 0])
        if interleave == 1:  # all iterations of a request at once
            request, _ = running.pop()
            members += [(request, i) for i in range(int(iterations[request]))]
            steps += range(steps[-1] + 1, len(members) + 1)
            continue
        members += [(request, iteration) for request, iteration in running]
        steps.append(len(members))
        running = [[r, i + 1] for r, i in running if i + 1 < iterations[r]]
    table = np.array(members, np.int64).reshape(-1, 2)
    absolute = first_iteration[table[:, 0]] + table[:, 1]
    rows = np.stack([first_row[absolute], first_row[absolute + 1]], axis=1)
    expert_ids = trace.column("expert_ids")
    assert expert_ids is not None
    header = trace.header
    ptr, needs = jit(unions)(np.asarray(steps, np.int64), rows, expert_ids, header.experts)
    return Schedule(
        layers=header.layers, experts=header.experts, steps=np.asarray(steps, np.int64), request=table[:, 0].copy(),
        iteration=table[:, 1].copy(), rows=rows, phases=np.asarray(phases[absolute]), ptr=ptr, needs=needs,
    )  # fmt: skip


class TraceView:
    """What a policy may observe of a trace: steps, gates and lookahead.

    Args:
        recalls: recall of emulated lookahead, one layer ahead, two, ...: this share of a layer's true experts is
            predicted, the rest are replaced by wrong ones. Empty: recorded lookahead.
        seed: of the emulation.
    """

    def __init__(self, trace: Trace, recalls: Sequence[float] = (), seed: int = 0, jit: Jit[Any] = interpreted) -> None:
        self.trace = trace
        self.recalls = tuple(recalls)
        self._seed = seed
        self._mean_gates = jit(mean_gates)
        self._emulated_ids: dict[int, list[npt.NDArray[np.intp]]] = {}  # of emulated lookahead, by request

    @property
    def fields(self) -> frozenset[str]:
        """What can be observed beyond expert ids: of `gates`, `probs`, `embeddings`, `lookahead`."""
        recorded = set(self.trace.header.fields)
        if recorded & {"probs", "weights"}:
            recorded.add("gates")
        if self.recalls:
            recorded.add("lookahead")
        return frozenset(recorded & {"gates", "probs", "embeddings", "lookahead"})

    @property
    def active(self) -> int:
        """`K`."""
        return self.trace.header.active

    def gates(self, schedule: Schedule, iteration: int) -> Floats | None:
        """Gate distributions `[B, L, E]` of an iteration's steps; `None` if neither they nor weights were recorded."""
        begin, end = schedule.steps[iteration], schedule.steps[iteration + 1]
        return self._gates([(int(a), int(b)) for a, b in schedule.rows[begin:end]])

    def lookahead(self, schedule: Schedule, iteration: int) -> Floats | None:
        """`[B, L, n, E]`: gates of layers `l + 1` to `l + n`, applied to layer `l`'s state; 0 past the last layer."""
        begin, end = schedule.steps[iteration], schedule.steps[iteration + 1]
        if self.recalls:
            steps = zip(schedule.request[begin:end], schedule.rows[begin:end], strict=True)
            return np.stack([self._emulated_lookahead(int(request), int(a), int(b)) for request, (a, b) in steps])
        column = self.trace.column("lookahead")
        if column is None:
            return None
        means = [column[a:b].mean(axis=0, dtype=np.float32) for a, b in schedule.rows[begin:end]]
        return np.ascontiguousarray(np.stack(means).swapaxes(1, 2))

    def steps(self, schedule: Schedule, iteration: int) -> list[Step]:
        """The steps of an iteration, as passed to a policy's `begin`."""
        begin, end = schedule.steps[iteration], schedule.steps[iteration + 1]
        token_ids, embeddings = self.trace.column("token_ids"), self.trace.column("embeddings")
        assert token_ids is not None
        found = []
        for step in range(begin, end):
            request, (first, last) = int(schedule.request[step]), schedule.rows[step]
            embedding = None
            if embeddings is not None:
                place = int(self.trace.iteration_offsets[request] + schedule.iteration[step])
                embedding = embeddings[place].astype(np.float32)
            found.append(Step(request, int(schedule.phases[step]), token_ids[first:last], embedding))
        return found

    def recorded(self, requests: Sequence[int]) -> Iterator[Recorded]:
        """Requests to learn from; none if the trace has no gates."""
        for index in requests:
            request = self.trace.request(int(index))
            gates = self._gates_of(request)
            if gates is not None:
                yield Recorded(
                    phases=request.phases,
                    token_ids=request.token_ids[request.rows[1:] - 1],
                    gates=gates,
                    executed=self._executed(request),
                    embeddings=None if request.embeddings is None else request.embeddings.astype(np.float32),
                )

    def _gates(self, row_ranges: Sequence[tuple[int, int]]) -> Floats | None:
        header = self.trace.header
        probs, weights = self.trace.column("probs"), self.trace.column("weights")
        expert_ids = self.trace.column("expert_ids")
        assert expert_ids is not None
        if probs is None and weights is None:
            return None
        gates = np.zeros((len(row_ranges), header.layers, header.experts), np.float32)
        for i, (a, b) in enumerate(row_ranges):
            if probs is not None:
                gates[i] = probs[a:b].mean(axis=0, dtype=np.float32)
            else:
                assert weights is not None
                self._mean_gates(expert_ids[a:b], weights[a:b].astype(np.float32), gates[i])
        return gates

    def _gates_of(self, request: RequestTrace) -> Floats | None:
        header = self.trace.header
        shape = (len(request), header.layers, header.experts)
        if request.probs is not None:
            if len(request.token_ids) == len(request):
                return request.probs.astype(np.float32)
            counts = np.diff(request.rows)[:, None, None]
            sums: Floats = np.add.reduceat(request.probs.astype(np.float32), request.rows[:-1], axis=0)
            means: Floats = np.divide(sums, counts, dtype=np.float32)
            return means
        if request.weights is None:
            return None
        gates, weights = np.zeros(shape, np.float32), request.weights.astype(np.float32)
        for i, (a, b) in enumerate(zip(request.rows[:-1], request.rows[1:], strict=True)):
            self._mean_gates(request.expert_ids[a:b], weights[a:b], gates[i])
        return gates

    def _executed(self, request: RequestTrace) -> npt.NDArray[np.bool_]:
        header = self.trace.header
        executed = np.zeros((len(request), header.layers, header.experts + 1), np.bool_)
        iteration = np.repeat(np.arange(len(request)), np.diff(request.rows))
        ids = np.minimum(request.expert_ids, header.experts)  # sentinels go to the last column, which is dropped
        executed[iteration[:, None, None], np.arange(header.layers)[None, :, None], ids] = True
        return executed[:, :, : header.experts]

    def _emulated_lookahead(self, request: int, first: int, last: int) -> Floats:
        """Emulated lookahead `[L, n, E]`, the mean over tokens."""
        header = self.trace.header
        begin = int(self.trace.row_offsets[request])
        ahead = np.zeros((header.layers, len(self.recalls), header.experts + 1), np.float32)
        for distance, all_ids in enumerate(self._predicted_ids(request), 1):
            predicted = all_ids[first - begin : last - begin]  # [T, L - distance, K]
            layers = np.arange(header.layers - distance)[None, :, None]
            at = np.broadcast_to(layers, predicted.shape), np.full(predicted.shape, distance - 1), predicted
            np.add.at(ahead, at, 1.0 / (predicted.shape[0] * predicted.shape[2]))
        return ahead[:, :, : header.experts]

    def _predicted_ids(self, request: int) -> list[npt.NDArray[np.intp]]:
        """For each distance, `[n, L - distance, K]`: the predicted experts of layers `distance` and later.

        `E` stands for no expert. The prediction is the same for every policy and budget.
        """
        if request not in self._emulated_ids:
            if len(self._emulated_ids) == _MOST_CACHED:
                self._emulated_ids.clear()
            random = np.random.default_rng((self._seed, request))
            distances = range(1, min(len(self.recalls), self.trace.header.layers - 1) + 1)
            self._emulated_ids[request] = [self._with_errors(request, distance, random) for distance in distances]
        return self._emulated_ids[request]

    def _with_errors(self, request: int, distance: int, random: np.random.Generator) -> npt.NDArray[np.intp]:
        no_expert = self.trace.header.experts
        truth = np.minimum(self.trace.request(request).expert_ids[:, distance:], no_expert).astype(np.intp)
        rank = random.random((*truth.shape[:2], no_expert + 1), dtype=np.float32)  # of replacements for missed experts
        right = (random.random(truth.shape) < self.recalls[distance - 1]) | (truth == no_expert)
        np.put_along_axis(rank, truth, -1.0, axis=2)
        rank[:, :, no_expert] = -1.0
        wrong = np.argsort(-rank, axis=2)[:, :, : truth.shape[2]]
        wrong[np.take_along_axis(rank, wrong, axis=2) < 0] = no_expert  # fewer than K wrong experts exist
        return np.where(right, truth, wrong)


def _column(trace: Trace, name: str) -> Ints:
    column = trace.column(name)
    assert column is not None
    return column.astype(np.int64)


@kernel
def unions(  # noqa: C901 - nested loops
    steps: Ints, rows: Ints, expert_ids: npt.NDArray[Any], experts: int
) -> tuple[Ints, Ints]:
    """The distinct experts that every layer of every iteration needs.

    Args:
        steps, rows: as in `Schedule`.
        expert_ids: `[n, L, K]`; ids of `experts` and above are sentinels for no expert.

    Returns:
        `ptr` and `needs` as in `Schedule`.
    """
    layers, active = expert_ids.shape[1], expert_ids.shape[2]
    iterations = len(steps) - 1
    most = 0
    for i in range(iterations):
        tokens = 0
        for step in range(steps[i], steps[i + 1]):
            tokens += rows[step, 1] - rows[step, 0]
        most += layers * min(experts, tokens * active)
    ptr = np.zeros(iterations * layers + 1, np.int64)
    needs = np.empty(most, np.int64)
    mark = np.zeros(experts, np.bool_)
    count = 0
    for i in range(iterations):
        for layer in range(layers):
            mark[:] = False
            for step in range(steps[i], steps[i + 1]):
                for row in range(rows[step, 0], rows[step, 1]):
                    for k in range(active):
                        expert = int(expert_ids[row, layer, k])
                        if expert < experts:
                            mark[expert] = True
            for expert in range(experts):
                if mark[expert]:
                    needs[count] = layer * experts + expert
                    count += 1
            ptr[i * layers + layer + 1] = count
    return ptr, needs[:count].copy()


@kernel
def mean_gates(expert_ids: npt.NDArray[np.uint8], weights: npt.NDArray[Any], gates: Floats) -> None:
    """Gate distributions from the selected experts' weights, the mean over tokens; 0 for experts not selected.

    Args:
        expert_ids, weights: `[n, L, K]`.
        gates: `[L, E]`, filled in.
    """
    gates[:] = 0.0
    experts = gates.shape[1]
    for row in range(expert_ids.shape[0]):
        for layer in range(expert_ids.shape[1]):
            total = np.float32(0.0)
            for k in range(expert_ids.shape[2]):
                if expert_ids[row, layer, k] < experts:
                    total += np.float32(weights[row, layer, k])
            if total <= 0.0:
                continue
            for k in range(expert_ids.shape[2]):
                expert = int(expert_ids[row, layer, k])
                if expert < experts:
                    gates[layer, expert] += np.float32(weights[row, layer, k]) / total / expert_ids.shape[0]
