"""The comparison as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cap import CapUsage
from peer import Result

from finemoe.budget import format_bytes

COLUMNS = ("", "load s", "TTFT s", "tok/s", "read/token", "peak memory", "cap", "same tokens")


@dataclass(frozen=True)
class Row:
    """One engine: its measurements, or why there are none."""

    name: str
    result: Result | None = None
    usage: CapUsage | None = None  # of the cap; None: it ran without one
    at_once: bool = True  # whether the cap was in force during loading
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Mean time to the first token."""
        return None if self.result is None else mean([answer.seconds[0] for answer in self.result.answers])

    @property
    def tok_s(self) -> float | None:
        """Tokens/s after the first token of each answer."""
        if self.result is None:
            return None
        seconds = [second for answer in self.result.answers for second in answer.seconds[1:]]
        return len(seconds) / sum(seconds) if seconds else None

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes read from storage per token after the first of each answer."""
        if self.result is None:
            return None
        tokens = sum(len(answer.tokens) - 1 for answer in self.result.answers)
        return sum(answer.decode_bytes for answer in self.result.answers) / tokens if tokens else None

    @property
    def peak_bytes(self) -> int | None:
        """Peak memory: of the cgroup, including page cache; without a cap, the peak resident set."""
        if self.result is None:
            return None
        return self.result.peak_rss_bytes if self.usage is None else self.usage.peak_bytes

    def differs_at(self, reference: Row | None) -> tuple[int, int] | None:
        """Prompt and token at which the answers first differ from the reference's; `None` if they are equal."""
        assert self.result is not None and reference is not None and reference.result is not None
        for prompt, (own, other) in enumerate(zip(self.result.answers, reference.result.answers, strict=True)):
            for at, (mine, theirs) in enumerate(zip(own.tokens, other.tokens, strict=True)):
                if mine != theirs:
                    return prompt, at
        return None

    def tokens_equal(self, reference: Row | None) -> bool | None:
        """Whether all answers are the reference's; `None` if one of the two has none."""
        if self.result is None or reference is None or reference.result is None:
            return None
        return self.differs_at(reference) is None

    def as_dict(self, reference: Row | None) -> dict[str, Any]:
        """For JSON: derived figures, then the measurements."""
        return {
            "name": self.name,
            "error": self.error,
            "ttft_s": self.ttft_s,
            "tok_s": self.tok_s,
            "bytes_per_token": self.bytes_per_token,
            "peak_bytes": self.peak_bytes,
            "tokens_equal": self.tokens_equal(reference),
            "cap": None
            if self.usage is None
            else asdict(self.usage) | {"felt": self.usage.reached, "at_once": self.at_once},
            "measured": None if self.result is None else asdict(self.result),
        }


def mean(values: list[float]) -> float | None:
    """`None` for an empty list."""
    return sum(values) / len(values) if values else None


def render(rows: list[Row], reference: Row | None) -> str:
    """A Markdown table, and a line for each engine without figures."""
    cells = [[row.name, *_cells(row, reference)] for row in rows if row.result is not None]
    widths = [max(len(line[at]) for line in [COLUMNS, *cells]) for at in range(len(COLUMNS))]

    def line(values: list[str]) -> str:
        padded = [
            value.rjust(width) if at else value.ljust(width)
            for at, (value, width) in enumerate(zip(values, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 1) + (":" if at else "-") for at, width in enumerate(widths)) + "|"
    lines = [line(list(COLUMNS)), rule, *map(line, cells)]
    return "\n".join([*lines, "", *(f"{row.name}: {row.error}" for row in rows if row.error)]).rstrip()


def _cells(row: Row, reference: Row | None) -> list[str]:
    assert row.result is not None
    read, peak = row.bytes_per_token, row.peak_bytes
    return [
        f"{row.result.load_s:.1f}",
        "-" if row.ttft_s is None else f"{row.ttft_s:.2f}",
        "-" if row.tok_s is None else f"{row.tok_s:.2f}",
        "-" if read is None else format_bytes(read),
        "-" if peak is None else format_bytes(peak),
        _cap(row),
        _same(row, reference),
    ]


def _cap(row: Row) -> str:
    if row.usage is None:
        return "none"
    return ("reached" if row.usage.reached else "not reached") + ("" if row.at_once else ", after loading")


def _same(row: Row, reference: Row | None) -> str:
    equal = row.tokens_equal(reference)
    if equal is None or row is reference:
        return "-"
    if equal:
        return "yes"
    prompt, at = row.differs_at(reference) or (0, 0)
    return f"NO, from token {at + 1} of prompt {prompt + 1}"
