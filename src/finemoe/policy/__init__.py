"""The policy: pure decisions. It imports neither torch nor time nor random, and does no I/O."""

from __future__ import annotations

from collections.abc import Callable

from finemoe.errors import ConfigError
from finemoe.policy.base import Policy
from finemoe.policy.cache import LFRU, LFU, LRU
from finemoe.policy.controller import Controller

# what the engine and the simulator offer; bounds that know the future are the simulator's alone
FACTORIES: dict[str, Callable[[int, int], Policy]] = {"lru": LRU, "lfu": LFU, "lfru": LFRU}
POLICIES: tuple[str, ...] = tuple(FACTORIES)


def make_policy(policy: str, layers: int, experts: int) -> Policy:
    """The policy of a name.

    Raises:
        ConfigError: no policy of that name; the message lists those that are.
    """
    if policy not in FACTORIES:
        raise ConfigError(f"--policy: unknown policy {policy!r}; choose one of {', '.join(POLICIES)}")
    return FACTORIES[policy](layers, experts)


def make_controller(policy: str, layers: int, experts: int, capacity: int) -> Controller:
    """A cache of `capacity` slots under the policy of a name.

    Raises:
        ConfigError: no policy of that name; the message lists those that are.
    """
    return Controller(layers, experts, capacity, make_policy(policy, layers, experts))


__all__ = ["POLICIES", "Controller", "Policy", "make_controller", "make_policy"]
