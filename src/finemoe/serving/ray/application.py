"""The Ray Serve application: its settings and its two deployments, replicas and shared maps. Imports ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, TypeVar, get_type_hints

from click import ClickException
from pydantic import ConfigDict, TypeAdapter, ValidationError
from ray import serve

from finemoe.config import LoadConfig
from finemoe.errors import ConfigError
from finemoe.learned import NO_MAP_STORE
from finemoe.policy import policy_class
from finemoe.serving.app import check_policy_shares_maps
from finemoe.serving.config import ServeConfig
from finemoe.serving.ray.config import RayConfig
from finemoe.serving.ray.replica import Replica, SharedMapStore
from finemoe.system import openmp_spin_environment

C = TypeVar("C")
REPLICA, STORE = "finemoe", "finemoe-maps"  # names of the deployments
_SET_BY_RAY = frozenset({"host", "port"})  # Ray's proxy listens, not the server
_EXTRA_REQUESTS = 16  # per replica beyond its capacity: so that it answers probes and refuses excess requests itself
_CLOSE_TIMEOUT_S = 10.0  # for publishing the remaining maps after the last request


@dataclass(frozen=True)
class RayAppSettings:
    """All settings of the application."""

    ray: RayConfig = field(default_factory=RayConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)


class RefusedArgumentError(ClickException, ConfigError):
    """A `ConfigError` that `serve run` prints in one line, with exit status 2."""

    exit_code = 2


def build(given: Mapping[str, Any]) -> Any:
    """Builds the application; see `finemoe.serving.ray.app`."""
    try:
        settings = parse_arguments(given)
        settings, has_store = _resolve_sharing(settings)
    except ConfigError as error:
        raise RefusedArgumentError(str(error)) from None
    store = _store(settings).bind(settings.serve.max_shared_maps) if has_store else None
    return _replicas(settings).bind(settings.load, settings.serve, store)


def parse_arguments(given: Mapping[str, Any]) -> RayAppSettings:
    """Settings from names and values; converts text to numbers and booleans where these are expected.

    Raises:
        ConfigError: an unknown name or an invalid value; the message names it.
    """
    configs: tuple[type, ...] = (RayConfig, LoadConfig, ServeConfig)
    known = {each.name for config in configs for each in fields(config)} - _SET_BY_RAY
    for name in given:
        if name in _SET_BY_RAY:
            raise ConfigError(f"{name}: Ray's proxy listens; set http_options in the Ray Serve config")
        if name not in known:
            near = get_close_matches(str(name).lstrip("-").replace("-", "_"), known, n=1)
            hint = f"; is it {near[0]}?" if near else "; docs/ray.md lists what there is"
            raise ConfigError(f"{name}: is unknown{hint}")
    return RayAppSettings(_parse(given, RayConfig), _parse(given, LoadConfig), _parse(given, ServeConfig))


def _parse(given: Mapping[str, Any], config: type[C]) -> C:
    hints = get_type_hints(config)
    names = [each.name for each in fields(config) if each.name in given]  # type: ignore[arg-type]
    return config(**{name: _convert(name, given[name], hints[name]) for name in names})


def _convert(name: str, value: Any, hint: Any) -> Any:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=True))
        return adapter.validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{name}: can't use {value!r} ({error.errors()[0]['msg']})") from error


def _resolve_sharing(settings: RayAppSettings) -> tuple[RayAppSettings, bool]:
    """The settings of a replica, and whether the application gets a `SharedMapStore`."""
    choice, policy = settings.serve.shared_maps, settings.load.policy
    if choice == NO_MAP_STORE:
        return replace(settings, serve=replace(settings.serve, shared_maps=None)), False
    if choice is not None:
        check_policy_shares_maps(policy)
    return settings, choice is None and policy_class(policy).is_persistent


def _store(settings: RayAppSettings) -> Any:
    return serve.deployment(
        name=STORE,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},
        health_check_period_s=settings.ray.health_check_period_s,
        health_check_timeout_s=settings.ray.health_check_timeout_s,
    )(SharedMapStore)


def _replicas(settings: RayAppSettings) -> Any:
    ray, config = settings.ray, settings.serve
    resources: dict[str, Any] = {
        "num_cpus": ray.cpus_per_replica,
        "num_gpus": ray.gpus_per_replica,
        "runtime_env": {"env_vars": openmp_spin_environment()},
    }
    if ray.memory_bytes is not None:
        resources["memory"] = ray.memory_bytes
    placement = {} if ray.max_replicas_per_node is None else {"max_replicas_per_node": ray.max_replicas_per_node}
    deployment = serve.deployment(
        name=REPLICA,
        num_replicas=ray.replicas,
        ray_actor_options=resources,
        max_ongoing_requests=config.capacity + _EXTRA_REQUESTS,
        graceful_shutdown_timeout_s=config.drain_timeout_s + _CLOSE_TIMEOUT_S,
        health_check_period_s=ray.health_check_period_s,
        health_check_timeout_s=ray.health_check_timeout_s,
        **placement,
    )
    return deployment(serve.ingress()(Replica))
