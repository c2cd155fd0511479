"""Where a running model's time goes, by the clock of the machine that runs it. Waiting for experts is none of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from finemoe.durations import NEVER, Durations

TOTALS = ("befores", "afters", "arounds")  # of Tempo


@dataclass
class Tempo:
    """Totals of one engine. On devices, which compute on their own time, all are 0.

    Where a model stands idle between two passes, that is in `arounds` too.

    Args:
        layers: `L`.
    """

    layers: int
    befores: Durations = field(default=NEVER, init=False)  # from a layer's end to the gate of the next one
    afters: Durations = field(default=NEVER, init=False)  # from a gate to the end of its layer
    arounds: Durations = field(default=NEVER, init=False)  # from the last layer's end to the next pass's gate
    _last: int | None = field(default=None, init=False)  # the layer that ran last
    _after: Durations = field(default=NEVER, init=False)  # its part of `afters`
    _end_s: float = field(default=0.0, init=False)  # when it ended
    _gate_s: float = field(default=0.0, init=False)

    def gate(self, layer: int, now_s: float) -> None:
        """The gate of a layer has spoken. Again of the layer that ran last, if that asks expert by expert."""
        since_s, self._gate_s = now_s - self._end_s, now_s
        if self._last is None:
            pass
        elif layer == 0 and self._last == self.layers - 1:
            self.arounds += Durations.one(since_s)
        elif layer == self._last + 1:
            self.befores += Durations.one(since_s)
        elif layer == self._last:  # it goes on
            self.afters -= self._after
            self._gate_s -= self._after.total_s + since_s

    def end(self, layer: int, now_s: float, stalled_s: float) -> None:
        """The layer is done, after so much waiting."""
        self._after = Durations.one(now_s - self._gate_s - stalled_s)
        self.afters += self._after
        self._last, self._end_s = layer, now_s

    def break_off(self) -> None:
        """The layer under way does not end; what comes next does not follow it."""
        self._last = None

    def reset(self) -> None:
        """Start counting anew, in the middle of whatever runs."""
        self.befores = self.afters = self.arounds = self._after = NEVER
