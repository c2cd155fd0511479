"""The policy: pure decisions. It imports neither torch nor time nor random, and does no I/O."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finemoe.errors import ConfigError
from finemoe.jit import Jit, interpreted
from finemoe.policy.base import Policy
from finemoe.policy.belady import Belady, Future, Oracle, compute_future
from finemoe.policy.cache_manager import CacheManager
from finemoe.policy.eviction import LFRU, LFU, LRU
from finemoe.policy.finemoe.policy import FinemoePolicy
from finemoe.policy.published.expert_map import ExpertMapPolicy
from finemoe.policy.published.lru_prefetch import DeepSpeedPolicy, MixtralOffloadingPolicy
from finemoe.policy.published.moe_infinity import MoEInfinityPolicy
from finemoe.policy.published.promoe import ProMoEPolicy
from finemoe.policy.registry import parse

# what the engine and the simulator offer
FACTORIES: dict[str, type[Policy]] = {
    "lru": LRU,
    "lfu": LFU,
    "lfru": LFRU,
    "deepspeed": DeepSpeedPolicy,
    "mixtral-offloading": MixtralOffloadingPolicy,
    "moe-infinity": MoEInfinityPolicy,
    "promoe": ProMoEPolicy,
    "expert-map": ExpertMapPolicy,
    "finemoe": FinemoePolicy,
}
POLICIES: tuple[str, ...] = tuple(FACTORIES)
# what only the simulator can offer: the bounds need the option `future`
BOUNDS: dict[str, type[Policy]] = {"belady": Belady, "oracle": Oracle}


def policy_class(policy: str) -> type[Policy]:
    """The class behind a name of `FACTORIES`; settings may follow it (`policy.naming`).

    Raises:
        ConfigError: no policy of that name, or one that only a replay can offer; the message lists those that are.
    """
    name = policy.partition("/")[0]
    if name in BOUNDS:
        raise ConfigError(
            f"--policy: {name!r} knows the future, which only a replay does; choose one of {', '.join(POLICIES)}"
        )
    return parse(policy, FACTORIES)[0]


def policy_or_bound_class(policy: str) -> type[Policy]:
    """The same, of a name of `FACTORIES` or `BOUNDS`."""
    return parse(policy, FACTORIES | BOUNDS)[0]


def make_policy(policy: str, layers: int, experts: int, *, jit: Jit[Any] = interpreted, **options: Any) -> Policy:
    """The policy, or bound, of a name.

    Args:
        policy: a name of `FACTORIES` or `BOUNDS`.
        layers: `L`.
        experts: the largest `E` of any layer.
        jit: compiles the hot loops of those policies that have any.
        options: of the policy's own constructor.

    Raises:
        ConfigError: no policy of that name; the message lists those that are.
    """
    kind, settings = parse(policy, FACTORIES | BOUNDS)
    options = settings | options
    if kind.compiles:
        options["jit"] = jit
    make: Callable[..., Policy] = kind
    return make(layers, experts, **options)


def make_cache_manager(
    policy: str,
    layers: int,
    experts: int,
    capacity: int,
    *,
    devices: int = 1,
    explain: bool = False,
    **options: Any,
) -> CacheManager:
    """A cache of `capacity` slots under the policy of a name; the bounds are not among them.

    Raises:
        ConfigError: no policy of that name; the message lists those that are.
    """
    policy_class(policy)
    made = make_policy(policy, layers, experts, **options)
    return CacheManager(layers, experts, capacity, made, devices, explain=explain)


__all__ = [
    "BOUNDS",
    "FACTORIES",
    "POLICIES",
    "CacheManager",
    "Future",
    "Policy",
    "policy_or_bound_class",
    "foresee",
    "make_cache_manager",
    "make_policy",
    "policy_class",
]
