"""Settings of the Ray Serve application, and their parsing. Does not import ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from finemoe.budget import parse_bytes
from finemoe.config import LoadConfig, setting
from finemoe.errors import ConfigError
from finemoe.serving.config import ServeConfig

C = TypeVar("C")
_SET_BY_RAY = frozenset({"host", "port"})  # Ray's proxy listens, not the server


@dataclass(frozen=True)
class RayConfig:
    """Number of replicas, the resources of each, and their health checks."""

    replicas: int = setting(1, "copies of the server, each with a model of its own")
    cpus_per_replica: float = setting(1.0, "CPUs that Ray reserves for each replica")
    gpus_per_replica: float = setting(0.0, "GPUs that Ray assigns to each replica")
    memory_per_replica: str | None = setting(
        None, "memory that Ray reserves for each replica (64GiB); by default none is reserved"
    )
    max_replicas_per_node: int | None = setting(None, "replicas on one machine at most")
    health_check_period_s: float = setting(10.0, "seconds between two health checks")
    health_check_timeout_s: float = setting(30.0, "seconds after which a health check counts as failed")

    def __post_init__(self) -> None:
        for name in ("replicas", "max_replicas_per_node"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: {value} is not at least 1")
        for name in ("cpus_per_replica", "gpus_per_replica"):
            if not 0 <= getattr(self, name) <= 1e6:  # also refuses NaN
                raise ConfigError(f"{name}: {getattr(self, name)} is not between 0 and a million")
        for name in ("health_check_period_s", "health_check_timeout_s"):
            if not 0 < getattr(self, name) <= 1e6:
                raise ConfigError(f"{name}: {getattr(self, name)} is not above 0 and at most a million")
        if self.memory_per_replica is not None:
            parse_bytes(self.memory_per_replica, "memory_per_replica")

    @property
    def memory_bytes(self) -> int | None:
        """`memory_per_replica` as a number."""
        return None if self.memory_per_replica is None else parse_bytes(self.memory_per_replica, "memory_per_replica")


@dataclass(frozen=True)
class RayAppSettings:
    """All settings of the application."""

    ray: RayConfig = field(default_factory=RayConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)


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
