"""Caching and prefetching policies, and the cache manager that they steer.

Pure decisions: no torch, threads, clock, randomness or I/O (`tests/test_structure.py` checks it).
"""

from finemoe.policy.base import Policy
from finemoe.policy.belady import Future, compute_future
from finemoe.policy.cache_manager import CacheManager
from finemoe.policy.registry import (
    BOUNDS,
    FACTORIES,
    POLICIES,
    make_cache_manager,
    make_policy,
    policy_class,
    policy_or_bound_class,
)

__all__ = [
    "BOUNDS",
    "FACTORIES",
    "POLICIES",
    "CacheManager",
    "Future",
    "Policy",
    "compute_future",
    "make_cache_manager",
    "make_policy",
    "policy_class",
    "policy_or_bound_class",
]
