"""`Maps`: what a policy learned from one model, as arrays, with the policy's name and the model's fingerprint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.policy.base import StateDict
from finemoe.policy.finemoe.history import NO_ROW

Ints = npt.NDArray[np.int64]

ROW_ARRAYS = frozenset({"ids", "weights", "tokens", "before", "maps", "born", "keys"})  # arrays with one entry per map


@dataclass(frozen=True, eq=False)
class Maps:
    """The `n` expert maps of one policy for one model.

    There are two kinds: those of `finemoe`, the rows of its history, have links to the previous row of their request;
    those of `expert-map` have none.

    Attributes:
        policy: its name.
        model: the model's fingerprint.
        name: the model's name, for display.
        layers: `L`.
        experts: the largest `E` of any layer.
        arrays: the policy's `state_dict`; all kinds have `tokens` `[n]`.
    """

    policy: str
    model: str
    name: str
    layers: int
    experts: int
    arrays: StateDict

    def __len__(self) -> int:
        """Number of maps."""
        return len(self.arrays["tokens"])

    @property
    def has_links(self) -> bool:
        """Whether maps are linked to their predecessors; then they are stored oldest first."""
        return "before" in self.arrays

    @property
    def active(self) -> int:
        """K."""
        return int(self.arrays["ids"].shape[2] if self.has_links else self.arrays["active"][0])

    @property
    def embedding_width(self) -> int:
        """`D` of the keys; 0 without keys."""
        return int(self.arrays["keys"].shape[1]) if "keys" in self.arrays else 0

    @property
    def num_sequences(self) -> int | None:
        """Number of runs of linked maps: one per request, more where pruning cut links. `None` without links."""
        return int((self.arrays["before"] == NO_ROW).sum()) if self.has_links else None

    @property
    def memory_bytes(self) -> int:
        """Memory that these maps take in a loaded policy."""
        if self.has_links:
            map_bytes = self.layers * (self.experts + self.active * self.arrays["ids"].itemsize) + 3 * 4
        else:
            map_bytes = 4 * (self.layers * (self.experts + 1) + self.embedding_width) + 2 * 8
        return len(self) * map_bytes

    @property
    def ages(self) -> Ints:
        """`[n]`: how many maps are newer than each."""
        if self.has_links:
            return np.arange(len(self))[::-1]
        ages = np.empty(len(self), np.int64)
        ages[np.argsort(-self.arrays["born"], kind="stable")] = np.arange(len(self))
        return ages

    def incompatibility(self, other: Maps) -> str | None:
        """Why `other` can't be merged with these: the property that differs, with both values. `None` if it can."""
        for name in ("policy", "model", "layers", "experts", "active", "embedding_width"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs and not (name == "embedding_width" and 0 in {ours, theirs}):
                return f"{name}: {theirs} there, {ours} here"
        return None

    def select(self, rows: Sequence[int] | Ints) -> Maps:
        """The maps of these rows only, which must be ascending. Links to rows that are left out are cut."""
        chosen = np.asarray(rows, np.int64)
        arrays = {name: array[chosen] if name in ROW_ARRAYS else array for name, array in self.arrays.items()}
        if self.has_links:
            new_row = np.full(len(self) + 1, NO_ROW, np.int32)  # by old row; the last entry is for `NO_ROW`
            new_row[chosen] = np.arange(len(chosen))
            arrays["before"] = new_row[arrays["before"]]
            arrays["number"] = np.array([len(chosen)])
        return replace(self, arrays=arrays)

    def summary(self) -> dict[str, Any]:
        """A description, ready for JSON."""
        return {
            "policy": self.policy,
            "model": self.name,
            "fingerprint": self.model,
            "maps": len(self),
            "layers": self.layers,
            "experts": self.experts,
            "active": self.active,
            "stretches": self.num_sequences,
            "embedding_width": self.embedding_width,
            "memory_bytes": self.memory_bytes,
        }
