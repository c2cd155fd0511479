"""Figures derived from measurements, and the comparison of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean, median
from typing import Any

import numpy as np

from finemoe.bench.measurements import (
    COUNTED,
    MACHINE_FIGURES,
    MACHINE_SETTINGS,
    Phase,
    PromptsResult,
    RandomTokensResult,
    Variant,
    machine_figures,
)

RANDOM_TOKEN_FIGURES: tuple[str, ...] = (
    "load_s", "ttft_s", "tpot_s", "tpot_mean_s", "tok_s", "hit_rate", "bytes_per_token", "stall_share",
    "link_utilisation", "prompt_link_utilisation", "dense_bytes", "pool_bytes", "peak_rss_bytes", "overhead_bytes",
    "perplexity",
)  # fmt: skip
PROMPT_FIGURES: tuple[str, ...] = (
    "load_s", "ttft_s", "ttft_p50_s", "ttft_p95_s", "tpot_s", "tpot_p50_s", "tpot_p95_s", "tok_s",
    "prefill_hit_rate", "prefill_late_rate", "prefill_miss_rate", "prefill_stall_share",
    "decode_hit_rate", "decode_late_rate", "decode_miss_rate", "decode_stall_share", "stall_share",
    "bytes_read", "bytes_per_token", "prefetched", "precision", "wasted",
    "dense_bytes", "pool_bytes", "peak_rss_bytes", "perplexity", *MACHINE_FIGURES,
)  # fmt: skip
LEAST_STALL_S = 0.01  # below, ratios to the stall are noise


def random_token_figures(measured: RandomTokensResult, link_bytes_s: float) -> dict[str, float | None]:
    """Figures of a row on random tokens, of decoding unless named otherwise; `None` where one does not apply.

    - `ttft_s`: time of a cold prompt; `tpot_s`, `tpot_mean_s`: median and mean time of a later token;
    - `bytes_per_token`: read from storage, as the kernel counts or else the engine;
    - `stall_share`: share of the decoding time;
    - `link_utilisation`: bytes moved while stalled / (stall x raw bandwidth), the bandwidth measured between tokens,
      or before and after the row (`link_bytes_s`, bytes/s);
    - `prompt_link_utilisation`: bytes of the cold prompt / (its time, compute included, x raw bandwidth);
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


def prompt_figures(answered: PromptsResult) -> dict[str, float | None]:
    """Figures of a row on real prompts; `None` where one does not apply.

    - `ttft_s`, `tpot_s`: means over requests, and their 50th and 95th percentiles; a request's TPOT is the mean time
      of its tokens after the first, without which it has none;
    - `prefill_`, `decode_`: of the first tokens, and of all later ones;
    - `stall_share`: share of the time of either, or of both;
    - `bytes_per_token`: read while decoding; `bytes_read`: in total;
    - `prefetched`, `wasted`: experts; `precision`: prefetched and needed / prefetched;
    - the simulator's settings: see `machine_figures`.
    """
    answers = answered.answers
    ttft_s = [answer.prompt.total_s for answer in answers]
    tpot_s = [mean(answer.decode.seconds) for answer in answers if answer.decode.seconds]
    prefill, decode = merge_phases([a.prompt for a in answers]), merge_phases([a.decode for a in answers])
    both = merge_phases([prefill, decode])
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
    return figures | machine_figures(prompts, decode, answered.expert_bytes)


def merge_phases(phases: Sequence[Phase]) -> Phase:
    """Concatenates the steps and adds the counters of several phases."""
    seconds = tuple(s for phase in phases for s in phase.seconds)
    counted = {name: sum((getattr(phase, name) for phase in phases), getattr(Phase, name)) for name in COUNTED}
    return Phase(seconds, disk_bytes=None, **counted)


def ratio(part: float, whole: float) -> float | None:
    """`part / whole`, or `None` if `whole` is 0."""
    return part / whole if whole else None


