"""Creates an engine with its policy and cache manager, for any backend."""

from __future__ import annotations

from typing import Any

from finemoe.checkpoint import ExpertIndex
from finemoe.config import LoadConfig
from finemoe.engine.async_policy import AsyncPolicy
from finemoe.engine.engine import Engine, Verifier
from finemoe.engine.warmup import warm_up
from finemoe.jit import interpreted
from finemoe.learned import MapPersistence
from finemoe.policy import CacheManager, make_policy
from finemoe.store import SlotPool
from finemoe.types import Transfer


def make_engine(
    config: LoadConfig,
    policy_options: dict[str, Any],
    keeper: MapPersistence | None,
    pool: SlotPool,
    transfer: Transfer,
    expert_index: ExpertIndex,
    *,
    verify: Verifier | None = None,
    devices: int = 1,
) -> Engine:
    """Create an engine with the configured policy, restored from its saved maps if `keeper` is given.

    An asynchronous policy starts its worker thread; the caller must end it with `AsyncPolicy.close`.
    """
    sizes = [layout.experts for layout in expert_index.layouts]
    shape = len(sizes), max(sizes)
    warm_up(config.policy, **policy_options)
    policy = make_policy(config.policy, *shape, **policy_options)
    if keeper is not None:
        keeper.restore(policy)
    if policy.runs_async:
        policy = AsyncPolicy(policy, transfer.wake)
    cache_manager = CacheManager(
        *shape, pool.slots, policy, devices, sizes=sizes, explain=config.explain,
        jit=policy_options.get("jit", interpreted),
    )  # fmt: skip
    return Engine(pool, cache_manager, transfer, verify, experts=expert_index.experts)
