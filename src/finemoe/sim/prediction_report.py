"""What a policy expects of a request, layer by layer, against what the request then needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.errors import ConfigError
from finemoe.jit import Jit, interpreted
from finemoe.policy import Policy
from finemoe.sim.report import check, save
from finemoe.sim.workload import TraceView, make_schedule
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
    evidence, schedule = TraceView(trace, jit=jit), make_schedule(trace, [request], 1, jit)
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


def draw_guess(guess: Guess, title: str, path: Path, iteration: int | None = None) -> None:
    """Writes a figure: experts over layers, expected and needed, and the recall of each layer.

    Args:
        guess: of the request.
        title: above it all.
        path: where to.
        iteration: draw this one; by default the mean over all decoded tokens.

    Raises:
        ConfigError: matplotlib is not installed, or the file can't be written.
    """
    check(path)
    from matplotlib.figure import Figure

    chosen = guess.chosen(iteration)
    expected, needed = guess.expected[chosen].mean(axis=0), guess.needed[chosen].mean(axis=0)
    recall = guess.recall[chosen].mean(axis=0)
    layers, experts = expected.shape
    figure = Figure(figsize=(14, 0.16 * max(layers, 24) + 1.4), layout="constrained")
    figure.suptitle(title)
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 4, 1.6), sharey=True)
    extent = (-0.5, experts - 0.5, layers - 0.5, -0.5)
    for axes, values, name in ((left, expected, "expected, just before the gate"), (middle, needed, "needed")):
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", extent=extent, interpolation="none")
        axes.set(title=name, xlabel="expert")
    figure.colorbar(image, ax=middle, label="chance, or share of tokens")
    left.set_ylabel("MoE layer")
    right.barh(np.arange(layers), recall, color="#0072b2", height=0.8)
    right.set(title=f"recall, mean {recall.mean():.0%}", xlim=(0, 1), xlabel="share foreseen")
    right.grid(axis="x", alpha=0.3)
    save(figure, path)
