"""Settings of `finemoe bench serve`. Imports no torch: the command line reads these fields."""

from __future__ import annotations

from dataclasses import dataclass

from finemoe.budget import parse_budget, parse_bytes
from finemoe.config import setting
from finemoe.errors import ConfigError
from finemoe.policy import policy_class

_PROMPTS = "file of prompts, as for finemoe record"


@dataclass(frozen=True)
class ServedSettings:
    """The model and the server under test."""

    model: str | None = setting(None, "folder or hub id (default: the reference model)")
    policy: str = setting("finemoe", "eviction and prefetching policy")
    expert_memory: str = setting("25%", "budget of resident experts: bytes (2GiB), a share (25%) or all")
    cache_bytes: str = setting("256MiB", "memory of the server's key-value cache")

    def __post_init__(self) -> None:
        if not self.policies:
            raise ConfigError(f"--policy: {self.policy!r} names no policy")
        for policy in self.policies:
            policy_class(policy.partition(" ")[0])
        parse_budget(self.expert_memory)
        parse_bytes(self.cache_bytes, "--cache-bytes")

    @property
    def policies(self) -> tuple[str, ...]:
        """Policies under test, in order."""
        return (self.policy,)


@dataclass(frozen=True)
class LoadTestConfig(ServedSettings):
    """Arrivals of a published trace, against one server per policy."""

    arrivals: str | None = setting(None, "CSV with TIMESTAMP, ContextTokens and GeneratedTokens, as Azure's traces")
    prompts: str | None = setting(None, _PROMPTS)
    policy: str = setting(
        "lru,moe-infinity,mixtral-offloading,finemoe",
        "policies, separated by commas; flags of finemoe serve may follow each name",
    )
    rate: float | None = setting(
        None, "mean requests/s (default: --utilisation times the throughput of four closed-loop clients)"
    )
    slo_ttft_s: float | None = setting(None, "longest good TTFT (default: five times that of a request alone)")
    slo_tpot_s: float | None = setting(None, "longest good mean TPOT (default: twice that of a request alone)")
    repeats: int = setting(1, "windows of the trace, each measured for all policies")
    window_s: float | None = setting(None, "length of a window (default: what fits into --limit-s)")
    limit_s: float = setting(1800.0, "start no measurement that would end later than this")
    store: str | None = setting(None, "recorded trace that learning policies start from, instead of --warm-requests")
    warm_requests: int = setting(32, "requests that learning policies start from; 0 for none")
    utilisation: float = setting(0.7, "share of the measured throughput that becomes the rate", advanced=True)
    calibrate_requests: int = setting(12, "requests that measure the throughput", advanced=True)
    prompt_scale: float = setting(0.125, "factor on the trace's context lengths", advanced=True)
    answer_scale: float = setting(0.25, "factor on the trace's answer lengths", advanced=True)
    max_prompt_tokens: int = setting(512, "longest prompt", advanced=True)
    max_output_tokens: int = setting(128, "longest answer", advanced=True)
    skip_s: float = setting(0.0, "start of the first window, in scaled time", advanced=True)
    seed: int = setting(0, "seed of the prompts' split", advanced=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "arrivals", "prompts")
        at_least(self, 1, "repeats", "calibrate_requests", "max_prompt_tokens", "max_output_tokens")
        at_least(self, 0, "warm_requests", "skip_s")
        above_zero(self, "rate", "slo_ttft_s", "slo_tpot_s", "window_s", "limit_s", "utilisation", "prompt_scale")
        above_zero(self, "answer_scale")

    @property
    def policies(self) -> tuple[str, ...]:
        """Policies, each with its own flags behind its name."""
        return tuple(dict.fromkeys(" ".join(part.split()) for part in self.policy.split(",") if part.strip()))


@dataclass(frozen=True)
class ConcurrencyConfig(ServedSettings):
    """Closed-loop clients, against a server that batches and one that does not."""

    clients: str = setting("1,2,4,8,16", "numbers of clients, separated by commas")
    requests: int = setting(16, "requests of each row")
    prompts: str | None = setting(None, f"{_PROMPTS} (default: random tokens)")
    prompt_tokens: int = setting(32, "prompts are cut to this length")
    new_tokens: int = setting(32, "longest answer")
    repeats: int = setting(1, "repeats of all rows, in turn")
    limit_s: float = setting(86400.0, "start no row after this many seconds")
    seed: int = setting(0, "seed of random tokens", advanced=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.counts or min(self.counts) < 1:
            raise ConfigError(f"--clients: {self.clients!r} is not a list of numbers such as 1,4,16")
        at_least(self, 1, "requests", "prompt_tokens", "new_tokens", "repeats")
        above_zero(self, "limit_s")

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of clients; none if they can't be read."""
        try:
            return tuple(int(word) for word in self.clients.split(","))
        except ValueError:
            return ()


@dataclass(frozen=True)
class SoakConfig(ServedSettings):
    """Mixed requests for a long time."""

    prompts: str | None = setting(None, _PROMPTS)
    minutes: float = setting(30.0, "duration")
    warm_up_minutes: float | None = setting(None, "not counted in slopes (default: a third of --minutes, at most 10)")
    clients: int = setting(6, "closed-loop clients")
    new_tokens: int = setting(24, "longest answer of ordinary requests")
    max_output_tokens: int = setting(512, "longest answer, of requests that are to time out")
    request_timeout_s: float = setting(30.0, "the server's limit for a request")
    sample_s: float = setting(5.0, "seconds between two samples of the server", advanced=True)
    prompt_characters: int = setting(200, "prompts are cut to this length", advanced=True)
    seed: int = setting(0, "seed of the clients' choices", advanced=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "prompts")
        at_least(self, 1, "clients", "new_tokens", "max_output_tokens", "prompt_characters")
        at_least(self, 0, "warm_up_minutes")
        above_zero(self, "minutes", "request_timeout_s", "sample_s")

    @property
    def warm_up_s(self) -> float:
        """Seconds that slopes leave out."""
        minutes = min(10.0, self.minutes / 3) if self.warm_up_minutes is None else self.warm_up_minutes
        return 60 * minutes


@dataclass(frozen=True)
class OverheadConfig(ServedSettings):
    """The same prompts by `generate`, by the worker and through HTTP."""

    policy: str = setting("lru", "eviction and prefetching policy")
    expert_memory: str = setting(
        "all", "budget of resident experts; with all, what remains is the server's own overhead"
    )
    prompts: str | None = setting(None, f"{_PROMPTS} (default: random tokens)")
    prompts_limit: int = setting(8, "prompts to answer")
    prompt_tokens: int = setting(64, "prompts are cut to this length")
    new_tokens: int = setting(64, "longest answer")
    repeats: int = setting(5, "rounds")
    limit_s: float = setting(1200.0, "start no round after this many seconds")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "prompts_limit", "prompt_tokens", "repeats")
        at_least(self, 2, "new_tokens")
        above_zero(self, "limit_s")


ScenarioConfig = LoadTestConfig | ConcurrencyConfig | SoakConfig | OverheadConfig


def require(config: object, *names: str) -> None:
    """Raises `ConfigError` for a setting that was not given."""
    for name in names:
        if not getattr(config, name):
            raise ConfigError(f"{_flag(name)}: is needed; give a file")


def at_least(config: object, least: int, *names: str) -> None:
    """Raises `ConfigError` for a number that is less, or NaN."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{_flag(name)}: {value} is not at least {least}")


def above_zero(config: object, *names: str) -> None:
    """Raises `ConfigError` for a number that is not positive, or NaN."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{_flag(name)}: {value} is not above 0")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
