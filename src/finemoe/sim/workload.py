"""What runs when: requests one after another, or several at a time, and what each layer of each iteration needs.

The schedule does not depend on a policy, so one is made per trace and read by every cell.
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


@dataclass(frozen=True, eq=False)
class Schedule:
    """`S` iterations, in each of which `B` or fewer requests take a step; `M` steps altogether.

    Attributes:
        steps: `[S + 1]`; iteration i has the steps `steps[i]` to `steps[i + 1]`.
        request: `[M]`, whose step it is: its place in the trace.
        iteration: `[M]`, which of that request's iterations.
        rows: `[M, 2]`, its token rows in the trace's columns.
        phases: `[M]`.
        ptr: `[S * L + 1]`; layer l of iteration i needs `needs[ptr[i * L + l]:ptr[i * L + l + 1]]`.
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
        """Iterations."""
        return len(self.steps) - 1

    @property
    def tokens(self) -> Ints:
        """`[S]`, token rows of each iteration."""
        sums: Ints = np.add.reduceat(self.rows[:, 1] - self.rows[:, 0], self.steps[:-1])
        return sums


def make_schedule(trace: Trace, requests: Sequence[int], interleave: int = 1, jit: Jit[Any] = interpreted) -> Schedule:
    """Replays `requests` in this order, `interleave` at a time; the next one begins when one has ended."""
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
        if interleave == 1:  # the whole request at once
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


def _column(trace: Trace, name: str) -> Ints:
    column = trace.column(name)
    assert column is not None
    return column.astype(np.int64)


@kernel
def unions(  # noqa: C901 - loops within loops
    steps: Ints, rows: Ints, expert_ids: npt.NDArray[Any], experts: int
) -> tuple[Ints, Ints]:
    """Distinct experts of every layer of every iteration.

    Args:
        steps, rows: as in `Schedule`.
        expert_ids: `[n, L, K]`; ids of `experts` and above are nobody.

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
    """Gate distributions out of the selected experts alone, the mean over tokens; what was not selected is 0.

    Args:
        expert_ids, weights: `[n, L, K]`.
        gates: `[L, E]`, filled.
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


_KEPT = 64  # requests


class TraceView:
    """A trace as policies see it.

    Args:
        recalls: with shares here, lookahead is emulated from the truth, one layer ahead, two, ..: that share of a
            layer's experts is named, the others are replaced by wrong ones. Without any, what was recorded is shown.
        seed: of the emulation.
    """

    def __init__(self, trace: Trace, recalls: Sequence[float] = (), seed: int = 0, jit: Jit[Any] = interpreted) -> None:
        self.trace = trace
        self.recalls = tuple(recalls)
        self._seed = seed
        self._mean_gates = jit(mean_gates)
        self._kept: dict[int, list[npt.NDArray[np.intp]]] = {}  # emulated lookahead by request

    @property
    def fields(self) -> frozenset[str]:
        """What is there beyond ids: of `gates`, `probs`, `embeddings`, `lookahead`."""
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
        """`[B, L, E]`: the distributions of an iteration's steps; `None` if neither they nor weights were recorded."""
        begin, end = schedule.steps[iteration], schedule.steps[iteration + 1]
        return self._gates([(int(a), int(b)) for a, b in schedule.rows[begin:end]])

    def lookahead(self, schedule: Schedule, iteration: int) -> Floats | None:
        """`[B, L, n, E]`: what layer l's hidden states say of layers l + 1 to l + n; zeros past the last layer."""
        begin, end = schedule.steps[iteration], schedule.steps[iteration + 1]
        if self.recalls:
            steps = zip(schedule.request[begin:end], schedule.rows[begin:end], strict=True)
            return np.stack([self._emulated(int(request), int(a), int(b)) for request, (a, b) in steps])
        column = self.trace.column("lookahead")
        if column is None:
            return None
        means = [column[a:b].mean(axis=0, dtype=np.float32) for a, b in schedule.rows[begin:end]]
        return np.ascontiguousarray(np.stack(means).swapaxes(1, 2))

    def steps(self, schedule: Schedule, iteration: int) -> list[Step]:
        """The steps of an iteration, as a policy is told of them."""
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
        """Whole requests, to learn from. Those of a trace without any gate are not worth learning: none come."""
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

    def _gates(self, stretches: Sequence[tuple[int, int]]) -> Floats | None:
        header = self.trace.header
        probs, weights = self.trace.column("probs"), self.trace.column("weights")
        expert_ids = self.trace.column("expert_ids")
        assert expert_ids is not None
        if probs is None and weights is None:
            return None
        gates = np.zeros((len(stretches), header.layers, header.experts), np.float32)
        for i, (a, b) in enumerate(stretches):
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
        ids = np.minimum(request.expert_ids, header.experts)  # sentinels go to the column that is cut off
        executed[iteration[:, None, None], np.arange(header.layers)[None, :, None], ids] = True
        return executed[:, :, : header.experts]

    def _emulated(self, request: int, first: int, last: int) -> Floats:
        """`[L, n, E]`, the mean over tokens."""
        header = self.trace.header
        begin = int(self.trace.row_offsets[request])
        ahead = np.zeros((header.layers, len(self.recalls), header.experts + 1), np.float32)
        for distance, everything in enumerate(self._named(request), 1):
            named = everything[first - begin : last - begin]  # [T, L - distance, K]
            layers = np.arange(header.layers - distance)[None, :, None]
            at = np.broadcast_to(layers, named.shape), np.full(named.shape, distance - 1), named
            np.add.at(ahead, at, 1.0 / (named.shape[0] * named.shape[2]))
        return ahead[:, :, : header.experts]

    def _named(self, request: int) -> list[npt.NDArray[np.intp]]:
        """For each distance, `[n, L - distance, K]`: what a gate of this recall says of layers `distance` on.

        `E` stands for nobody. The same for every policy and budget.
        """
        if request not in self._kept:
            if len(self._kept) == _KEPT:
                self._kept.clear()
            chance = np.random.default_rng((self._seed, request))
            distances = range(1, min(len(self.recalls), self.trace.header.layers - 1) + 1)
            self._kept[request] = [self._mistaken(request, distance, chance) for distance in distances]
        return self._kept[request]

    def _mistaken(self, request: int, distance: int, chance: np.random.Generator) -> npt.NDArray[np.intp]:
        nobody = self.trace.header.experts
        truth = np.minimum(self.trace.request(request).expert_ids[:, distance:], nobody).astype(np.intp)
        rank = chance.random((*truth.shape[:2], nobody + 1), dtype=np.float32)  # who takes the place of one that errs
        right = (chance.random(truth.shape) < self.recalls[distance - 1]) | (truth == nobody)
        np.put_along_axis(rank, truth, -1.0, axis=2)
        rank[:, :, nobody] = -1.0
        wrong = np.argsort(-rank, axis=2)[:, :, : truth.shape[2]]
        wrong[np.take_along_axis(rank, wrong, axis=2) < 0] = nobody  # fewer than K experts are wrong
        return np.where(right, truth, wrong)
