"""Settings of the Ray Serve application. Imports no ray."""

from __future__ import annotations

from dataclasses import dataclass, field

from finemoe.config import parse_bytes
from finemoe.errors import ConfigError


@dataclass(frozen=True)
class RayConfig:
    """How many replicas there are, what each of them is given, and how Ray looks after them."""

    replicas: int = field(default=1, metadata={"help": "copies of the server, each with a model of its own"})
    cpus_per_replica: float = field(default=1.0, metadata={"help": "CPUs that Ray sets aside for each"})
    gpus_per_replica: float = field(default=0.0, metadata={"help": "GPUs that Ray gives to each"})
    memory_per_replica: str | None = field(
        default=None, metadata={"help": "memory that Ray sets aside for each (64GiB); by default it counts none"}
    )
    max_replicas_per_node: int | None = field(default=None, metadata={"help": "replicas on one machine at most"})
    health_check_period_s: float = field(default=10.0, metadata={"help": "seconds between two health checks"})
    health_check_timeout_s: float = field(default=30.0, metadata={"help": "seconds after which a check has failed"})

    def __post_init__(self) -> None:
        for name in ("replicas", "max_replicas_per_node"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: {value} is not at least 1")
        for name in ("cpus_per_replica", "gpus_per_replica"):
            if not 0 <= getattr(self, name) <= 1e6:  # a NaN is refused too
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
