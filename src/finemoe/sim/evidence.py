"""What a trace lets a policy see: gate distributions, embeddings, lookahead; and what it may learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.policy.kernel import Jit, interpreted
from finemoe.sim.schedule import Floats, Schedule, mean_gates
from finemoe.trace import RequestTrace, Trace
from finemoe.types import Recorded, Step

_KEPT = 64  # requests


class Evidence:
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
