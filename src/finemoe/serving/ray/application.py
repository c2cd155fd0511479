"""The application: a deployment of replicas, and one that keeps what they share. Imports ray."""

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
from finemoe.serving.app import refuse_to_share_nothing
from finemoe.serving.config import ServeConfig
from finemoe.serving.ray.config import RayConfig
from finemoe.serving.ray.replica import Replica, SharedMapStore
from finemoe.system import openmp_spin_environment

C = TypeVar("C")
_RAYS = frozenset({"host", "port"})  # Ray's proxy listens, not the server


@dataclass(frozen=True)
class Arguments:
    """All settings of an application."""

    ray: RayConfig = field(default_factory=RayConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)


def read_arguments(given: Mapping[str, Any]) -> Arguments:
    """The settings out of names and values; text becomes numbers and truth values where these are expected.

    Raises:
        ConfigError: an unknown name, or a value that can't be used; the message names it.
    """
    configs: tuple[type, ...] = (RayConfig, LoadConfig, ServeConfig)
    known = {each.name for config in configs for each in fields(config)} - _RAYS
    for name in given:
        if name in _RAYS:
            raise ConfigError(f"{name}: Ray's proxy listens; set http_options in the Ray Serve config")
        if name not in known:
            near = get_close_matches(str(name).lstrip("-").replace("-", "_"), known, n=1)
            hint = f"; is it {near[0]}?" if near else "; docs/ray.md lists what there is"
            raise ConfigError(f"{name}: is unknown{hint}")
    return Arguments(_read(given, RayConfig), _read(given, LoadConfig), _read(given, ServeConfig))


def _read(given: Mapping[str, Any], config: type[C]) -> C:
    hints = get_type_hints(config)
    names = [each.name for each in fields(config) if each.name in given]  # type: ignore[arg-type]
    return config(**{name: _converted(name, given[name], hints[name]) for name in names})


def _converted(name: str, value: Any, hint: Any) -> Any:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=True))
        return adapter.validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{name}: can't use {value!r} ({error.errors()[0]['msg']})") from error


REPLICA, STORE = "finemoe", "finemoe-maps"  # the deployments
_BESIDE = 16  # requests beyond a replica's own queue that reach it, to be refused there, or to ask for no answer
_CLOSING_S = 10.0  # to tell others what was learned, after the last request


class RefusedArgumentError(ClickException, ConfigError):
    """`serve run` shows its one line and exits with 2."""

    exit_code = 2


def build(given: Mapping[str, Any]) -> Any:
    """See `finemoe.serving.ray.app`."""
    try:
        arguments = read_arguments(given)
        arguments, shared = _sharing(arguments)
    except ConfigError as error:
        raise RefusedArgumentError(str(error)) from None
    store = _store(arguments).bind(arguments.serve.max_shared_maps) if shared else None
    return _replicas(arguments).bind(arguments.load, arguments.serve, store)


def _sharing(arguments: Arguments) -> tuple[Arguments, bool]:
    """The arguments that a replica gets, and whether the application has a store of its own."""
    choice, policy = arguments.serve.shared_maps, arguments.load.policy
    if choice == NO_MAP_STORE:
        return replace(arguments, serve=replace(arguments.serve, shared_maps=None)), False
    if choice is not None:
        refuse_to_share_nothing(policy)
    return arguments, choice is None and policy_class(policy).is_persistent


def _store(arguments: Arguments) -> Any:
    return serve.deployment(
        name=STORE,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},
        health_check_period_s=arguments.ray.health_check_period_s,
        health_check_timeout_s=arguments.ray.health_check_timeout_s,
    )(SharedMapStore)


def _replicas(arguments: Arguments) -> Any:
    ray, config = arguments.ray, arguments.serve
    resources: dict[str, Any] = {
        "num_cpus": ray.cpus_per_replica,
        "num_gpus": ray.gpus_per_replica,
        "runtime_env": {"env_vars": openmp_spin_environment()},
    }
    if ray.memory_bytes is not None:
        resources["memory"] = ray.memory_bytes
    spread = {} if ray.max_replicas_per_node is None else {"max_replicas_per_node": ray.max_replicas_per_node}
    deployment = serve.deployment(
        name=REPLICA,
        num_replicas=ray.replicas,
        ray_actor_options=resources,
        max_ongoing_requests=config.capacity + _BESIDE,
        graceful_shutdown_timeout_s=config.drain_timeout_s + _CLOSING_S,
        health_check_period_s=ray.health_check_period_s,
        health_check_timeout_s=ray.health_check_timeout_s,
        **spread,
    )
    return deployment(serve.ingress()(Replica))
