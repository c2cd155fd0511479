"""Maps shared between processes: each publishes what it learned, and pulls what all of them learned."""

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

SHARED_MAPS = 100_000  # default capacity of a store
_MOST_PENDING = 16  # publications before they are merged


class Version(NamedTuple):
    """Version of a store's contents.

    Attributes:
        store: identity of the store; changes if the store is lost and recreated.
        number: increases with every change.
    """

    store: str
    number: int

    def follows(self, other: Version | None) -> bool:
        """Whether this is the version right after `other`."""
        return other is not None and self == (other.store, other.number + 1)


class Pulled(NamedTuple):
    """All maps of a store; `None` if it is empty."""

    version: Version
    maps: Maps | None


class SharedMaps(Protocol):
    """A bounded store of the newest maps of one model and policy. Thread-safe.

    Failures of the storage or network are raised as they are; callers continue without sharing and retry later.
    """

    def publish(self, maps: Maps) -> Version:
        """Adds maps, which must not have been published before.

        Returns:
            The new version. If it follows that of the last `pull`, no other process has published since.

        Raises:
            MapsError: they are of another model, policy or shape than the store's.
        """

    def pull(self, since: Version | None = None) -> Pulled | None:
        """All maps; `None` if the store's version is still `since`."""


class LocalMaps:
    """A store in memory, for use within one process or behind a server.

    Args:
        limit: how many maps are kept.
    """

    def __init__(self, limit: int = SHARED_MAPS) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._stores: list[Maps] = []  # the merged maps, then publications not merged yet
        self._version = Version(uuid.uuid4().hex, 0)

    def publish(self, maps: Maps) -> Version:
        with self._lock:
            if self._stores and (difference := self._stores[0].incompatibility(maps)):
                raise MapsError(f"maps of {maps.name} are not shared here: another {difference}")
            self._stores.append(maps)
            if len(self._stores) > _MOST_PENDING:
                self._merge()
            self._version = self._version._replace(number=self._version.number + 1)  # noqa: SLF001 - public in named tuples
            return self._version

    def pull(self, since: Version | None = None) -> Pulled | None:
        with self._lock:
            if since == self._version:
                return None
            self._merge()
            return Pulled(self._version, self._stores[0] if self._stores else None)

    def _merge(self) -> None:
        self._stores = [merge_newest(self._stores, self._limit)] if self._stores else []


def merge_newest(stores: Sequence[Maps], limit: int) -> Maps:
    """The newest `limit` of these maps, merged."""
    return stores[0] if len(stores) == 1 and len(stores[0]) <= limit else merge(stores, limit)


def num_updates(maps: Maps) -> int:
    """`Policy.num_updates` of the policy that these maps are from."""
    return int(maps.arrays["number"][0]) if maps.has_links else int(maps.arrays["born"].max(initial=0))


def new_maps(now: Maps, before: Maps | None) -> Maps | None:
    """The maps that a policy has added between two states, with the totals of these only.

    Args:
        now: the policy's maps.
        before: an earlier state of them; `None` for an empty one.

    Returns:
        `None` if there are no new maps. New maps that have been overwritten since are missing.
    """
    if before is None:
        return now
    count = min(num_updates(now) - num_updates(before), len(now))
    if count <= 0:
        return None
    added = now.select(np.flatnonzero(now.ages < count))
    return replace(added, arrays=added.arrays | _new_totals(now, before))


def with_new_totals(now: Maps, before: Maps | None) -> Maps:
    """All maps of `now`, with the totals of what is new since `before`.

    To be merged with maps that include `before`, so that nothing is counted twice.
    """
    return now if before is None else replace(now, arrays=now.arrays | _new_totals(now, before))


def _new_totals(now: Maps, before: Maps) -> StateDict:
    """The arrays that are totals over all iterations, for the iterations since `before`."""
    new, old = now.arrays, before.arrays
    if not now.has_links:
        return {"visits": np.maximum(0.0, new["visits"] - old["visits"])}
    iterations = np.maximum(0.0, new["iterations"] - old["iterations"])
    uses = new["usual"] * new["iterations"][:, None] - old["usual"] * old["iterations"][:, None]
    share = np.divide(uses, iterations[:, None], out=np.zeros_like(uses), where=iterations[:, None] > 0)
    return {"iterations": iterations, "usual": np.clip(share, 0.0, 1.0)} | _new_prompts(new, old)


def _new_prompts(new: StateDict, old: StateDict) -> StateDict:
    """The arrays of the `PromptPrior` for new prompts; they have no number, so their embeddings are compared."""
    if "openings" not in new:
        return {}
    known = {row.tobytes() for row in old.get("openings", ())}
    added = np.array([row.tobytes() not in known for row in new["openings"]], np.bool_)
    return {"openings": new["openings"][added], "opened": new["opened"][added]}