@dataclass(frozen=True)
class BenchRun:
    """One worker process: its result or error, and the disk's bandwidth around it."""

    variant: Variant
    repeat: int
    link_bytes_s: float  # mean of the probes before and after it, at most the throttled bandwidth
    cached_share: float | None  # of the checkpoint's pages in the page cache at its start
    measured: RandomTokensResult | PromptsResult | None = None
    error: str | None = None  # one line

    @property
    def figures(self) -> dict[str, float | None]:
        """The figures of this run by name; empty if it failed."""
        if isinstance(self.measured, PromptsResult):
            return prompt_figures(self.measured)
        return {} if self.measured is None else random_token_figures(self.measured, self.link_bytes_s)


@dataclass(frozen=True)
class BenchRow:
    """All runs of one variant, and its comparison with other rows."""

    variant: Variant
    runs: tuple[BenchRun, ...]
    # to eager's, up to this row's length; without eager, on real prompts, to the first run's; None without a reference
    tokens_equal: bool | None
    logits_equal: bool | None  # the same, bit for bit
    tpot_ratio: float | None  # to the fastest resident row; median of the ratios within each repeat
    ttft_ratio: float | None
    perplexity_ratio: float | None = None  # to the first row that is not lossy

    @property
    def error(self) -> str | None:
        """Why no run succeeded; `None` if one did."""
        return None if any(run.measured for run in self.runs) else self.runs[-1].error

    def figure(self, name: str) -> float | None:
        """Median of a figure over the runs; `None` if no run has it."""
        values = [value for run in self.runs if (value := run.figures.get(name)) is not None]
        return median(values) if values else None

    @property
    def machine(self) -> dict[str, float | None]:
        """The medians as a machine file for `finemoe simulate --machine`."""
        measured = {name: self.figure(name) for name in MACHINE_SETTINGS}
        tokens = measured["tokens_per_unit"]
        return measured | {"tokens_per_unit": None if tokens is None else round(tokens)}


