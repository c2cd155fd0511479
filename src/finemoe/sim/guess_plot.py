"""Draws a request's expert map: what was expected beside what was needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from finemoe.sim.guess import Guess
from finemoe.sim.plot import check, save


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
