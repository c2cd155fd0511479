"""What runs when: requests one after another, or several at a time, and what each layer of each iteration needs.

The schedule does not depend on a policy, so one is made per trace and read by every cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.policy.kernel import Jit, interpreted, kernel
from finemoe.sim.link import Ints
from finemoe.trace import Trace

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
