"""Recorded routing forced onto a model of the same shape, for benchmarks: real locality although weights are random.

`replay_routing` is the way in. `rows` says which recorded row a token takes, `forcing` makes a model take it.
"""

from __future__ import annotations

from finemoe.replay.forcing import Replay, replay_routing
from finemoe.replay.rows import check_fit, open_routing

__all__ = ["Replay", "check_fit", "open_routing", "replay_routing"]
