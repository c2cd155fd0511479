"""A benchmark's report as a text table with a legend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from finemoe.bench.config import BATCHED
from finemoe.bench.row_metrics import BenchReport, BenchRow
from finemoe.budget import format_bytes
from finemoe.metrics import explain_table

MIB = 1 << 20


def render(report: BenchReport) -> str:
    """The report as text."""
    columns = _COLUMNS if report.requests is None else _PROMPT_COLUMNS
    if report.perplexity_tokens:
        columns = (*columns, *_PERPLEXITY_COLUMNS)
    lines = [
        f"model {report.model}",
        "host  " + ", ".join(f"{key} {value}" for key, value in report.host.items()),
        _link_line(report),
        *_link_limit_lines(report),
        *_replay_lines(report),
        *_request_lines(report),
        "",
        *align([[title for title, _ in columns], *([cell(row) for _, cell in columns] for row in report.rows)]),
    ]
    lines += [f"{row.variant.name}: {row.error}" for row in report.rows if row.error]
    return "\n".join([*lines, "", *_legend(report), *_perplexity_legend(report), *_explain_tables(report)])


def _explain_tables(report: BenchReport) -> list[str]:
    """The `--explain` table of each row's last run."""
    lines = []
    for row in report.rows:
        explained = [m.explained for run in row.runs if (m := run.measured) and m.explained is not None]
        if explained:
            lines += ["", row.variant.name, explain_table(explained[-1])]
    return lines


def _link_line(report: BenchReport) -> str:
    if not report.link_bytes_s:
        return "disk  not measured"
    how = "direct" if report.link_direct else "buffered"
    low, middle, high = (f(report.link_bytes_s) / 1e9 for f in (min, median, max))
    return (
        f"disk  {middle:.2f} GB/s ({low:.2f} to {high:.2f} in {len(report.link_bytes_s)} probes; "
        f"random {how} reads of 1 MiB, 4 threads)"
    )


def _link_limit_lines(report: BenchReport) -> list[str]:
    limit = report.link_limit_bytes_s
    return [] if limit is None else [f"link  finemoe's throttled to {format_bytes(limit)}/s (--link-bandwidth)"]


def _replay_lines(report: BenchReport) -> list[str]:
    trace = report.replayed_routing
    return (
        [] if trace is None else [f"routing  of all rows replayed from {trace} (--replay-routing); text is meaningless"]
    )


def _request_lines(report: BenchReport) -> list[str]:
    if report.requests is None:
        return []
    sizes = report.requests
    warm = f", after {sizes['warm_requests']} unmeasured ones" if sizes["warm_requests"] else ""
    if sizes["stored_requests"]:
        warm += f", policies trained on {sizes['stored_requests']} recorded ones"
    return [f"asked {sizes['requests']} prompts of {sizes['prompt_tokens']} tokens in all{warm}; greedy answers"]


def _prompt_legend(report: BenchReport) -> list[str]:
    digests = report.tokens_digests
    same = "all rows have the same" if len(digests) == 1 else "THE ROWS DIFFER IN THEIR"
    lines = [
        "TTFT: first token; TPOT: a request's mean time per later token. Mean, median and p95 over requests.",
        "prefill, decode: hits / late / misses among the experts that first tokens needed, and later ones.",
        "stall: share of the time that layers waited for experts. used: share of prefetches; wasted: experts.",
        "Each row starts with an empty pool; its policy learns from one request to the next.",
        f"output tokens: {same} (digest {', '.join(digests)})" if digests else "output tokens: none",
    ]
    if report.fastest_resident:
        lines.append(f"x: ratio to the fastest resident row, {report.fastest_resident}, in the same repeat.")
    return lines


def _legend(report: BenchReport) -> list[str]:
    if report.requests is not None:
        return _prompt_legend(report)
    lines = [
        "TTFT: first token of a prompt after a cold start. TPOT: a later token's time, median and mean.",
        "hits, MiB/tok, stall, link: while decoding. stall: share of the time that layers waited for experts.",
        "link: bytes moved while stalled / (stall x the disk's bandwidth around that row).",
        "over: peak resident set minus dense weights and pool.",
        "tokens, logits: equal to transformers' eager with the whole model in memory; logits bit for bit.",
    ]
    if report.fastest_resident:
        lines.append(f"x: ratio to the fastest resident row, {report.fastest_resident}, in the same repeat.")
    if any(row.variant.implementation == BATCHED for row in report.rows):
        lines.append(
            "batched_mm gets prompts in chunks of 16 tokens, as it copies an expert's weights for every token."
        )
    if any(row.variant.kind == "disk-offload" for row in report.rows):
        lines += [
            "disk offload: from_pretrained(device_map='auto', max_memory=..), as much memory as finemoe's first row.",
            "It re-saves offloaded experts, fused, and reads all of a layer; page cache evicted before each token.",
        ]
    return lines


