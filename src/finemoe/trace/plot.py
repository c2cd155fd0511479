"""Plots of a trace's statistics, with matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from finemoe.errors import ConfigError
from finemoe.system import refuse_unwritable
from finemoe.trace.format import TraceHeader
from finemoe.trace.stats import TraceStats

_MISSING = "--plot: matplotlib is not installed; pip install 'finemoe[plots]'"


def check(path: Path) -> None:
    """Raises `ConfigError` if a plot can't be written to `path`; called before the statistics are computed."""
    refuse_unwritable("--plot", path)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(_MISSING) from error
    suffixes = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in suffixes:
        raise ConfigError(
            f"--plot: can't draw to {path.name!r}; give a name that ends in {', '.join(sorted(suffixes))}"
        )


def draw(stats: TraceStats, header: TraceHeader, path: Path) -> None:
    """Writes a figure, atomically: popularity, reuse, usage, entropy, and lookahead if it was recorded.

    Raises:
        ConfigError: matplotlib is not installed, or the file can't be written.
    """
    check(path)
    from matplotlib.figure import Figure

    panels = [_popularity, _reuse, _usage, _entropy]
    if stats.recall is not None:
        panels.append(_recall)
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 4 * rows), layout="constrained")
    figure.suptitle(
        f"{header.model}: {header.layers} layers, {header.active} of {header.experts} experts; "
        f"{stats.requests} requests, {stats.tokens} tokens"
    )
    for index, panel in enumerate(panels, 1):
        panel(stats, figure.add_subplot(rows, 2, index))
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=120)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"--plot: {path} can't be written ({error.strerror or error})") from error


def _popularity(stats: TraceStats, axes: Any) -> None:
    shares = np.linspace(0, 100, len(stats.popularity))
    axes.plot(shares, 100 * stats.popularity_of_request, label="within a request (mean)")
    axes.plot(shares, 100 * stats.popularity, label="all requests together")
    axes.plot([0, 100], [0, 100], color="grey", linestyle=":", label="uniform")
    axes.set(title="Popularity", xlabel="most accessed experts, % of all", ylabel="accesses, %", xlim=(0, 100))
    axes.set_ylim(0, 102)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)


def _reuse(stats: TraceStats, axes: Any) -> None:
    for phase, values in stats.reuse.items():
        if values is not None:
            axes.plot(100 * values, marker="o", markersize=3, label=phase)
    chance = 100 * stats.active / stats.experts
    axes.axhline(chance, color="grey", linestyle=":", label=f"by chance ({chance:.1f}%)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title="Reuse of the previous token's experts", xlabel="MoE layer", ylabel="executed experts, %")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best")
    axes.grid(alpha=0.3)


def _usage(stats: TraceStats, axes: Any) -> None:
    shares = stats.usage / np.maximum(stats.usage.sum(1, keepdims=True), 1) * stats.experts
    image = axes.imshow(-np.sort(-shares, 1), aspect="auto", cmap="viridis", interpolation="nearest", vmin=0)
    axes.figure.colorbar(image, ax=axes, label="accesses, times the layer's mean")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set(title="Usage of experts, all requests", xlabel="experts, most accessed first", ylabel="MoE layer")


def _entropy(stats: TraceStats, axes: Any) -> None:
    axes.plot(stats.usage_entropy, marker="o", markersize=3, label="usage of experts")
    if stats.gate_entropy is not None:
        axes.plot(stats.gate_entropy, marker="o", markersize=3, label="gate's distribution (mean)")
    limit = np.log2(stats.experts)
    axes.axhline(limit, color="grey", linestyle=":", label=f"uniform ({limit:.1f} bits)")
    missing = "" if stats.gate_entropy is not None else " (gate: not recorded)"
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(title=f"Entropy{missing}", xlabel="MoE layer", ylabel="bits")
    axes.set_ylim(0, limit * 1.05)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)


def _recall(stats: TraceStats, axes: Any) -> None:
    assert stats.recall is not None
    distances = np.arange(1, len(stats.recall) + 1)
    axes.plot(distances, 100 * stats.recall, marker="o", label="a later layer's gate on this layer's state")
    chance = 100 * stats.active / stats.experts
    axes.axhline(chance, color="grey", linestyle=":", label=f"by chance ({chance:.1f}%)")
    axes.set(title="Lookahead", xlabel="layers ahead", ylabel="executed experts predicted, %", xticks=distances)
    axes.set_ylim(0, 102)
    axes.legend(loc="best")
    axes.grid(alpha=0.3)
