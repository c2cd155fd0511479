"""The result of a benchmark: every row with all of its runs, compared with each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from finemoe.bench.answers import Answered
from finemoe.bench.figures import NAMES, derive, derive_answers
from finemoe.bench.subject import Measured, Subject


@dataclass(frozen=True)
class Run:
    """One process: what it measured or why it did not, and the disk's bandwidth before and after it."""

    subject: Subject
    repeat: int
    link_bytes_s: float  # mean of the two probes around it, or what the link is held to if that is less
    cached_share: float | None  # of the checkpoint's pages in the page cache at its start
    measured: Measured | Answered | None = None
    error: str | None = None  # one line

    @property
    def figures(self) -> dict[str, float | None]:
        """The figures of this run (see `figures`); none if it failed."""
        if isinstance(self.measured, Answered):
            return derive_answers(self.measured)
        return {} if self.measured is None else derive(self.measured, self.link_bytes_s)


@dataclass(frozen=True)
class Row:
    """All runs of one subject."""

    subject: Subject
    runs: tuple[Run, ...]
    # to eager's, as far as this row went, else, of real prompts, to those of the first run of all; None: of neither
    tokens_equal: bool | None
    logits_equal: bool | None  # the same, bit for bit
    tpot_ratio: float | None  # to the fastest resident row; median of the ratios within each repeat
    ttft_ratio: float | None
    perplexity_ratio: float | None = None  # to the first row whose experts are as the checkpoint has them

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
    link_held_bytes_s: float | None = None  # finemoe's rows; None where it is not
    replayed_routing: str | None = None  # the trace whose routing was forced onto all rows
    names: tuple[str, ...] = NAMES  # of the figures
    perplexity_tokens: int = 0  # that it was measured on; 0 where it was not
    requests: dict[str, int] | None = None  # real prompts: how many, and their tokens; None where tokens were random

    @property
    def tokens_equal(self) -> bool | None:
        """Whether all rows that ran, but lossy ones, have equal tokens; `None` if there was nothing to compare with."""
        said = [row.tokens_equal for row in self.rows if row.tokens_equal is not None and not row.subject.lossy]
        return all(said) if said else None

    @property
    def failed(self) -> bool:
        """Whether a row has no figures."""
        return any(row.error is not None for row in self.rows)

    @property
    def tokens_digests(self) -> tuple[str, ...]:
        """Of real prompts, the distinct digests of all output tokens: a single one, or something is wrong.

        Lossy rows are left out.
        """
        runs = [run.measured for row in self.rows if not row.subject.lossy for run in row.runs]
        return tuple(dict.fromkeys(m.tokens_digest for m in runs if isinstance(m, Answered)))

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON: medians in front, every run behind them."""
        return {
            "model": self.model,
            "host": self.host,
            "settings": self.settings,
            "link": {
                "direct": self.link_direct,
                "probes_bytes_s": list(self.link_bytes_s),
                "held_bytes_s": self.link_held_bytes_s,
            },
            "replayed_routing": self.replayed_routing,
            "fastest_resident": self.fastest_resident,
            "requests": self.requests,
            "perplexity_tokens": self.perplexity_tokens,
            "tokens_equal": self.tokens_equal,
            "tokens_digests": list(self.tokens_digests),
            "rows": [
                {
                    "name": row.subject.name,
                    **asdict(row.subject),
                    "lossy": row.subject.lossy,
                    "error": row.error,
                    **{name: row.figure(name) for name in self.names},
                    "tokens_equal": row.tokens_equal,
                    "logits_equal": row.logits_equal,
                    "tpot_ratio": row.tpot_ratio,
                    "ttft_ratio": row.ttft_ratio,
                    "perplexity_ratio": row.perplexity_ratio,
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
    eager = Subject("resident", implementation="eager")
    reference = next((run.measured for run in runs if run.measured and run.subject == eager), None)
    if reference is None:
        answered = (run.measured for run in runs if not run.subject.lossy)
        reference = next((measured for measured in answered if isinstance(measured, Answered)), None)
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
    rows = _with_perplexity_ratios(rows)
    return rows, fastest.name if fastest else None


def _with_perplexity_ratios(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    exact = next((value for row in rows if not row.subject.lossy and (value := row.figure("perplexity"))), None)
    if exact is None:
        return rows
    return tuple(
        row if (value := row.figure("perplexity")) is None else replace(row, perplexity_ratio=value / exact)
        for row in rows
    )


def _equal(
    runs: list[Run],
    reference: Measured | Answered | None,
    sequence: Callable[[Measured | Answered], tuple[object, ...]],
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
