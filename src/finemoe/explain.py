"""What a policy's decisions came to, by layer and by what had brought each expert in; and its layout for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Source = Literal["demand", "kept", "prefetch", "prefetch-next"]
COUNTS = ("predicted", "hits", "late", "misses", "wasted")


@dataclass(frozen=True)
class Explained:
    """Counts of one layer and one source; the sums over all of them are the engine's own counters.

    `demand`: a miss had brought the expert in, or brings it in now. `kept`: a prefetch had, and it was used before.
    `prefetch`: a prefetch that this was the first use of, `distance` layers ahead of the layer whose gate had spoken
    last (before the first gate, layer 0 is 1 ahead). `prefetch-next`: the same, for the iteration after.
    """

    layer: int
    source: Source
    distance: int | None
    predicted: int  # prefetches begun
    hits: int
    late: int
    misses: int
    wasted: int  # prefetched, and evicted or withdrawn without having been needed

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Explained:
        return cls(**raw)

    @property
    def name(self) -> str:
        """Of the source, for people."""
        if self.source == "prefetch":
            return f"prefetched {self.distance} ahead"
        return {"demand": "demand", "kept": "kept after prefetch"}.get(self.source, "prefetched, next token")


def explain_table(rows: Sequence[Explained]) -> str:
    """Two tables: by source over all layers, and by layer over all sources."""
    order = {"demand": 0, "kept": 1, "prefetch": 2, "prefetch-next": 3}
    ranked = sorted(rows, key=lambda row: (order[row.source], row.distance or 0))
    by_source = _summed(ranked, lambda row: row.name)
    by_layer = _summed(sorted(rows, key=lambda row: row.layer), lambda row: f"layer {row.layer}")
    return "\n".join([*_lines("experts from", by_source), "", *_lines("in", by_layer)])


def _summed(rows: Sequence[Explained], name: Callable[[Explained], str]) -> dict[str, list[int]]:
    sums: dict[str, list[int]] = {}
    for row in rows:
        own = sums.setdefault(name(row), [0] * len(COUNTS))
        for column, count in enumerate(COUNTS):
            own[column] += getattr(row, count)
    return sums


def _lines(title: str, sums: dict[str, list[int]]) -> list[str]:
    width = max(len(title), *map(len, sums), 0) if sums else len(title)
    head = title.ljust(width) + "".join(count.rjust(11) for count in COUNTS)
    return [head, *(name.ljust(width) + "".join(f"{n:11}" for n in counts) for name, counts in sums.items())]
