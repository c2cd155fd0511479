"""Maps that several processes share: each publishes what is new, and pulls what all of them know."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np

from finemoe.errors import MapsError
from finemoe.learned.compaction import merge
from finemoe.learned.maps import Maps
from finemoe.policy.base import StateDict

SHARED_MAPS = 100_000  # that a store holds unless told otherwise
_PENDING = 16  # publications that are merged at once


class Version(NamedTuple):
    """Of a store's contents.

    Attributes:
        store: which it is: another one where the store was lost and begun anew.
        number: rises.
    """

    store: str
    number: int

    def follows(self, other: Version | None) -> bool:
        """Whether nothing lies between the two."""
        return other is not None and self == (other.store, other.number + 1)


class Pulled(NamedTuple):
    """All that a store holds; `maps` is `None` for nothing."""

    version: Version
    maps: Maps | None


class SharedMaps(Protocol):
    """A store of maps of one model and policy, bounded: the newest stay. Safe to call from any thread.

    What goes wrong is any exception: who shares goes on without, and tries again later.
    """

    def publish(self, maps: Maps) -> Version:
        """Adds maps that nobody has published before.

        Returns:
            The store's version then. Where it follows that of the last `pull`, nobody else has published since.

        Raises:
            MapsError: they are of another model, policy or shape than what is there.
        """

    def pull(self, since: Version | None = None) -> Pulled | None:
        """All maps; `None` if the store is of version `since` still."""


class LocalMaps:
    """Shared within a process; what other stores are made of.

    Args:
        limit: how many maps are kept.
    """

    def __init__(self, limit: int = SHARED_MAPS) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._held: list[Maps] = []  # one, and what is still to be merged into it
        self._version = Version(uuid.uuid4().hex, 0)

    def publish(self, maps: Maps) -> Version:
        with self._lock:
            if self._held and (difference := self._held[0].incompatibility(maps)):
                raise MapsError(f"maps of {maps.name} are not shared here: another {difference}")
            self._held.append(maps)
            if len(self._held) > _PENDING:
                self._merge()
            self._version = self._version._replace(number=self._version.number + 1)  # noqa: SLF001 - a named tuple's way
            return self._version

    def pull(self, since: Version | None = None) -> Pulled | None:
        with self._lock:
            if since == self._version:
                return None
            self._merge()
            return Pulled(self._version, self._held[0] if self._held else None)

    def _merge(self) -> None:
        self._held = [bounded(self._held, self._limit)] if self._held else []


def bounded(stores: Sequence[Maps], limit: int) -> Maps:
    """The newest of these maps, merged."""
    return stores[0] if len(stores) == 1 and len(stores[0]) <= limit else merge(stores, limit)


def num_updates(maps: Maps) -> int:
    """How many iterations the policy that knows these had taken in."""
    return int(maps.arrays["number"][0]) if maps.has_links else int(maps.arrays["born"].max(initial=0))


def new_maps(now: Maps, before: Maps | None) -> Maps | None:
    """The maps that are new, with the totals of these alone.

    Args:
        now: what a policy knows.
        before: what it knew earlier; `None` for nothing.

    Returns:
        `None` if it has learned nothing since. Of more than the policy holds, what is left.
    """
    if before is None:
        return now
    count = min(num_updates(now) - num_updates(before), len(now))
    if count <= 0:
        return None
    fresh = now.select(np.flatnonzero(now.ages < count))
    return replace(fresh, arrays=fresh.arrays | _totals(now, before))


def with_new_totals(now: Maps, before: Maps | None) -> Maps:
    """All maps of `now` with the totals of what is new: to be merged with what others know, who know `before`."""
    return now if before is None else replace(now, arrays=now.arrays | _totals(now, before))


def _totals(now: Maps, before: Maps) -> StateDict:
    """What happened between."""
    new, old = now.arrays, before.arrays
    if not now.has_links:
        return {"visits": np.maximum(0.0, new["visits"] - old["visits"])}
    iterations = np.maximum(0.0, new["iterations"] - old["iterations"])
    uses = new["usual"] * new["iterations"][:, None] - old["usual"] * old["iterations"][:, None]
    usual = np.divide(uses, iterations[:, None], out=np.zeros_like(uses), where=iterations[:, None] > 0)
    return {"iterations": iterations, "usual": np.clip(usual, 0.0, 1.0)} | _openings(new, old)


def _openings(new: StateDict, old: StateDict) -> StateDict:
    """The prompts that are new; by their embeddings, as nobody counts them."""
    if "openings" not in new:
        return {}
    known = {row.tobytes() for row in old.get("openings", ())}
    fresh = np.array([row.tobytes() not in known for row in new["openings"]], np.bool_)
    return {"openings": new["openings"][fresh], "opened": new["opened"][fresh]}
