"""Settings of `finemoe serve`. Imports no torch: the command line reads these fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from finemoe.config import parse_bytes
from finemoe.errors import ConfigError

_AT_LEAST_ONE = ("max_batch_tokens", "max_running", "max_prompt_tokens", "max_output_tokens", "max_shared_maps")
Schedule = Literal["fifo", "overlap"]
_POSITIVE = ("request_timeout_s", "drain_timeout_s", "share_every_s")


@dataclass(frozen=True)
class ServeConfig:
    """Where the server listens, how answers run together, and what a request may ask for."""

    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on; 0.0.0.0 is every network"})
    port: int = field(default=8000, metadata={"help": "port to listen on; 0 takes a free one"})
    served_name: str | None = field(
        default=None, metadata={"help": "the model's name in requests (default: the hub id, or the folder's name)"}
    )
    api_key_file: str | None = field(
        default=None,
        metadata={"help": "file with the key that requests must carry; or set FINEMOE_API_KEY (default: no key)"},
    )
    cache_bytes: str = field(
        default="256MiB", metadata={"help": "memory of the key-value cache that all running answers share (1GiB)"}
    )
    max_batch_tokens: int = field(
        default=1024, metadata={"help": "tokens in one forward pass; longer prompts go through it in pieces"}
    )
    max_running: int = field(default=16, metadata={"help": "answers that run at the same time; others wait"})
    max_waiting: int = field(
        default=64, metadata={"help": "answers that may wait to run; beyond, requests are refused (429)"}
    )
    schedule: Schedule = field(
        default="fifo",
        metadata={
            "help": "who of those that wait runs next: fifo, who came first; overlap, whose experts are needed anyway, "
            "as far as the policy foresees it (finemoe); nobody is overtaken more than 4 times"
        },
    )
    max_prompt_tokens: int | None = field(
        default=None, metadata={"help": "longest prompt (default: what the model's context holds)"}
    )
    max_output_tokens: int = field(
        default=2048, metadata={"help": "longest answer, and what a chat gets that asks for no number"}
    )
    max_body_bytes: str = field(default="4MiB", metadata={"help": "longest request body (413)"})
    request_timeout_s: float = field(
        default=600.0, metadata={"help": "seconds that a request may take, its wait included (504)"}
    )
    drain_timeout_s: float = field(
        default=25.0, metadata={"help": "seconds that running requests have to finish after SIGTERM or Ctrl-C"}
    )
    shared_maps: str | None = field(
        default=None,
        metadata={
            "help": "folder, or URL that fsspec reads, through which several servers share what their policies learn"
        },
    )
    share_every_s: float = field(default=30.0, metadata={"help": "seconds between two exchanges of shared maps"})
    max_shared_maps: int = field(default=100_000, metadata={"help": "maps that are shared at most, the newest"})
    log_prompts: bool = field(default=False, metadata={"help": "write prompts and answers into the log"})

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
        """Answers in the house, running or waiting."""
        return self.max_running + self.max_waiting

    def __post_init__(self) -> None:
        parse_bytes(self.cache_bytes, "--cache-bytes")
        parse_bytes(self.max_body_bytes, "--max-body-bytes")
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{_flag(name)}: {value} is not at least 1")
        for name in _POSITIVE:
            if not 0 < getattr(self, name) <= 1e6:  # a NaN is refused too
                raise ConfigError(f"{_flag(name)}: {getattr(self, name)} is not above 0 and at most a million")
        self._check_batching()
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port: {self.port} is not between 0 and 65535")
        if not self.host:
            raise ConfigError("--host: is empty; 127.0.0.1 is this machine alone, 0.0.0.0 every network")
        if self.served_name == "":
            raise ConfigError("--served-name: is empty; leave it out for the model's own name")

    def _check_batching(self) -> None:
        if self.schedule not in get_args(Schedule):
            raise ConfigError(f"--schedule: {self.schedule!r} is not one of {', '.join(get_args(Schedule))}")
        if self.max_running > self.max_batch_tokens:
            raise ConfigError(
                f"--max-running: {self.max_running} answers do not fit into one forward pass of "
                f"--max-batch-tokens {self.max_batch_tokens}"
            )
        if self.max_waiting < 0:
            raise ConfigError(f"--max-waiting: {self.max_waiting} is negative; 0 lets none wait")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
