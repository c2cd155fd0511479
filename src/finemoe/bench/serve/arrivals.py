"""Request arrivals and lengths of a published trace.

The trace is a CSV with `TIMESTAMP`, `ContextTokens` and `GeneratedTokens`, as the Azure LLM inference traces. Times are
scaled to a mean rate, which keeps bursts and lulls; lengths are scaled and clipped, which keeps their distribution.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from finemoe.bench.serve.client import TimedRequest
from finemoe.errors import ConfigError

LEAST_PROMPT, LEAST_ANSWER = 8, 4  # tokens


@dataclass(frozen=True)
class TraceArrival:
    """A request of the trace."""

    at_s: float  # after the first, or after a window's start
    context_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class LengthScale:
    """Scales and clips the trace's lengths."""

    prompt: float
    answer: float
    max_prompt_tokens: int
    max_answer_tokens: int

    def prompt_tokens(self, arrival: TraceArrival) -> int:
        return _clipped(arrival.context_tokens * self.prompt, LEAST_PROMPT, self.max_prompt_tokens)

    def answer_tokens(self, arrival: TraceArrival) -> int:
        return _clipped(arrival.generated_tokens * self.answer, LEAST_ANSWER, self.max_answer_tokens)


def _clipped(tokens: float, least: int, most: int) -> int:
    return min(max(round(tokens), least), most)


def read_arrivals(path: Path) -> list[TraceArrival]:
    """All arrivals of a trace, by time.

    Raises:
        ConfigError: the file can't be read, or is no such trace.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [
                (datetime.fromisoformat(row["TIMESTAMP"][:26]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
                for row in csv.DictReader(file)
            ]
    except OSError as error:
        raise ConfigError(f"--arrivals: {path} can't be read ({error.strerror})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"--arrivals: {path} lacks TIMESTAMP, ContextTokens or GeneratedTokens ({error})") from error
    rows.sort(key=lambda row: row[0])
    if len(rows) < 2 or rows[0][0] == rows[-1][0]:
        raise ConfigError(f"--arrivals: {path} has no two requests at different times")
    return [TraceArrival((at - rows[0][0]).total_seconds(), context, answer) for at, context, answer in rows]


def mean_rate(arrivals: Sequence[TraceArrival]) -> float:
    """Requests/s."""
    return (len(arrivals) - 1) / (arrivals[-1].at_s - arrivals[0].at_s)


def window(arrivals: Sequence[TraceArrival], rate: float, begin_s: float, end_s: float) -> list[TraceArrival]:
    """The arrivals from `begin_s` up to, not including, `end_s`, after the times of all are scaled to `rate`.

    Args:
        arrivals: the whole trace.
        rate: mean requests/s of the whole trace after scaling.
        begin_s: start, in scaled time.
        end_s: end, in scaled time.

    Returns:
        arrivals with scaled times, from the window's start.
    """
    scale = mean_rate(arrivals) / rate
    scaled = ((arrival.at_s * scale, arrival) for arrival in arrivals)
    return [
        TraceArrival(at_s - begin_s, arrival.context_tokens, arrival.generated_tokens)
        for at_s, arrival in scaled
        if begin_s <= at_s < end_s
    ]


def make_requests(
    arrivals: Sequence[TraceArrival],
    prompts: Sequence[str],
    lengths: LengthScale,
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[Sequence[int]], str],
    first: int = 0,
) -> list[TimedRequest]:
    """Requests at the arrivals' times, with text of their lengths: consecutive prompts, joined and cut.

    Args:
        arrivals: times and lengths.
        prompts: texts, used in turn from number `first` on.
        lengths: scales the arrivals' lengths.
        encode: text to token ids.
        decode: token ids to text.
        first: number of the first prompt.
    """
    requests, at = [], first
    for arrival in arrivals:
        length, ids = lengths.prompt_tokens(arrival), list[int]()
        while len(ids) < length:
            ids += encode(prompts[at % len(prompts)] + "\n\n")
            at += 1
        requests.append(TimedRequest(decode(ids[:length]).strip(), lengths.answer_tokens(arrival), arrival.at_s))
    return requests
