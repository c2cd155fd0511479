"""The result of a benchmark: every row with all of its runs, compared with each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from finemoe.bench.figures import NAMES, derive
from finemoe.bench.subject import Measured, Subject


@dataclass(frozen=True)
class Run:
    """One process: what it measured or why it did not, and the disk's bandwidth before and after it."""

    subject: Subject
    repeat: int
    link_bytes_s: float  # mean of the two probes around it
    cached_share: float | None  # of the checkpoint's pages in the page cache at its start
    measured: Measured | None = None
    error: str | None = None  # one line

    @property
    def figures(self) -> dict[str, float | None]:
        """The figures of this run (see `figures.derive`); none if it failed."""
        return {} if self.measured is None else derive(self.measured, self.link_bytes_s)


@dataclass(frozen=True)
class Row:
    """All runs of one subject."""

    subject: Subject
    runs: tuple[Run, ...]
    tokens_equal: bool | None  # to eager's, as far as this row went; None if there is nothing to compare with
    logits_equal: bool | None  # the same, bit for bit
    tpot_ratio: float | None  # to the fastest resident row; median of the ratios within each repeat
    ttft_ratio: float | None

    @property
    def error(self) -> str | None:
        """Why there are no figures; `None` if there are."""
        return None if any(run.measured for run in self.runs) else self.runs[-1].error

    def figure(self, name: str) -> float | None:
        """Median over the runs of one of the figures; `None` where no run has it."""
        values = [value for run in self.runs if (value := run.figures.get(name)) is not None]
        return median(values) if values else None


@dataclass(frozen=True)
class BenchReport:
    """A whole benchmark. Bandwidths in bytes/s."""

    model: str
    host: dict[str, str | int]
    settings: dict[str, Any]  # of the BenchConfig
    link_direct: bool
    link_bytes_s: tuple[float, ...]  # every probe, in order
    rows: tuple[Row, ...]
    fastest_resident: str | None  # name of the row

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: medians in front, every run behind them."""
        return {
            "model": self.model,
            "host": self.host,
            "settings": self.settings,
            "link": {"direct": self.link_direct, "probes_bytes_s": list(self.link_bytes_s)},
            "fastest_resident": self.fastest_resident,
            "rows": [
                {
                    "name": row.subject.name,
                    **asdict(row.subject),
                    "error": row.error,
                    **{name: row.figure(name) for name in NAMES},
                    "tokens_equal": row.tokens_equal,
                    "logits_equal": row.logits_equal,
                    "tpot_ratio": row.tpot_ratio,
                    "ttft_ratio": row.ttft_ratio,
                    "runs": [asdict(run) | run.figures for run in row.runs],
                }
                for row in self.rows
            ],
        }


def summarise(runs: list[Run]) -> tuple[tuple[Row, ...], str | None]:
    """Groups runs by subject, in the order of first appearance, and compares them.

    Returns:
        The rows, and the name of the fastest resident one (lowest median TPOT), if one ran.
    """
    grouped: dict[Subject, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.subject, []).append(run)
    reference = next(
        (r.measured for r in runs if r.measured and r.subject == Subject("resident", implementation="eager")), None
    )
    speeds = {
        subject: median(run.figures["tpot_s"] or 0.0 for run in own if run.measured)
        for subject, own in grouped.items()
        if subject.kind == "resident" and any(run.measured for run in own)
    }
    fastest = min(speeds, key=speeds.__getitem__) if speeds else None
    peers = {run.repeat: run for run in grouped.get(fastest, []) if run.measured} if fastest else {}
    rows = tuple(
        Row(
            subject,
            tuple(own),
            _equal(own, reference, lambda measured: measured.tokens),
            _equal(own, reference, lambda measured: measured.logits),
            _relative(own, peers, "tpot_s"),
            _relative(own, peers, "ttft_s"),
        )
        for subject, own in grouped.items()
    )
    return rows, fastest.name if fastest else None


def _equal(
    runs: list[Run], reference: Measured | None, sequence: Callable[[Measured], tuple[int, ...] | tuple[str, ...]]
) -> bool | None:
    """Whether all runs agree with the reference, over the tokens that both have."""
    own = [sequence(run.measured) for run in runs if run.measured]
    if reference is None or not own:
        return None
    return all(mine == sequence(reference)[: len(mine)] for mine in own)


def _relative(runs: list[Run], peers: dict[int, Run], figure: str) -> float | None:
    """Median of the ratios to the peer of the same repeat."""
    ratios = []
    for run in runs:
        mine = run.figures.get(figure)
        other = peers[run.repeat].figures.get(figure) if run.repeat in peers else None
        if mine is not None and other:
            ratios.append(mine / other)
    return median(ratios) if ratios else None
