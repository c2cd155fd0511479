"""What a policy expects of a request, layer by layer, against what the request then needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.errors import ConfigError
from finemoe.policy import Policy
from finemoe.policy.kernel import Jit, interpreted
from finemoe.sim.evidence import Evidence
from finemoe.sim.schedule import make_schedule
from finemoe.trace import Trace
from finemoe.types import DECODE, Routed


@dataclass(frozen=True)
class Guess:
    """Of a request of `I` iterations.

    Attributes:
        expected: `[I, L, E]`, the chance of each expert by what was known just before its layer's gate.
        needed: `[I, L, E]`, whether the layer then needed it.
        phases: `[I]`.
    """

    expected: npt.NDArray[np.float32]
    needed: npt.NDArray[np.bool_]
    phases: npt.NDArray[np.uint8]

    def chosen(self, iteration: int | None) -> npt.NDArray[np.bool_]:
        """`[I]`: one iteration; or all that decode, or if none does, all."""
        if iteration is not None:
            return np.asarray(np.arange(len(self.phases)) == iteration)
        decoding: npt.NDArray[np.bool_] = self.phases == DECODE
        return decoding if decoding.any() else ~decoding

    @property
    def recall(self) -> npt.NDArray[np.float64]:
        """`[I, L]`: of what a layer needed, the share that is among as many experts of the highest chance."""
        order = np.argsort(-self.expected, axis=2, kind="stable").argsort(axis=2)
        counts = self.needed.sum(axis=2)
        right = (self.needed & (order < counts[:, :, None])).sum(axis=2)
        return np.asarray(right / np.maximum(1, counts))


def guess(trace: Trace, policy: Policy, request: int, store: Sequence[int], jit: Jit[Any] = interpreted) -> Guess:
    """Lets a policy learn the `store`'s requests, then follow another one.

    Raises:
        ConfigError: there is no such request, or the policy makes no guesses.
    """
    if not 0 <= request < len(trace):
        raise ConfigError(f"--request: {request} is not one of 0 to {len(trace) - 1}")
    evidence, schedule = Evidence(trace, jit=jit), make_schedule(trace, [request], 1, jit)
    for recorded in evidence.recorded([each for each in store if each != request]):
        policy.learn(recorded)
    layers, experts = schedule.layers, schedule.experts
    expected = np.zeros((len(schedule), layers, experts), np.float32)
    needed = np.zeros((len(schedule), layers, experts), np.bool_)
    seen = policy.needs | policy.uses
    for iteration in range(len(schedule)):
        gates = evidence.gates(schedule, iteration) if "gates" in seen else None
        lookahead = evidence.lookahead(schedule, iteration) if "lookahead" in seen else None
        policy.begin(evidence.steps(schedule, iteration))
        for layer in range(layers):
            chances = policy.expected(layer)
            if chances is None:
                raise ConfigError(f"--policy: {type(policy).__name__} values experts, but makes no guess at a layer")
            expected[iteration, layer] = chances
            event = iteration * layers + layer
            needs = schedule.needs[schedule.ptr[event] : schedule.ptr[event + 1]] - layer * experts
            needed[iteration, layer, needs] = True
            policy.routed(
                Routed(
                    layer,
                    needs.tolist(),
                    None if gates is None else gates[:, layer],
                    None if lookahead is None else lookahead[:, layer],
                    evidence.active,
                )
            )
        policy.end()
    return Guess(expected, needed, schedule.phases)
