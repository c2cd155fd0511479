"""Settings of a simulation. The CLI's flags are generated from these fields, so names and defaults stand once."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from finemoe.config import parse_budget
from finemoe.errors import BudgetError, ConfigError
from finemoe.policy import BOUNDS, POLICIES, policy_or_bound_class
from finemoe.sim.hardware import HARDWARE, SHAPES

T = TypeVar("T")
_LEAST = {"requests": 1, "interleave": 1, "devices": 1, "tokens_per_unit": 1, "workers": 1, "seed": 0, "chunks": 0}
_STORE_SHARE = 0.7
_MOST_SPREAD = 3.0  # of a logarithm: beyond it hardly any draw comes near the mean
_MOST_DEVICES = 255  # the book numbers them in a byte, and one number is nowhere


@dataclass(frozen=True)
class SimulateConfig:
    """Which cells to replay, and on what modelled machine."""

    policy: str = field(default="lru,lfu,lfru", metadata={"help": "policies, separated by commas, or all"})
    expert_memory: str = field(
        default="25%", metadata={"help": "expert memory, as shares of all routed experts, separated by commas"}
    )
    link_ratio: str | None = field(
        default=None,
        metadata={"help": "time to move one expert / time of one layer's compute, separated by commas (default: 1)"},
    )
    hardware: str | None = field(
        default=None, metadata={"help": f"instead of --link-ratio, with --shape: {', '.join(HARDWARE)}, or this disk"}
    )
    shape: str | None = field(default=None, metadata={"help": f"the model's shape: {', '.join(SHAPES)}"})
    store_split: float | None = field(
        default=None,
        metadata={
            "help": "share of the requests, shuffled by the seed, that policies learn from "
            f"(default: {_STORE_SHARE}; all of --store)"
        },
    )
    store: str | None = field(
        default=None, metadata={"help": "a trace to learn from instead; then all of TRACE is replayed"}
    )
    requests: int | None = field(default=None, metadata={"help": "replay only so many requests"})
    interleave: int = field(default=1, metadata={"help": "requests that run at the same time"})
    seed: int = field(default=0, metadata={"help": "of the split, of the order of requests and of emulations"})
    devices: int = field(default=1, metadata={"help": "devices, each with a link of its own and a part of the memory"})
    chunks: int = field(
        default=16, metadata={"help": "pieces of a transfer; a prefetch gives way between two, with 0 at any time"}
    )
    no_ready_first: bool = field(
        default=False, metadata={"help": "a layer waits for all of its experts before it computes any"}
    )
    tokens_per_unit: int = field(
        default=64, metadata={"help": "a layer computes so many tokens in the time of one; more take longer"}
    )
    before_gate: float = field(
        default=0.5, metadata={"help": "share of a layer's compute before its gate speaks; the rest is its experts'"}
    )
    gap: float = field(
        default=0.0,
        metadata={
            "help": "time between the last layer of an iteration and the first of the next (head, sampling, "
            "embedding), in units of one layer's compute; links go on in it"
        },
    )
    lag: float = field(
        default=0.0,
        metadata={
            "help": "time from a gate until what a policy that searches makes of it counts, in units of one layer's "
            "compute; a thought that the next gate overtakes is dropped"
        },
    )
    begin_lag: float | None = field(
        default=None, metadata={"help": "the same from the begin of an iteration (default: the lag)"}
    )
    prefetch_slowdown: float = field(
        default=1.0,
        metadata={
            "help": "what is prefetched takes so many times the link ratio: fewer readers move what is not urgent"
        },
    )
    compute_spread: float = field(
        default=0.0,
        metadata={
            "help": "a layer's compute varies: standard deviation of its logarithm, before the gate and after it; the "
            "mean stays. Real times do, and what is nearly in time is then in time now and then"
        },
    )
    link_spread: float = field(
        default=0.0, metadata={"help": "the same of the time to move an expert; drawn by --seed, as all of these"}
    )
    lag_spread: float = field(default=0.0, metadata={"help": "the same of the lag"})
    gate_recall: str | None = field(
        default=None,
        metadata={
            "help": "emulate gate lookahead from the truth, this share of it right; for several layers ahead, shares "
            "separated by commas; marked in the output"
        },
    )
    predictors: str | None = field(default=None, metadata={"help": "what finemoe trace train wrote, for promoe"})
    workers: int | None = field(default=None, metadata={"help": "processes (default: one per core)"})

    def __post_init__(self) -> None:
        _ = self.policies, self.shares, self.link_ratios, self.gate_recalls
        if not 0 <= self.learned_share < 1:
            raise ConfigError(f"--store-split: {self.store_split} is not a share from 0 to below 1")
        if self.store is not None and self.store_split is not None:
            raise ConfigError("--store-split: contradicts --store, all of which is learned from; leave one out")
        self._check_times()
        if not 0 < self.prefetch_slowdown < float("inf"):
            raise ConfigError(f"--prefetch-slowdown: {self.prefetch_slowdown} is not a number above 0")
        if not 0 <= self.before_gate <= 1:
            raise ConfigError(f"--before-gate: {self.before_gate} is not a share from 0 to 1")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')}: {value} is not at least {least}")
        if self.devices > _MOST_DEVICES:
            raise ConfigError(f"--devices: {self.devices} is more than {_MOST_DEVICES}")
        self._check_hardware()

    def _check_times(self) -> None:
        for name in ("gap", "lag", "begin_lag"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"--{name.replace('_', '-')}: {getattr(self, name)} is not a number of at least 0")
        for name in ("compute_spread", "link_spread", "lag_spread"):
            if not 0 <= getattr(self, name) <= _MOST_SPREAD:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag}: {getattr(self, name)} is not a number from 0 to {_MOST_SPREAD:g}")

    @property
    def learned_share(self) -> float:
        """Of the trace's own requests, those that policies learn from."""
        return _STORE_SHARE if self.store_split is None else self.store_split

    def _check_hardware(self) -> None:
        if (self.hardware is None) != (self.shape is None):
            raise ConfigError("--hardware and --shape go together: their sizes and rates give the link ratio")
        if self.hardware is not None and self.link_ratio is not None:
            raise ConfigError("--link-ratio: contradicts --hardware, which gives the link ratio")
        if self.hardware is not None and self.hardware not in {*HARDWARE, "disk"}:
            raise ConfigError(f"--hardware: {self.hardware!r} is not one of {', '.join((*HARDWARE, 'disk'))}")
        if self.shape is not None and self.shape not in SHAPES:
            raise ConfigError(f"--shape: {self.shape!r} is not one of {', '.join(SHAPES)}")

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the policies, those that know the future included."""
        known = (*POLICIES, *BOUNDS)
        if self.policy == "all":
            return known

        def name(word: str) -> str:
            policy_or_bound_class(word)
            return word

        return _list("policy", self.policy, name)

    @property
    def shares(self) -> tuple[float, ...]:
        """Budgets as shares of all routed experts."""

        def share(word: str) -> float:
            budget = parse_budget(word)
            if budget.share is None:
                raise BudgetError(f"--expert-memory: {word!r}: a trace has no bytes; give shares, such as 25%")
            return budget.share

        return _list("expert-memory", self.expert_memory, share)

    @property
    def link_ratios(self) -> tuple[float, ...]:
        """As given; 1 if neither that nor hardware is."""
        read = partial(_number, "link-ratio", sys.float_info.max, "a number of at least 0")
        return _list("link-ratio", "1" if self.link_ratio is None else self.link_ratio, read)

    @property
    def gate_recalls(self) -> tuple[float, ...]:
        """Of emulated lookahead, one layer ahead, two, ..; empty without."""
        read = partial(_number, "gate-recall", 1.0, "a share from 0 to 1")
        return () if self.gate_recall is None else tuple(_words("gate-recall", self.gate_recall, read))


def _number(flag: str, most: float, kind: str, word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value <= most:
        raise ConfigError(f"--{flag}: {word!r} is not {kind}")
    return value


def _list(flag: str, text: str, read: Callable[[str], T]) -> tuple[T, ...]:
    """Each value once."""
    return tuple(dict.fromkeys(_words(flag, text, read)))


def _words(flag: str, text: str, read: Callable[[str], T]) -> list[T]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError(f"--{flag}: nothing given")
    return [read(word) for word in words]
