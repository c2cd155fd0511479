"""The application: a deployment of replicas, and one that keeps what they share. Imports ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from click import ClickException
from ray import serve

from finemoe.errors import ConfigError
from finemoe.maps import NOWHERE
from finemoe.policy import policy_class
from finemoe.process import brief_spins
from finemoe.ray.arguments import Arguments, read_arguments
from finemoe.ray.replica import Replica
from finemoe.ray.store import Store
from finemoe.serving.service import refuse_to_share_nothing

REPLICA, STORE = "finemoe", "finemoe-maps"  # the deployments
_BESIDE = 16  # requests beyond a replica's own queue that reach it, to be refused there, or to ask for no answer
_CLOSING_S = 10.0  # to tell others what was learned, after the last request


class RefusedArgumentError(ClickException, ConfigError):
    """`serve run` shows its one line and exits with 2."""

    exit_code = 2


def build(given: Mapping[str, Any]) -> Any:
    """See `finemoe.ray.app`."""
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
    if choice == NOWHERE:
        return replace(arguments, serve=replace(arguments.serve, shared_maps=None)), False
    if choice is not None:
        refuse_to_share_nothing(policy)
    return arguments, choice is None and policy_class(policy).remembers


def _store(arguments: Arguments) -> Any:
    return serve.deployment(
        name=STORE,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        logging_config={"enable_access_log": False},
        health_check_period_s=arguments.ray.health_check_period_s,
        health_check_timeout_s=arguments.ray.health_check_timeout_s,
    )(Store)


def _replicas(arguments: Arguments) -> Any:
    ray, config = arguments.ray, arguments.serve
    resources: dict[str, Any] = {
        "num_cpus": ray.cpus_per_replica,
        "num_gpus": ray.gpus_per_replica,
        "runtime_env": {"env_vars": brief_spins()},
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
