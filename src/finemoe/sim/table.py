"""Rows of a simulation for people."""

from __future__ import annotations

from collections.abc import Sequence

from finemoe.sim.cells import Row

_HEAD = (
    "policy", "memory", "link ratio", "hit", "late", "miss", "time/layer", "stall", "moved/layer", "wasted",
    "precision",
)  # fmt: skip
_TOLD = {  # where it is not what it is by default
    "gap": "gap between iterations, not in time/layer",
    "lag": "policies that search have their say so much after a gate",
    "begin_lag": "and so much after the begin of an iteration",
    "prefetch_slowdown": "what is not urgent takes so many times the link ratio",
    "compute_spread": "compute varies, spread of its logarithm",
    "link_spread": "transfers vary, spread of their logarithm",
    "lag_spread": "the lag varies, spread of its logarithm",
}


def table(rows: Sequence[Row]) -> str:
    """One line a row, in columns; gaps and emulated inputs are named below."""
    cells = [_HEAD, *map(_line, rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEAD))]
    lines = [
        "  ".join(word.ljust(width) if column == 0 else word.rjust(width) for column, (word, width) in enumerate(pairs))
        for pairs in (zip(line, widths, strict=True) for line in cells)
    ]
    for name, text in _TOLD.items():
        told = sorted({getattr(row, name) for row in rows} - {Row.__dataclass_fields__[name].default})
        lines += [f"{text}: {value:g}" for value in told]
    emulated = sorted({row.emulated for row in rows if row.emulated})
    lines += [f"* emulated, not recorded: {text}" for text in emulated]
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    """The same as a table for a document."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|---|" + "---:|" * (len(_HEAD) - 1)]
    lines += ["| " + " | ".join(_line(row)) + " |" for row in rows]
    return "\n".join(lines)


def _line(row: Row) -> tuple[str, ...]:
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
