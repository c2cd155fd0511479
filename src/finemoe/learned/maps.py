"""What a policy learned from one model, with what tells whose it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from finemoe.policy.base import StateDict
from finemoe.policy.finemoe.history import NO_ROW

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Maps:
    """The maps of one policy for one model; `arrays` are what its `state_dict` handed out.

    Attributes:
        policy: its name.
        model: the model's fingerprint.
        name: of the model, for people.
        layers: `L`.
        experts: the largest `E` of any layer.
        arrays: by name; `tokens` `[n]` are there under every policy.
    """

    policy: str
    model: str
    name: str
    layers: int
    experts: int
    arrays: StateDict

    def __len__(self) -> int:
        """How many maps."""
        return len(self.arrays["tokens"])

    @property
    def has_links(self) -> bool:
        """Whether maps know the one before them: then they lie oldest first."""
        return "before" in self.arrays

    @property
    def active(self) -> int:
        """K."""
        return int(self.arrays["ids"].shape[2] if self.has_links else self.arrays["active"][0])

    @property
    def num_sequences(self) -> int | None:
        """Runs of successive iterations: the requests, unless one was cut by pruning. `None` where nobody knows."""
        return int((self.arrays["before"] == NO_ROW).sum()) if self.has_links else None

    @property
    def memory_bytes(self) -> int:
        """What these maps take in a loaded policy."""
        if self.has_links:
            of_one = self.layers * (self.experts + self.active * self.arrays["ids"].itemsize) + 3 * 4
        else:
            width = self.arrays["keys"].shape[1] if "keys" in self.arrays else 0
            of_one = 4 * (self.layers * (self.experts + 1) + width) + 2 * 8
        return len(self) * of_one

    @property
    def ages(self) -> Ints:
        """`[n]`: how many maps are newer than each."""
        if self.has_links:
            return np.arange(len(self))[::-1]
        ages = np.empty(len(self), np.int64)
        ages[np.argsort(-self.arrays["born"], kind="stable")] = np.arange(len(self))
        return ages

    def incompatibility(self, other: Maps) -> str | None:
        """What keeps `other` from being merged with these; `None` if nothing does."""
        for name in ("policy", "model", "layers", "experts", "active", "width"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs and not (name == "width" and 0 in {ours, theirs}):
                return f"{name}: {theirs} there, {ours} here"
        return None

    @property
    def embedding_width(self) -> int:
        """`D`, of the keys; 0 without any."""
        return int(self.arrays["keys"].shape[1]) if "keys" in self.arrays else 0

    def select(self, rows: Sequence[int] | Ints) -> Maps:
        """The maps of ascending rows alone. A map whose predecessor is not among them has none any more."""
        chosen = np.asarray(rows, np.int64)
        arrays = {name: array[chosen] if name in ROW_ARRAYS else array for name, array in self.arrays.items()}
        if self.has_links:
            place = np.full(len(self) + 1, NO_ROW, np.int32)  # the last entry is nobody's
            place[chosen] = np.arange(len(chosen))
            arrays["before"] = place[arrays["before"]]
            arrays["number"] = np.array([len(chosen)])
        return replace(self, arrays=arrays)

    def summary(self) -> dict[str, Any]:
        """What there is, ready for JSON."""
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


ROW_ARRAYS = frozenset({"ids", "weights", "tokens", "before", "maps", "born", "keys"})  # one entry for each map
