"""Rows of a sweep as a text table, a Markdown table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finemoe.errors import ConfigError
from finemoe.sim.sweep import SweepRow
from finemoe.system import refuse_unwritable

_HEAD = (
    "policy", "memory", "link ratio", "hit", "late", "miss", "time/layer", "stall", "moved/layer", "wasted",
    "precision",
)  # fmt: skip
_NOTES = {  # below the table, for settings that are not at their default
    "gap": "gap between iterations, not in time/layer",
    "lag": "lag of asynchronous policies' scores after a gate",
    "begin_lag": "lag after the begin of an iteration",
    "prefetch_slowdown": "prefetches take this many times the link ratio",
    "compute_spread": "compute varies, standard deviation of its logarithm",
    "link_spread": "transfers vary, standard deviation of their logarithm",
    "lag_spread": "the lag varies, standard deviation of its logarithm",
}


def table(rows: Sequence[SweepRow]) -> str:
    """A line per row, in columns; settings not at their default, and emulated inputs, are named below."""
    cells = [_HEAD, *map(_line, rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEAD))]
    lines = [
        "  ".join(word.ljust(width) if column == 0 else word.rjust(width) for column, (word, width) in enumerate(pairs))
        for pairs in (zip(line, widths, strict=True) for line in cells)
    ]
    for name, text in _NOTES.items():
        values = sorted({getattr(row, name) for row in rows} - {SweepRow.__dataclass_fields__[name].default})
        lines += [f"{text}: {value:g}" for value in values]
    emulated = sorted({row.emulated for row in rows if row.emulated})
    lines += [f"* emulated, not recorded: {text}" for text in emulated]
    return "\n".join(lines)


def markdown(rows: Sequence[SweepRow]) -> str:
    """The same columns as a Markdown table, without the notes."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|---|" + "---:|" * (len(_HEAD) - 1)]
    lines += ["| " + " | ".join(_line(row)) + " |" for row in rows]
    return "\n".join(lines)


def _line(row: SweepRow) -> tuple[str, ...]:
    return (
        row.policy + ("*" if row.emulated else ""),
        f"{100 * row.expert_memory:g}%",
        f"{row.link_ratio:.3g}",
        f"{row.hit_rate:.1%}",
        f"{row.late_rate:.1%}",
        f"{row.miss_rate:.1%}",
        f"{row.time_per_layer:.3f}",
        f"{row.stall_per_layer:.3f}",
        f"{row.transfers_per_layer:.3f}",
        f"{row.wasted_per_layer:.3f}",
        "-" if row.precision is None else f"{row.precision:.1%}",
    )


# distinguishable for colour-blind readers; bounds are grey
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#b8a900", "#7f3fbf")
_BOUNDS = {"belady": ("#777777", "--"), "oracle": ("#222222", "--")}


def check_plot(path: Path) -> None:
    """Raises `ConfigError` if a plot can't be written to `path`; checked before the simulation runs."""
    refuse_unwritable("--plot", path)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot: matplotlib is not installed; pip install 'finemoe[plots]'") from error
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise ConfigError(f"--plot: can't draw to {path.name!r}; give a name that ends in {', '.join(sorted(kinds))}")


def draw(rows: Sequence[SweepRow], title: str, path: Path) -> None:
    """Plots rows to `path`, atomically.

    Raises:
        ConfigError: matplotlib is not installed, or the file can't be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    ratios = sorted({row.link_ratio for row in rows})
    shares = sorted({row.expert_memory for row in rows})
    ratio = min(ratios, key=lambda value: abs(value - 1))
    share = min(shares, key=lambda value: abs(value - 0.25))
    panels = 2 + _has_bounds(rows)
    figure = Figure(figsize=(6.2 * panels, 5.2), layout="constrained")
    figure.suptitle(title)
    _lines(figure.add_subplot(1, panels, 1), [r for r in rows if r.link_ratio == ratio], "expert_memory", "hit_rate")
    _lines(
        figure.add_subplot(1, panels, 2), [r for r in rows if r.expert_memory == share], "link_ratio", "time_per_layer"
    )
    if panels == 3:
        _relative_stall(figure.add_subplot(1, panels, 3), [r for r in rows if r.link_ratio == ratio])
    first, second, *rest = figure.axes
    first.set(title=f"Hit rate, link ratio {ratio:g}", xlabel="experts in memory", ylabel="hit rate")
    first.xaxis.set_major_formatter("{x:.0%}")
    first.yaxis.set_major_formatter("{x:.0%}")
    second.set(title=f"Time per layer, {share:.0%} of the experts in memory", xlabel="link ratio")
    second.set_ylabel("time per layer (1 = no stall)")
    if len(ratios) > 1:
        second.set_xscale("log", base=2)
        second.set_yscale("log", base=2)
        second.xaxis.set_major_formatter("{x:g}")
        second.yaxis.set_major_formatter("{x:g}")
    for axes in rest:
        axes.set(title=f"Stall saved, link ratio {ratio:g} (lru 0, oracle 1)", xlabel="experts in memory")
        axes.xaxis.set_major_formatter("{x:.0%}")
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    first.legend(fontsize="small")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Writes a figure, atomically. Raises `ConfigError` if that fails."""
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=120)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"--plot: {path} can't be written ({error.strerror or error})") from error


def _has_bounds(rows: Sequence[SweepRow]) -> bool:
    return {"lru", "oracle"} <= {row.policy for row in rows}


def _style(rows: Sequence[SweepRow], policy: str) -> dict[str, Any]:
    if policy in _BOUNDS:
        colour, line = _BOUNDS[policy]
        return {"color": colour, "linestyle": line, "marker": "."}
    names = [name for name in dict.fromkeys(row.policy for row in rows) if name not in _BOUNDS]
    return {"color": _COLOURS[names.index(policy) % len(_COLOURS)], "marker": "o", "markersize": 4}


def _lines(axes: Any, rows: Sequence[SweepRow], x: str, y: str) -> None:
    for policy in dict.fromkeys(row.policy for row in rows):
        own = sorted((getattr(row, x), getattr(row, y)) for row in rows if row.policy == policy)
        starred = any(row.emulated for row in rows if row.policy == policy)
        axes.plot(*zip(*own, strict=True), label=policy + ("*" if starred else ""), **_style(rows, policy))


def _relative_stall(axes: Any, rows: Sequence[SweepRow]) -> None:
    """Stall saved by each policy, from 0 (`lru`) to 1 (`oracle`)."""
    stall = {(row.policy, row.expert_memory): row.stall_per_layer for row in rows}
    for policy in dict.fromkeys(row.policy for row in rows):
        own = []
        for share in sorted({row.expert_memory for row in rows}):
            lru, oracle = stall.get(("lru", share)), stall.get(("oracle", share))
            if lru is not None and oracle is not None and lru > oracle and (policy, share) in stall:
                own.append((share, (lru - stall[policy, share]) / (lru - oracle)))
        if own:
            axes.plot(*zip(*own, strict=True), label=policy, **_style(rows, policy))
