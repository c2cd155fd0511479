"""When requests come and how long they are, from a published trace; for `load.py`.

The trace: a CSV with `TIMESTAMP`, `ContextTokens` and `GeneratedTokens`, as of the Azure LLM inference traces. Times
are stretched to a rate, so that bursts and lulls stay; lengths are scaled down and bounded, so that their shape stays.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

LEAST_PROMPT, LEAST_ANSWER = 8, 4  # tokens


@dataclass(frozen=True)
class Arrival:
    """A request of the trace."""

    at_s: float  # after the first
    context_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class Ask:
    """A request as it is sent."""

    at_s: float  # after the window's begin
    prompt: str | list[int]  # text, or token ids
    prompt_tokens: int  # of the text; a chat template adds its own
    max_tokens: int


@dataclass(frozen=True)
class Lengths:
    """How the trace's lengths become those that are sent: times a scale, then at most so many tokens."""

    prompt_scale: float
    answer_scale: float
    max_prompt_tokens: int
    max_answer_tokens: int

    def prompt(self, arrival: Arrival) -> int:
        return _bounded(arrival.context_tokens * self.prompt_scale, LEAST_PROMPT, self.max_prompt_tokens)

    def answer(self, arrival: Arrival) -> int:
        return _bounded(arrival.generated_tokens * self.answer_scale, LEAST_ANSWER, self.max_answer_tokens)


def _bounded(tokens: float, least: int, most: int) -> int:
    return min(max(round(tokens), least), most)


def read_arrivals(path: Path) -> list[Arrival]:
    """All of the trace, in the order of time.

    Raises:
        SystemExit: it is no such file.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [
                (datetime.fromisoformat(row["TIMESTAMP"][:26]), int(row["ContextTokens"]), int(row["GeneratedTokens"]))
                for row in csv.DictReader(file)
            ]
    except OSError as error:
        raise SystemExit(f"--arrivals: {path} can't be read ({error.strerror})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"--arrivals: {path} lacks TIMESTAMP, ContextTokens or GeneratedTokens ({error})") from error
    if len(rows) < 2:
        raise SystemExit(f"--arrivals: {path} holds no two requests")
    rows.sort(key=lambda row: row[0])
    return [Arrival((at - rows[0][0]).total_seconds(), context, answer) for at, context, answer in rows]


def mean_rate(arrivals: Sequence[Arrival]) -> float:
    """Requests/s."""
    return (len(arrivals) - 1) / (arrivals[-1].at_s - arrivals[0].at_s)


def window(arrivals: Sequence[Arrival], rate: float, begin_s: float, window_s: float) -> list[Arrival]:
    """The arrivals of a stretch of the trace, `begin_s` to `begin_s + window_s` after all of it is stretched to `rate`.

    Args:
        arrivals: of the whole trace.
        rate: requests/s, that the whole trace has then on average.
        begin_s: in stretched time.
        window_s: the same.

    Returns:
        arrivals whose times are stretched, and count from the window's begin.
    """
    stretch = mean_rate(arrivals) / rate
    inside = ((arrival.at_s * stretch - begin_s, arrival) for arrival in arrivals)
    return [
        Arrival(at_s, arrival.context_tokens, arrival.generated_tokens)
        for at_s, arrival in inside
        if 0 <= at_s < window_s
    ]


def fill(
    arrivals: Sequence[Arrival],
    prompts: Sequence[str],
    lengths: Lengths,
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[Sequence[int]], str],
    first: int = 0,
) -> list[Ask]:
    """What is sent: prompts in turn, from the one numbered `first` on.

    One that is too long is cut; one that is too short is followed by the next ones.
    """
    asks, at = [], first
    for arrival in arrivals:
        wanted, ids = lengths.prompt(arrival), list[int]()
        while len(ids) < wanted:
            ids += encode(prompts[at % len(prompts)] + "\n\n")
            at += 1
        asks.append(Ask(arrival.at_s, decode(ids[:wanted]).strip(), wanted, lengths.answer(arrival)))
    return asks
