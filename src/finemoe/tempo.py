"""Where a running model's time goes, by the clock of the machine that runs it. Waiting for experts is none of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

TOTALS = (
    "before_s", "befores", "before_logs", "before_squares", "after_s", "afters", "around_s", "arounds",
)  # fmt: skip # of Tempo


@dataclass
class Tempo:
    """Totals of one engine, and of how many stretches each is. On devices, which compute on their own time, all are 0.

    Where a model stands idle between two passes, that is in `around_s` too.

    Args:
        layers: `L`.
    """

    layers: int
    before_s: float = field(default=0.0, init=False)  # from a layer's end to the gate of the next one
    befores: int = field(default=0, init=False)
    before_logs: float = field(default=0.0, init=False)  # of these, the sum of their logarithms
    before_squares: float = field(default=0.0, init=False)  # and of the squares of those
    after_s: float = field(default=0.0, init=False)  # from a gate to the end of its layer
    afters: int = field(default=0, init=False)
    around_s: float = field(default=0.0, init=False)  # from the end of the last layer to the next pass's first gate
    arounds: int = field(default=0, init=False)
    _last: int | None = field(default=None, init=False)  # the layer that ran last
    _end_s: float = field(default=0.0, init=False)  # when it ended
    _gate_s: float = field(default=0.0, init=False)

    def gate(self, layer: int, now_s: float) -> None:
        """The gate of a layer has spoken. Again of the layer that ran last, if that asks expert by expert."""
        since_s, self._gate_s = now_s - self._end_s, now_s
        if self._last is None:
            pass
        elif layer == 0 and self._last == self.layers - 1:
            self.around_s += since_s
            self.arounds += 1
        elif layer == self._last + 1:
            self.before_s += since_s
            self.befores += 1
            log = math.log(max(since_s, 1e-9))
            self.before_logs += log
            self.before_squares += log * log
        elif layer == self._last:
            self.after_s += since_s
            self.afters -= 1

    def end(self, layer: int, now_s: float, stalled_s: float) -> None:
        """The layer is done, after so much waiting."""
        self.after_s += now_s - self._gate_s - stalled_s
        self.afters += 1
        self._last, self._end_s = layer, now_s

    def break_off(self) -> None:
        """The layer under way does not end; what comes next does not follow it."""
        self._last = None

    def reset(self) -> None:
        """Start counting anew, in the middle of whatever runs."""
        self.before_s = self.before_logs = self.before_squares = self.after_s = self.around_s = 0.0
        self.befores = self.afters = self.arounds = 0
