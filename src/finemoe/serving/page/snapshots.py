"""Snapshots of all experts, and the rows that changed between two of them."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.metrics import PerExpert

MAX_AGE_S = 0.2  # clients share a snapshot that is younger than this
MAX_SNAPSHOTS = 16  # kept as the base of differences
STATES = ("absent", "in flight", "resident", "in use")  # by number
COLUMNS = ("state", "pinned", "hits", "late", "misses", "prefetched", "wasted")


class SnapshotCache:
    """The latest snapshots of one model. Thread-safe.

    Args:
        take: takes a snapshot.
        clock: returns seconds.
    """

    def __init__(self, take: Callable[[], PerExpert], clock: Callable[[], float] = time.monotonic) -> None:
        self._take = take
        self._clock = clock
        self._lock = threading.Lock()
        self._snapshots: OrderedDict[int, tuple[PerExpert, npt.NDArray[np.int64]]] = OrderedDict()
        self._number = int(1000 * time.time())  # above all numbers of a server that ran before
        self._taken_s = -np.inf

    def since(self, number: int | None) -> dict[str, Any]:
        """The current state of the experts as columns, ready for JSON; the fields of `Experts`.

        Args:
            number: of an earlier snapshot. If it is still kept, only the rows that differ from it are returned.
        """
        with self._lock:
            if self._clock() - self._taken_s >= MAX_AGE_S:
                self._renew()
            current, (experts, columns) = self._number, self._snapshots[self._number]
            base = self._snapshots.get(number) if number is not None else None
        width = experts.state.shape[1]
        if base is None:
            rows = np.flatnonzero(np.arange(width) < np.array(experts.experts)[:, None])
        else:
            rows = np.flatnonzero((columns != base[1]).any(axis=0))
        layer, expert = np.divmod(rows, width)
        return {
            "snapshot": current,
            "since": None if base is None else number,
            "experts": list(experts.experts),
            "states": list(STATES),
            "layer": layer.tolist(),
            "expert": expert.tolist(),
        } | {name: columns[column, rows].tolist() for column, name in enumerate(COLUMNS)}

    def _renew(self) -> None:
        experts = self._take()
        columns = np.stack([getattr(experts, name) for name in COLUMNS], dtype=np.int64).reshape(len(COLUMNS), -1)
        self._number += 1
        self._snapshots[self._number] = experts, columns
        self._taken_s = self._clock()
        if len(self._snapshots) > MAX_SNAPSHOTS:
            self._snapshots.popitem(last=False)
