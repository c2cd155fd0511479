"""Settings of `finemoe serve`. Imports no torch: the command line reads these fields."""

from __future__ import annotations

from dataclasses import dataclass, field

from finemoe.config import parse_bytes
from finemoe.errors import ConfigError


@dataclass(frozen=True)
class ServeConfig:
    """How answers run together."""

    cache_bytes: str = field(
        default="256MiB", metadata={"help": "memory of the key-value cache that all running answers share (1GiB)"}
    )
    max_batch_tokens: int = field(
        default=1024, metadata={"help": "tokens in one forward pass; longer prompts go through it in pieces"}
    )
    max_running: int = field(default=16, metadata={"help": "answers that run at the same time; others wait"})

    @property
    def key_value_bytes(self) -> int:
        """`cache_bytes` as a number."""
        return parse_bytes(self.cache_bytes, "--cache-bytes")

    def __post_init__(self) -> None:
        parse_bytes(self.cache_bytes, "--cache-bytes")
        for name in ("max_batch_tokens", "max_running"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')}: {getattr(self, name)} is not at least 1")
        if self.max_running > self.max_batch_tokens:
            raise ConfigError(
                f"--max-running: {self.max_running} answers do not fit into one forward pass of "
                f"--max-batch-tokens {self.max_batch_tokens}"
            )
