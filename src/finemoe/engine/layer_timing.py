"""Where a running model's time goes, by the clock of the machine that runs it. Waiting for experts is none of it."""

from __future__ import annotations

from finemoe.metrics import Durations, Timings

TOTALS = ("befores", "afters", "arounds")  # of Tempo


class LayerTiming:
    """Totals of one engine. On devices, which compute on their own time, all are 0.

    Where a model stands idle between two passes, that is in `arounds` too.

    Args:
        layers: `L`.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._befores, self._afters, self._arounds = Timings(), Timings(), Timings()
        self._last: int | None = None  # the layer that ran last
        self._after_s: float | None = None  # its part of `afters`, once it has ended
        self._end_s = 0.0  # when it did
        self._gate_s = 0.0

    @property
    def befores(self) -> Durations:
        """From a layer's end to the gate of the next one."""
        return self._befores.so_far

    @property
    def afters(self) -> Durations:
        """From a gate to the end of its layer."""
        return self._afters.so_far

    @property
    def arounds(self) -> Durations:
        """From the last layer's end to the next pass's gate."""
        return self._arounds.so_far

    def gate(self, layer: int, now_s: float) -> None:
        """The gate of a layer has spoken. Again of the layer that ran last, if that asks expert by expert."""
        since_s, self._gate_s = now_s - self._end_s, now_s
        if self._last is None:
            pass
        elif layer == 0 and self._last == self.layers - 1:
            self._arounds.add(since_s)
        elif layer == self._last + 1:
            self._befores.add(since_s)
        elif layer == self._last:  # it goes on
            if self._after_s is not None:
                self._afters.take_back(self._after_s)
            self._gate_s -= (self._after_s or 0.0) + since_s

    def end(self, layer: int, now_s: float, stalled_s: float) -> None:
        """The layer is done, after so much waiting."""
        self._after_s = now_s - self._gate_s - stalled_s
        self._afters.add(self._after_s)
        self._last, self._end_s = layer, now_s

    def break_off(self) -> None:
        """The layer under way does not end; what comes next does not follow it."""
        self._last = None

    def reset(self) -> None:
        """Start counting anew, in the middle of whatever runs."""
        for timings in (self._befores, self._afters, self._arounds):
            timings.reset()
        self._after_s = None
