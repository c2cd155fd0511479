"""The Ray Serve application: the deployments of its replicas and of their shared maps. Imports ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from click import ClickException
from ray import serve

from finemoe.errors import ConfigError
from finemoe.learned import NO_MAP_STORE
from finemoe.policy import policy_class
from finemoe.serving.app import check_policy_shares_maps
from finemoe.serving.ray.config import RayAppSettings, parse_arguments
from finemoe.serving.ray.replica import Replica, SharedMapStore
from finemoe.system import openmp_spin_environment

REPLICA, STORE = "finemoe", "finemoe-maps"  # names of the deployments
_EXTRA_REQUESTS = 16  # per replica beyond its capacity: so that it answers probes and refuses excess requests itself
_CLOSE_TIMEOUT_S = 10.0  # for publishing the remaining maps after the last request


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
