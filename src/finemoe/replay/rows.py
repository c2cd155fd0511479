"""Which rows of a trace the tokens of running requests take.

A request takes the trace's next one that nobody took before. Its decode step t takes that one's decoded iteration t;
if it runs longer, it goes on with the trace's next. A prompt's token at position i takes row i of the recorded prompt,
which starts over where it is shorter; of a trace without prompts, the i-th row from the recorded request's end, so that
decoding does not find just those experts in memory that it is about to use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finemoe.errors import ConfigError, TraceError
from finemoe.trace import DECODE, PREFILL, Trace, open_trace

Rows = NDArray[np.int64]


def open_routing(path: str | Path) -> Trace:
    """A trace to be replayed.

    Raises:
        TraceError: it can't be read, or does not say how much weight each expert had.
    """
    try:
        trace = open_trace(path)
    except TraceError as error:
        raise TraceError(f"--replay-routing: {error}") from error
    if not {"weights", "probs"} & set(trace.header.fields):
        raise TraceError(f"--replay-routing: {path} has neither weights nor probs, only which experts ran")
    return trace


def check_fit(trace: Trace, model: str, layers: int, experts: Sequence[int], active: int) -> None:
    """Refuses a trace of another shape. A model with fewer layers takes the routing of the trace's first ones.

    Args:
        model: its name, for people.
        experts: how many each MoE layer has.
        active: of a token, in a layer.

    Raises:
        ConfigError: the model has more layers, or other numbers of experts.
    """
    header = trace.header
    if layers > header.layers or set(experts) != {header.experts} or active != header.active:
        shape = " or ".join(map(str, sorted(set(experts))))
        raise ConfigError(
            f"--replay-routing: {trace.path} routes to {header.active} of {header.experts} experts in {header.layers} "
            f"layers, {model} to {active} of {shape} in {layers}; give a trace of its shape"
        )


class Course:
    """The rows that one running request takes, as indices into the trace's columns.

    Args:
        trace: what is replayed.
        untaken: recorded requests that no request took yet; shared by all that run.
    """

    def __init__(self, trace: Trace, untaken: Iterator[int]) -> None:
        self._trace = trace
        self._untaken = untaken
        self._prompt, self._decoded = self._take()
        self._fed = 0  # tokens of the prompt
        self._steps = 0

    def feed(self, tokens: int) -> Rows:
        """Rows `[tokens]` of the prompt's next tokens."""
        at = np.arange(self._fed, self._fed + tokens)
        self._fed += tokens
        rows: Rows = self._prompt[at % len(self._prompt)] if len(self._prompt) else self._decoded[-1 - at % len(self)]
        return rows

    def step(self) -> Rows:
        """The row `[1]` of the next token that is decoded."""
        while self._steps == len(self):
            self._steps = 0
            _, self._decoded = self._take()
        self._steps += 1
        return self._decoded[self._steps - 1 : self._steps]

    def __len__(self) -> int:
        """Decoded iterations of the recorded request that is being replayed."""
        return len(self._decoded)

    def _take(self) -> tuple[Rows, Rows]:
        index = next(self._untaken, None)
        if index is None:
            raise TraceError(
                f"--replay-routing: all {len(self._trace)} requests of {self._trace.path} are replayed; ask for fewer "
                "or shorter answers, or give a longer trace"
            )
        request = self._trace.request(index)
        phases = np.repeat(request.phases, np.diff(request.rows))
        first = int(self._trace.row_offsets[index])
        prompt, decoded = (first + np.flatnonzero(phases == phase) for phase in (PREFILL, DECODE))
        return prompt, decoded
