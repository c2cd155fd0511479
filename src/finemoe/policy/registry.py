"""Policies by name: `POLICIES`, `BOUNDS`, and parsing of names with options, `finemoe/no-own/no-prefetch`.

A name may be followed by options, separated by `/`: `KEY=N` for one of the policy's `settings`, `no-PART` to leave out
one of its `parts` (an ablation).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from finemoe.errors import ConfigError
from finemoe.jit import Jit, interpreted
from finemoe.policy.base import Policy
from finemoe.policy.belady import Belady, Oracle
from finemoe.policy.cache_manager import CacheManager
from finemoe.policy.finemoe.policy import FinemoePolicy
from finemoe.policy.lru_lfu import LFRU, LFU, LRU
from finemoe.policy.published.expert_map import ExpertMapPolicy
from finemoe.policy.published.lru_prefetch import DeepSpeedPolicy, MixtralOffloadingPolicy
from finemoe.policy.published.moe_infinity import MoEInfinityPolicy
from finemoe.policy.published.promoe import ProMoEPolicy

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
}  # available in the engine and in the simulator
POLICIES: tuple[str, ...] = tuple(FACTORIES)
BOUNDS: dict[str, type[Policy]] = {"belady": Belady, "oracle": Oracle}  # simulator only: they need the option `future`


def policy_class(policy: str) -> type[Policy]:
    """The class of a policy of `FACTORIES`; options in the name are checked and dropped.

    Raises:
        ConfigError: unknown policy or option, or a bound, which only the simulator can run.
    """
    name = policy.partition("/")[0]
    if name in BOUNDS:
        raise ConfigError(
            f"--policy: {name!r} knows the future, which only a replay does; choose one of {', '.join(POLICIES)}"
        )
    return _parse(policy, FACTORIES)[0]


def policy_or_bound_class(policy: str) -> type[Policy]:
    """Like `policy_class`, but `BOUNDS` are allowed too."""
    return _parse(policy, FACTORIES | BOUNDS)[0]


def make_policy(policy: str, layers: int, experts: int, *, jit: Jit[Any] = interpreted, **options: Any) -> Policy:
    """Construct a policy, or bound, by name.

    Args:
        policy: a name of `FACTORIES` or `BOUNDS`, with options if any.
        layers: `L`.
        experts: the largest `E` of any layer.
        jit: compiles the kernels of policies that have some (`Policy.compiles`).
        options: further arguments of the constructor; they override options in the name.

    Raises:
        ConfigError: unknown policy or option; the message lists the known ones.
    """
    kind, settings = _parse(policy, FACTORIES | BOUNDS)
    options = settings | options
    if kind.compiles:
        options["jit"] = jit
    constructor: Callable[..., Policy] = kind
    return constructor(layers, experts, **options)


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
    """A cache of `capacity` slots under a policy of `FACTORIES`; `options` as in `make_policy`.

    Raises:
        ConfigError: unknown policy or option, or a bound; the message lists the known ones.
    """
    policy_class(policy)
    made = make_policy(policy, layers, experts, **options)
    return CacheManager(layers, experts, capacity, made, devices, explain=explain)


def _parse(policy: str, known: Mapping[str, type[Policy]]) -> tuple[type[Policy], dict[str, Any]]:
    """The class of a name, and the constructor arguments given by its options.

    Raises:
        ConfigError: unknown policy or option; the message lists the known ones.
    """
    name, *words = policy.split("/")
    if name not in known:
        raise ConfigError(f"--policy: unknown policy {name!r}; choose one of {', '.join(known)}")
    kind, options = known[name], dict[str, Any]()
    without: set[str] = set()
    for word in words:
        key, _, value = word.partition("=")
        if key in kind.settings and value.isdecimal() and int(value) > 0:
            options[key] = int(value)
        elif word.startswith("no-") and word[3:] in kind.parts:
            without.add(word[3:])
        else:
            available = [f"{key}=N" for key in kind.settings] + [f"no-{part}" for part in kind.parts]
            raise ConfigError(
                f"--policy: {name}/{word}: {name} "
                + (f"takes {', '.join(available)}" if available else "has no settings, and no parts to switch off")
            )
    if without:
        options["without"] = frozenset(without)
    return kind, options
