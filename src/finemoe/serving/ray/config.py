"""Settings of the Ray Serve application. Does not import ray."""

from __future__ import annotations

from dataclasses import dataclass

from finemoe.config import parse_bytes, setting
from finemoe.errors import ConfigError


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
