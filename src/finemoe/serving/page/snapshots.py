"""Numbered snapshots of all experts, so that who has seen one is told only what has changed since."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.metrics import PerExpert

FRESH_S = 0.2  # a snapshot younger than this is shared by all who ask
KEPT = 16  # by this many, who polls twice a second may be late
STATES = ("absent", "in flight", "resident", "in use")  # by their number
COLUMNS = ("state", "pinned", "hits", "late", "misses", "prefetched", "wasted")


class Snapshots:
    """The latest snapshots of one model.

    Args:
        take: takes one.
        clock: seconds.
    """

    def __init__(self, take: Callable[[], PerExpert], clock: Callable[[], float] = time.monotonic) -> None:
        self._take = take
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, tuple[PerExpert, npt.NDArray[np.int64]]] = OrderedDict()
        self._number = int(1000 * time.time())  # no number of a server that ran before comes again
        self._taken_s = -np.inf

    def since(self, number: int | None) -> dict[str, Any]:
        """The state of all experts now, as the columns of a table with a row for each; ready for JSON.

        Args:
            number: of a snapshot that the caller has. If it is still known, only rows that differ are told.
        """
        with self._lock:
            if self._clock() - self._taken_s >= FRESH_S:
                self._renew()
            current, (experts, now) = self._number, self._kept[self._number]
            known = self._kept.get(number) if number is not None else None
        width = experts.state.shape[1]
        if known is None:
            rows = np.flatnonzero(np.arange(width) < np.array(experts.experts)[:, None])
        else:
            rows = np.flatnonzero((now != known[1]).any(axis=0))
        layer, expert = np.divmod(rows, width)
        return {
            "snapshot": current,
            "since": None if known is None else number,
            "experts": list(experts.experts),
            "states": list(STATES),
            "layer": layer.tolist(),
            "expert": expert.tolist(),
        } | {name: now[column, rows].tolist() for column, name in enumerate(COLUMNS)}

    def _renew(self) -> None:
        taken = self._take()
        columns = np.stack([getattr(taken, name) for name in COLUMNS], dtype=np.int64).reshape(len(COLUMNS), -1)
        self._number += 1
        self._kept[self._number] = taken, columns
        self._taken_s = self._clock()
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
