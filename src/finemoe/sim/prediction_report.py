"""A policy's predictions for a recorded request, layer by layer, compared with the experts it needed."""

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
from finemoe.sim.report import check_plot, save
from finemoe.sim.workload import TraceView, make_schedule
from finemoe.trace import Trace
from finemoe.types import DECODE, Routed


@dataclass(frozen=True)
class RoutingPrediction:
    """Predictions for a request of `I` iterations.

    Attributes:
        expected: `[I, L, E]`, predicted probability of each expert, just before its layer's gate.
        needed: `[I, L, E]`, whether the layer needed it.
        phases: `[I]`, `PREFILL` or `DECODE`.
    """

    expected: npt.NDArray[np.float32]
    needed: npt.NDArray[np.bool_]
    phases: npt.NDArray[np.uint8]

    def chosen(self, iteration: int | None) -> npt.NDArray[np.bool_]:
        """Mask `[I]`: one iteration, or by default all that decode (all, if none does)."""
        if iteration is not None:
            return np.asarray(np.arange(len(self.phases)) == iteration)
        decoding: npt.NDArray[np.bool_] = self.phases == DECODE
        return decoding if decoding.any() else ~decoding

    @property
    def recall(self) -> npt.NDArray[np.float64]:
        """`[I, L]`: share of the `n` needed experts that is among the `n` of highest probability."""
        order = np.argsort(-self.expected, axis=2, kind="stable").argsort(axis=2)
        counts = self.needed.sum(axis=2)
        right = (self.needed & (order < counts[:, :, None])).sum(axis=2)
        return np.asarray(right / np.maximum(1, counts))


def predict_request(
    trace: Trace, policy: Policy, request: int, store: Sequence[int], jit: Jit[Any] = interpreted
) -> RoutingPrediction:
    """Trains a policy on the requests `store`, then collects its predictions for another one.

    Args:
        trace: the recorded requests.
        policy: new, or with loaded maps; it is changed.
        request: index of the request to predict.
        store: indices of the requests to learn from; `request` itself is skipped.
        jit: compiles the kernels, or leaves them interpreted.

    Raises:
        ConfigError: there is no such request, or the policy does not predict by layer.
    """
    if not 0 <= request < len(trace):
        raise ConfigError(f"--request: {request} is not one of 0 to {len(trace) - 1}")
    view, schedule = TraceView(trace, jit=jit), make_schedule(trace, [request], 1, jit)
    for recorded in view.recorded([each for each in store if each != request]):
        policy.learn(recorded)
    layers, experts = schedule.layers, schedule.experts
    expected = np.zeros((len(schedule), layers, experts), np.float32)
    needed = np.zeros((len(schedule), layers, experts), np.bool_)
    observed = policy.needs | policy.uses
    for iteration in range(len(schedule)):
        gates = view.gates(schedule, iteration) if "gates" in observed else None
        lookahead = view.lookahead(schedule, iteration) if "lookahead" in observed else None
        policy.begin(view.steps(schedule, iteration))
        for layer in range(layers):
            probabilities = policy.expected(layer)
            if probabilities is None:
                raise ConfigError(f"--policy: {type(policy).__name__} makes no predictions by layer")
            expected[iteration, layer] = probabilities
            event = iteration * layers + layer
            needs = schedule.needs[schedule.ptr[event] : schedule.ptr[event + 1]] - layer * experts
            needed[iteration, layer, needs] = True
            policy.routed(
                Routed(
                    layer,
                    needs.tolist(),
                    None if gates is None else gates[:, layer],
                    None if lookahead is None else lookahead[:, layer],
                    view.active,
                )
            )
        policy.end()
    return RoutingPrediction(expected, needed, schedule.phases)


def draw_prediction(prediction: RoutingPrediction, title: str, path: Path, iteration: int | None = None) -> None:
    """Plots experts over layers, expected and needed, and the recall of each layer.

    Args:
        prediction: from `predict_request`.
        title: of the figure.
        path: file to write.
        iteration: plot this one; by default the mean over all decoded tokens.

    Raises:
        ConfigError: matplotlib is not installed, or the file can't be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    chosen = prediction.chosen(iteration)
    expected, needed = prediction.expected[chosen].mean(axis=0), prediction.needed[chosen].mean(axis=0)
    recall = prediction.recall[chosen].mean(axis=0)
    layers, experts = expected.shape
    figure = Figure(figsize=(14, 0.16 * max(layers, 24) + 1.4), layout="constrained")
    figure.suptitle(title)
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 4, 1.6), sharey=True)
    extent = (-0.5, experts - 0.5, layers - 0.5, -0.5)
    for axes, values, name in ((left, expected, "expected, just before the gate"), (middle, needed, "needed")):
        image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", extent=extent, interpolation="none")
        axes.set(title=name, xlabel="expert")
    figure.colorbar(image, ax=middle, label="probability, or share of tokens")
    left.set_ylabel("MoE layer")
    right.barh(np.arange(layers), recall, color="#0072b2", height=0.8)
    right.set(title=f"recall, mean {recall.mean():.0%}", xlim=(0, 1), xlabel="share predicted")
    right.grid(axis="x", alpha=0.3)
    save(figure, path)
