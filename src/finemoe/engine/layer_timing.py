"""Wall-clock time of a model's layers and of what runs between them, without the time spent waiting for experts."""

from __future__ import annotations

from finemoe.metrics import Durations, Timings

TOTALS = ("befores", "afters", "arounds")  # attributes of LayerTiming, and their keys in the results of `finemoe bench`


class LayerTiming:
    """Layer times of one engine, attached to it by `finemoe bench` (`ModelHandle.attach_timing`).

    All are 0 on GPUs, which run asynchronously.

    Args:
        layers: `L`.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._befores, self._afters, self._arounds = Timings(), Timings(), Timings()
        self._last_layer: int | None = None
        self._last_after_s: float | None = None  # its contribution to `afters`, once it has ended
        self._last_end_s = 0.0
        self._routed_s = 0.0

    @property
    def befores(self) -> Durations:
        """From the end of a layer's experts to the next layer's routing: attention, norms, the gate."""
        return self._befores.so_far

    @property
    def afters(self) -> Durations:
        """From a layer's routing to the end of its experts."""
        return self._afters.so_far

    @property
    def arounds(self) -> Durations:
        """From the end of a pass's last layer to the routing of the next pass's first. Includes idle time between."""
        return self._arounds.so_far

    def layer_routed(self, layer: int, now_s: float) -> None:
        """The routing of a layer is known. May be called several times for one layer that runs expert by expert."""
        since_s, self._routed_s = now_s - self._last_end_s, now_s
        if self._last_layer is None:
            pass
        elif layer == 0 and self._last_layer == self.layers - 1:
            self._arounds.add(since_s)
        elif layer == self._last_layer + 1:
            self._befores.add(since_s)
        elif layer == self._last_layer:  # the same layer continues: its parts become one duration
            if self._last_after_s is not None:
                self._afters.take_back(self._last_after_s)
            self._routed_s -= (self._last_after_s or 0.0) + since_s

    def layer_done(self, layer: int, now_s: float, stalled_s: float) -> None:
        """A layer's experts are done; `stalled_s` of the time since its routing was spent waiting for them."""
        self._last_after_s = now_s - self._routed_s - stalled_s
        self._afters.add(self._last_after_s)
        self._last_layer, self._last_end_s = layer, now_s

    def discard_layer(self) -> None:
        """The running layer was aborted: it is not counted, nor is the time up to the next layer."""
        self._last_layer = None

    def reset(self) -> None:
        """Restart all totals. May be called between any two layers."""
        for timings in (self._befores, self._afters, self._arounds):
            timings.reset()
        self._last_after_s = None
