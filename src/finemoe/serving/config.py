"""Settings of `finemoe serve`. Imports no torch: the command line reads these fields."""

from __future__ import annotations

from dataclasses import dataclass

from finemoe.budget import parse_bytes
from finemoe.config import setting
from finemoe.errors import ConfigError

_AT_LEAST_ONE = ("max_batch_tokens", "max_running", "max_prompt_tokens", "max_output_tokens", "max_shared_maps")
_POSITIVE = ("request_timeout_s", "drain_timeout_s", "share_every_s")


@dataclass(frozen=True)
class ServeConfig:
    """Address, batching limits, request limits and map sharing of the server."""

    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 is every network")
    port: int = setting(8000, "port to listen on; 0 picks a free one")
    served_name: str | None = setting(None, "the model's name in requests (default: the hub id, or the folder's name)")
    api_key_file: str | None = setting(
        None, "file with the API key that requests must carry; or set FINEMOE_API_KEY (default: no key)"
    )
    cache_bytes: str = setting("256MiB", "memory of the key-value cache that all running answers share (1GiB)")
    max_batch_tokens: int = setting(1024, "tokens per forward pass; longer prompts are split", advanced=True)
    max_running: int = setting(16, "answers that run at the same time; others wait")
    max_waiting: int = setting(64, "answers that may wait to run; further requests are refused (429)", advanced=True)
    max_prompt_tokens: int | None = setting(
        None, "longest prompt in tokens (default: what the model's context holds)", advanced=True
    )
    max_output_tokens: int = setting(
        2048, "longest answer in tokens, and the default of a chat request without a limit", advanced=True
    )
    max_body_bytes: str = setting("4MiB", "longest request body (413)", advanced=True)
    request_timeout_s: float = setting(600.0, "seconds that a request may take, queueing included (504)", advanced=True)
    drain_timeout_s: float = setting(
        25.0, "seconds that running requests have to finish after SIGTERM or Ctrl-C", advanced=True
    )
    shared_maps: str | None = setting(
        None, "folder or fsspec URL through which several servers share what their policies learn", advanced=True
    )
    share_every_s: float = setting(30.0, "seconds between two exchanges of shared maps", advanced=True)
    max_shared_maps: int = setting(100_000, "number of shared maps that are kept, the newest", advanced=True)
    log_prompts: bool = setting(default=False, text="write prompts and answers into the log", advanced=True)

    @property
    def key_value_bytes(self) -> int:
        """`cache_bytes` as a number."""
        return parse_bytes(self.cache_bytes, "--cache-bytes")

    @property
    def body_bytes(self) -> int:
        """`max_body_bytes` as a number."""
        return parse_bytes(self.max_body_bytes, "--max-body-bytes")

    @property
    def capacity(self) -> int:
        """Number of answers that the server admits, running and waiting together."""
        return self.max_running + self.max_waiting

    def __post_init__(self) -> None:
        parse_bytes(self.cache_bytes, "--cache-bytes")
        parse_bytes(self.max_body_bytes, "--max-body-bytes")
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{_flag(name)}: {value} is not at least 1")
        for name in _POSITIVE:
            if not 0 < getattr(self, name) <= 1e6:  # also refuses NaN
                raise ConfigError(f"{_flag(name)}: {getattr(self, name)} is not above 0 and at most a million")
        self._check_batching()
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port: {self.port} is not between 0 and 65535")
        if not self.host:
            raise ConfigError("--host: is empty; 127.0.0.1 is this machine alone, 0.0.0.0 every network")
        if self.served_name == "":
            raise ConfigError("--served-name: is empty; leave it out for the model's own name")

    def _check_batching(self) -> None:
        if self.max_running > self.max_batch_tokens:
            raise ConfigError(
                f"--max-running: {self.max_running} answers do not fit into one forward pass of "
                f"--max-batch-tokens {self.max_batch_tokens}"
            )
        if self.max_waiting < 0:
            raise ConfigError(f"--max-waiting: {self.max_waiting} is negative; 0 disables the queue")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
