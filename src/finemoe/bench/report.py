"""The result of a benchmark: every row with all of its runs, compared with each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean, median
from typing import Any

import numpy as np

from finemoe.bench.measurements import COUNTED, MIMIC_NAMES, Answered, Measured, Phase, Subject, mimic

NAMES: tuple[str, ...] = (
    "load_s", "ttft_s", "tpot_s", "tpot_mean_s", "tok_s", "hit_rate", "bytes_per_token", "stall_share",
    "link_utilisation", "prompt_link_utilisation", "dense_bytes", "pool_bytes", "peak_rss_bytes", "overhead_bytes",
    "perplexity",
)  # fmt: skip
ANSWER_NAMES: tuple[str, ...] = (
    "load_s", "ttft_s", "ttft_p50_s", "ttft_p95_s", "tpot_s", "tpot_p50_s", "tpot_p95_s", "tok_s",
    "prefill_hit_rate", "prefill_late_rate", "prefill_miss_rate", "prefill_stall_share",
    "decode_hit_rate", "decode_late_rate", "decode_miss_rate", "decode_stall_share", "stall_share",
    "bytes_read", "bytes_per_token", "prefetched", "precision", "wasted",
    "dense_bytes", "pool_bytes", "peak_rss_bytes", "perplexity", *MIMIC_NAMES,
)  # fmt: skip
LEAST_STALL_S = 0.01  # below, a share of the stall is noise


def derive(measured: Measured, link_bytes_s: float) -> dict[str, float | None]:
    """All figures by name; `None` where one has no meaning. Those without `prompt` or `ttft` are of decoding.

    - `ttft_s`: of a prompt, cold; `tpot_s`, `tpot_mean_s`: median and mean of a later token's time;
    - `bytes_per_token`: read from storage, as the kernel counts, else as the engine does;
    - `stall_share`: of the decoding time;
    - `link_utilisation`: bytes moved while stalled / (stall x raw bandwidth), bandwidth in bytes/s, measured between
      the tokens where the subject allows it, else before and after the row (`link_bytes_s`);
    - `prompt_link_utilisation`: bytes of the cold prompt / (its whole time x raw bandwidth), compute included;
    - `overhead_bytes`: peak resident set beyond dense weights and pool.
    """
    prompt, decode = measured.prompt, measured.decode
    engine = measured.pool_bytes > 0
    read_bytes = decode.bytes_read if decode.disk_bytes is None else decode.disk_bytes
    decode_bytes_s, prompt_bytes_s = (phase.link_bytes_s or link_bytes_s for phase in (decode, prompt))
    stalled = engine and decode.stall_s >= LEAST_STALL_S
    return {
        "load_s": measured.load_s,
        "ttft_s": prompt.total_s,
        "tpot_s": median(decode.seconds),
        "tpot_mean_s": mean(decode.seconds),
        "tok_s": ratio(len(decode.seconds), decode.total_s),
        "hit_rate": ratio(decode.hits, decode.accesses),
        "bytes_per_token": read_bytes / len(decode.seconds),
        "stall_share": ratio(decode.stall_s, decode.total_s) if engine else None,
        "link_utilisation": ratio(decode.stalled_bytes, decode.stall_s * decode_bytes_s) if stalled else None,
        "prompt_link_utilisation": ratio(prompt.bytes_read, prompt.total_s * prompt_bytes_s) if engine else None,
        "dense_bytes": measured.dense_bytes,
        "pool_bytes": measured.pool_bytes,
        "peak_rss_bytes": measured.peak_rss_bytes,
        "overhead_bytes": measured.peak_rss_bytes - measured.weight_bytes,
        "perplexity": measured.perplexity,
    }


def derive_answers(answered: Answered) -> dict[str, float | None]:
    """All figures of answers to real prompts by name; `None` where one has no meaning.

    - `ttft_s`, `tpot_s`: means over requests, and their 50th and 95th percentiles; a request's TPOT is the mean time
      of its tokens after the first, and one of a single token has none;
    - `prefill_`, `decode_`: of the first tokens, and of all that follow;
    - `stall_share`: of the time of either, or of both;
    - `bytes_per_token`: read while decoding; `bytes_read`: in all;
    - `prefetched`, `wasted`: experts; `precision`: prefetched and needed, of all prefetched;
    - what a simulation of the same accesses is to be given: see `mimic`.
    """
    answers = answered.answers
    ttft_s = [answer.prompt.total_s for answer in answers]
    tpot_s = [mean(answer.decode.seconds) for answer in answers if answer.decode.seconds]
    prefill, decode = together([a.prompt for a in answers]), together([a.decode for a in answers])
    both = together([prefill, decode])
    engine = answered.pool_bytes > 0
    figures: dict[str, float | None] = {
        "load_s": answered.load_s,
        "ttft_s": mean(ttft_s),
        "ttft_p50_s": float(np.percentile(ttft_s, 50)),
        "ttft_p95_s": float(np.percentile(ttft_s, 95)),
        "tpot_s": mean(tpot_s) if tpot_s else None,
        "tpot_p50_s": float(np.percentile(tpot_s, 50)) if tpot_s else None,
        "tpot_p95_s": float(np.percentile(tpot_s, 95)) if tpot_s else None,
        "tok_s": ratio(sum(map(len, answered.tokens)), both.total_s),
        "stall_share": ratio(both.stall_s, both.total_s) if engine else None,
        "bytes_read": both.bytes_read if engine else None,
        "bytes_per_token": ratio(decode.bytes_read, len(decode.seconds)) if engine else None,
        "prefetched": answered.prefetched if engine else None,
        "precision": ratio(answered.prefetched_used, answered.prefetched),
        "wasted": answered.wasted if engine else None,
        "dense_bytes": answered.dense_bytes,
        "pool_bytes": answered.pool_bytes,
        "peak_rss_bytes": answered.peak_rss_bytes,
        "perplexity": answered.perplexity,
    }
    for name, phase in (("prefill", prefill), ("decode", decode)):
        figures[f"{name}_hit_rate"] = ratio(phase.hits, phase.accesses)
        figures[f"{name}_late_rate"] = ratio(phase.late, phase.accesses)
        figures[f"{name}_miss_rate"] = ratio(phase.accesses - phase.hits - phase.late, phase.accesses)
        figures[f"{name}_stall_share"] = ratio(phase.stall_s, phase.total_s) if engine else None
    prompts = [(answer.prompt_tokens, answer.prompt) for answer in answers]
    return figures | mimic(prompts, decode, answered.expert_bytes)


def together(phases: Sequence[Phase]) -> Phase:
    """Steps and counts of several phases as of one."""
    seconds = tuple(s for phase in phases for s in phase.seconds)
    counted = {name: sum((getattr(phase, name) for phase in phases), getattr(Phase, name)) for name in COUNTED}
    return Phase(seconds, disk_bytes=None, **counted)


def ratio(part: float, whole: float) -> float | None:
    """`part / whole`; `None` of nothing."""
    return part / whole if whole else None


@dataclass(frozen=True)
class BenchRun:
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
class BenchRow:
    """All runs of one subject."""

    subject: Subject
    runs: tuple[BenchRun, ...]
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
    rows: tuple[BenchRow, ...]
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


def summarise(runs: list[BenchRun]) -> tuple[tuple[BenchRow, ...], str | None]:
    """Groups runs by subject, in the order of first appearance, and compares them.

    Returns:
        The rows, and the name of the fastest resident one (lowest median TPOT), if one ran.
    """
    grouped: dict[Subject, list[BenchRun]] = {}
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
        BenchRow(
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


def _with_perplexity_ratios(rows: tuple[BenchRow, ...]) -> tuple[BenchRow, ...]:
    exact = next((value for row in rows if not row.subject.lossy and (value := row.figure("perplexity"))), None)
    if exact is None:
        return rows
    return tuple(
        row if (value := row.figure("perplexity")) is None else replace(row, perplexity_ratio=value / exact)
        for row in rows
    )


def _equal(
    runs: list[BenchRun],
    reference: Measured | Answered | None,
    sequence: Callable[[Measured | Answered], tuple[object, ...]],
) -> bool | None:
    """Whether all runs agree with the reference, over the tokens that both have."""
    own = [sequence(run.measured) for run in runs if run.measured]
    if reference is None or not own:
        return None
    return all(mine == sequence(reference)[: len(mine)] for mine in own)


def _relative(runs: list[BenchRun], peers: dict[int, BenchRun], figure: str) -> float | None:
    """Median of the ratios to the peer of the same repeat."""
    ratios = []
    for run in runs:
        mine = run.figures.get(figure)
        other = peers[run.repeat].figures.get(figure) if run.repeat in peers else None
        if mine is not None and other:
            ratios.append(mine / other)
    return median(ratios) if ratios else None
