"""The policy: pure decisions. It imports neither torch nor time nor random, and does no I/O."""

from __future__ import annotations

from finemoe.errors import ConfigError
from finemoe.policy.cache import EVICTIONS
from finemoe.policy.controller import Controller

POLICIES: tuple[str, ...] = tuple(EVICTIONS)


def make_controller(policy: str, layers: int, experts: int, capacity: int) -> Controller:
    """The controller for a policy's name.

    Raises:
        ConfigError: no policy of that name; the message lists those that are.
    """
    if policy not in EVICTIONS:
        raise ConfigError(f"--policy: unknown policy {policy!r}; choose one of {', '.join(POLICIES)}")
    return Controller(layers, experts, capacity, EVICTIONS[policy](layers, experts))


__all__ = ["POLICIES", "Controller", "make_controller"]