def _perplexity_legend(report: BenchReport) -> list[str]:
    lines = []
    if report.perplexity_tokens:
        text = report.settings.get("perplexity") or "Python's reference manual"
        lines.append(
            f"perplexity: on {report.perplexity_tokens} tokens of {text}; change: against the first row that "
            "is not lossy."
        )
    if lossy := [row.variant.name for row in report.rows if row.variant.lossy]:
        lines.append(f"LOSSY (--expert-dtype), answers differ from the checkpoint's: {', '.join(lossy)}.")
    return lines


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Pads columns to their widest cell: the first left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _number(name: str, form: str, scale: float = 1.0) -> Callable[[BenchRow], str]:
    def cell(row: BenchRow) -> str:
        value = row.figure(name)
        return "-" if value is None else format(value * scale, form)

    return cell


def _size(name: str) -> Callable[[BenchRow], str]:
    def cell(row: BenchRow) -> str:
        value = row.figure(name)
        return "-" if value is None else format_bytes(value)

    return cell


def _weights(row: BenchRow) -> str:
    dense, pool = row.figure("dense_bytes"), row.figure("pool_bytes")
    return "-" if dense is None or pool is None else format_bytes(dense + pool)


def _hit_late_miss(phase: str) -> Callable[[BenchRow], str]:
    def cell(row: BenchRow) -> str:
        rates = [row.figure(f"{phase}_{outcome}_rate") for outcome in ("hit", "late", "miss")]
        return "-" if None in rates else " / ".join(f"{100 * (rate or 0):.1f}" for rate in rates) + "%"

    return cell


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _yes_no(value: bool | None) -> str:  # noqa: FBT001 - a cell's content
    return "-" if value is None else "yes" if value else "NO"


_COLUMNS: tuple[tuple[str, Callable[[BenchRow], str]], ...] = (
    ("", lambda row: row.variant.name + (" FAILED" if row.error else "")),
    ("load s", _number("load_s", ".1f")),
    ("TTFT s", _number("ttft_s", ".2f")),
    ("x", lambda row: _ratio(row.ttft_ratio)),
    ("TPOT ms", _number("tpot_s", ".1f", 1000)),
    ("mean", _number("tpot_mean_s", ".1f", 1000)),
    ("x", lambda row: _ratio(row.tpot_ratio)),
    ("tok/s", _number("tok_s", ".2f")),
    ("hits", _number("hit_rate", ".1%")),
    ("MiB/tok", _number("bytes_per_token", ".0f", 1 / MIB)),
    ("stall", _number("stall_share", ".0%")),
    ("link", _number("link_utilisation", ".0%")),
    ("peak RSS", _size("peak_rss_bytes")),
    ("dense+pool", _weights),
    ("over", _size("overhead_bytes")),
    ("tokens", lambda row: _yes_no(row.tokens_equal)),
    ("logits", lambda row: _yes_no(row.logits_equal)),
)

_PERPLEXITY_COLUMNS: tuple[tuple[str, Callable[[BenchRow], str]], ...] = (
    ("perplexity", _number("perplexity", ".4f")),
    ("change", lambda row: "-" if row.perplexity_ratio is None else f"{row.perplexity_ratio - 1:+.2%}"),
)

_PROMPT_COLUMNS: tuple[tuple[str, Callable[[BenchRow], str]], ...] = (
    ("", lambda row: row.variant.name + (" FAILED" if row.error else "")),
    ("TTFT s", _number("ttft_s", ".2f")),
    ("p50", _number("ttft_p50_s", ".2f")),
    ("p95", _number("ttft_p95_s", ".2f")),
    ("TPOT ms", _number("tpot_s", ".1f", 1000)),
    ("p50", _number("tpot_p50_s", ".1f", 1000)),
    ("p95", _number("tpot_p95_s", ".1f", 1000)),
    ("x", lambda row: _ratio(row.tpot_ratio)),
    ("prefill", _hit_late_miss("prefill")),
    ("decode", _hit_late_miss("decode")),
    ("stall", _number("stall_share", ".0%")),
    ("MiB/tok", _number("bytes_per_token", ".0f", 1 / MIB)),
    ("read", _size("bytes_read")),
    ("used", _number("precision", ".0%")),
    ("wasted", _number("wasted", ".0f")),
    ("peak RSS", _size("peak_rss_bytes")),
    ("tokens", lambda row: _yes_no(row.tokens_equal)),
    ("logits", lambda row: _yes_no(row.logits_equal)),
)