@dataclass(frozen=True)
class BenchReport:
    """The result of a benchmark. Bandwidths in bytes/s."""

    model: str
    host: dict[str, str | int]
    settings: dict[str, Any]  # of the BenchConfig
    link_direct: bool
    link_bytes_s: tuple[float, ...]  # every probe, in order
    rows: tuple[BenchRow, ...]
    fastest_resident: str | None  # name of the row
    link_limit_bytes_s: float | None = None  # of finemoe's throttled rows; None if they are not
    replayed_routing: str | None = None  # the trace whose routing all rows were forced to
    names: tuple[str, ...] = RANDOM_TOKEN_FIGURES  # of the figures
    perplexity_tokens: int = 0  # 0 if it was not measured
    requests: dict[str, int] | None = None  # numbers of real prompts and their tokens; None on random tokens

    @property
    def tokens_equal(self) -> bool | None:
        """Whether all rows, but lossy and failed ones, have equal tokens; `None` without a comparison."""
        equal = [row.tokens_equal for row in self.rows if row.tokens_equal is not None and not row.variant.lossy]
        return all(equal) if equal else None

    @property
    def failed(self) -> bool:
        """Whether a row failed."""
        return any(row.error is not None for row in self.rows)

    @property
    def tokens_digests(self) -> tuple[str, ...]:
        """The distinct digests of all output tokens to real prompts, without lossy rows: there should be one."""
        runs = [run.measured for row in self.rows if not row.variant.lossy for run in row.runs]
        return tuple(dict.fromkeys(m.tokens_digest for m in runs if isinstance(m, PromptsResult)))

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values: medians first, then every run."""
        return {
            "model": self.model,
            "host": self.host,
            "settings": self.settings,
            "link": {
                "direct": self.link_direct,
                "probes_bytes_s": list(self.link_bytes_s),
                "held_bytes_s": self.link_limit_bytes_s,
            },
            "replayed_routing": self.replayed_routing,
            "fastest_resident": self.fastest_resident,
            "requests": self.requests,
            "perplexity_tokens": self.perplexity_tokens,
            "tokens_equal": self.tokens_equal,
            "tokens_digests": list(self.tokens_digests),
            "rows": [
                {
                    "name": row.variant.name,
                    **asdict(row.variant),
                    "lossy": row.variant.lossy,
                    "error": row.error,
                    **{name: row.figure(name) for name in self.names},
                    "tokens_equal": row.tokens_equal,
                    "logits_equal": row.logits_equal,
                    "tpot_ratio": row.tpot_ratio,
                    "ttft_ratio": row.ttft_ratio,
                    "perplexity_ratio": row.perplexity_ratio,
                    "machine": None if self.requests is None else row.machine,
                    "runs": [_run_dict(run) for run in row.runs],
                }
                for row in self.rows
            ],
        }


def _run_dict(run: BenchRun) -> dict[str, Any]:
    raw = asdict(run)
    return {"subject": raw.pop("variant"), **raw, **run.figures}  # "subject" is the key that users have


def summarise(runs: list[BenchRun]) -> tuple[tuple[BenchRow, ...], str | None]:
    """Groups runs by variant, in order of first appearance, and compares them.

    Returns:
        The rows, and the name of the fastest resident one (lowest median TPOT), if any.
    """
    grouped: dict[Variant, list[BenchRun]] = {}
    for run in runs:
        grouped.setdefault(run.variant, []).append(run)
    eager = Variant("resident", implementation="eager")
    reference = next((run.measured for run in runs if run.measured and run.variant == eager), None)
    if reference is None:
        answered = (run.measured for run in runs if not run.variant.lossy)
        reference = next((measured for measured in answered if isinstance(measured, PromptsResult)), None)
    tpots_s = {
        variant: median(run.figures["tpot_s"] or 0.0 for run in own if run.measured)
        for variant, own in grouped.items()
        if variant.kind == "resident" and any(run.measured for run in own)
    }
    fastest = min(tpots_s, key=tpots_s.__getitem__) if tpots_s else None
    fastest_runs = {run.repeat: run for run in grouped.get(fastest, []) if run.measured} if fastest else {}
    rows = tuple(
        BenchRow(
            variant,
            tuple(own),
            _equal(own, reference, lambda measured: measured.tokens),
            _equal(own, reference, lambda measured: measured.logits),
            _median_ratio(own, fastest_runs, "tpot_s"),
            _median_ratio(own, fastest_runs, "ttft_s"),
        )
        for variant, own in grouped.items()
    )
    rows = _with_perplexity_ratios(rows)
    return rows, fastest.name if fastest else None


def _with_perplexity_ratios(rows: tuple[BenchRow, ...]) -> tuple[BenchRow, ...]:
    exact = next((value for row in rows if not row.variant.lossy and (value := row.figure("perplexity"))), None)
    if exact is None:
        return rows
    return tuple(
        row if (value := row.figure("perplexity")) is None else replace(row, perplexity_ratio=value / exact)
        for row in rows
    )


def _equal(
    runs: list[BenchRun],
    reference: RandomTokensResult | PromptsResult | None,
    sequence: Callable[[RandomTokensResult | PromptsResult], tuple[object, ...]],
) -> bool | None:
    """Whether all runs equal the reference, up to their own length."""
    own = [sequence(run.measured) for run in runs if run.measured]
    if reference is None or not own:
        return None
    return all(mine == sequence(reference)[: len(mine)] for mine in own)


def _median_ratio(runs: list[BenchRun], fastest_runs: dict[int, BenchRun], figure: str) -> float | None:
    """Median of the ratios to the fastest resident row's run of the same repeat."""
    ratios = []
    for run in runs:
        mine = run.figures.get(figure)
        other = fastest_runs[run.repeat].figures.get(figure) if run.repeat in fastest_runs else None
        if mine is not None and other:
            ratios.append(mine / other)
    return median(ratios) if ratios else None
