"""What a policy has learned since it was last asked: what it tells others, so that nothing is counted twice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from finemoe.maps.maps import Maps
from finemoe.policy.base import Knowledge


def experience(maps: Maps) -> int:
    """How many iterations the policy that knows these had taken in."""
    return int(maps.arrays["number"][0]) if maps.linked else int(maps.arrays["born"].max(initial=0))


def news(now: Maps, before: Maps | None) -> Maps | None:
    """The maps that are new, with the totals of these alone.

    Args:
        now: what a policy knows.
        before: what it knew earlier; `None` for nothing.

    Returns:
        `None` if it has learned nothing since. Of more than the policy holds, what is left.
    """
    if before is None:
        return now
    count = min(experience(now) - experience(before), len(now))
    if count <= 0:
        return None
    fresh = now.only(np.flatnonzero(now.ages < count))
    return replace(fresh, arrays=fresh.arrays | _totals(now, before))


def counted_once(now: Maps, before: Maps | None) -> Maps:
    """All maps of `now` with the totals of what is new: to be merged with what others know, who know `before`."""
    return now if before is None else replace(now, arrays=now.arrays | _totals(now, before))


def _totals(now: Maps, before: Maps) -> Knowledge:
    """What happened between."""
    new, old = now.arrays, before.arrays
    if not now.linked:
        return {"visits": np.maximum(0.0, new["visits"] - old["visits"])}
    iterations = np.maximum(0.0, new["iterations"] - old["iterations"])
    uses = new["usual"] * new["iterations"][:, None] - old["usual"] * old["iterations"][:, None]
    usual = np.divide(uses, iterations[:, None], out=np.zeros_like(uses), where=iterations[:, None] > 0)
    return {"iterations": iterations, "usual": np.clip(usual, 0.0, 1.0)} | _openings(new, old)


def _openings(new: Knowledge, old: Knowledge) -> Knowledge:
    """The prompts that are new; by their embeddings, as nobody counts them."""
    if "openings" not in new:
        return {}
    known = {row.tobytes() for row in old.get("openings", ())}
    fresh = np.array([row.tobytes() not in known for row in new["openings"]], np.bool_)
    return {"openings": new["openings"][fresh], "opened": new["opened"][fresh]}
