"""Settings of a simulation, and machine files. The flags of `finemoe simulate` are generated from these fields."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from finemoe.budget import parse_budget
from finemoe.config import setting
from finemoe.errors import BudgetError, ConfigError
from finemoe.policy import BOUNDS, POLICIES, policy_or_bound_class
from finemoe.sim.hardware import HARDWARE, SHAPES, TIMING

T = TypeVar("T")
THIS_DISK = "disk"  # a preset that is measured: this machine's memory and disk
PRESETS = (*HARDWARE, THIS_DISK)
MACHINE_FIELDS = ("link_ratio", "chunks", "tokens_per_unit", *TIMING)  # of a machine file
_INTEGERS = {"chunks", "tokens_per_unit"}
_LEAST = {"requests": 1, "interleave": 1, "devices": 1, "tokens_per_unit": 1, "workers": 1, "seed": 0, "chunks": 0}
_STORE_SHARE = 0.7
_MOST_SPREAD = 3.0  # of a logarithm: beyond it hardly any draw comes near the mean
_MOST_DEVICES = 255  # the cache state numbers them in a byte, and one number stands for no device


@dataclass(frozen=True)
class SimulateConfig:
    """Which cells to simulate, and on which modelled machine. Times are in units of one layer's compute."""

    policy: str = setting("lru,lfu,lfru", "policies, separated by commas, or all")
    expert_memory: str = setting("25%", "expert memory, as shares of all routed experts, separated by commas")
    link_ratio: str | None = setting(
        None, "time to transfer one expert / time of one layer's compute, separated by commas (default: 1)"
    )
    hardware: str | None = setting(None, f"as --machine, presets only: {', '.join(PRESETS)}", advanced=True)
    shape: str | None = setting(None, f"the model's shape, for a machine preset: {', '.join(SHAPES)}")
    store_split: float | None = setting(
        None,
        "share of the requests, shuffled by the seed, that policies learn from "
        f"(default: {_STORE_SHARE}; all of --store)",
    )
    store: str | None = setting(None, "a trace to learn from instead; then all of TRACE is replayed")
    requests: int | None = setting(None, "replay at most this many requests")
    interleave: int = setting(1, "requests that run at the same time")
    seed: int = setting(0, "seed of the split, of the order of requests, of random times and of emulation")
    devices: int = setting(1, "devices, each with its own link and an equal part of the memory", advanced=True)
    chunks: int = setting(
        16, "pieces of a transfer; a prefetch is preempted between two, with 0 at any time", advanced=True
    )
    no_ready_first: bool = setting(
        default=False, text="a layer computes only when all of its experts are resident", advanced=True
    )
    tokens_per_unit: int = setting(
        64, "tokens that a layer computes in the time of one; more take proportionally longer", advanced=True
    )
    before_gate: float = setting(
        0.5, "share of a layer's compute before its gate; the rest is its experts'", advanced=True
    )
    gap: float = setting(
        0.0,
        "time between the last layer of an iteration and the first of the next (head, sampling, embedding), in units "
        "of one layer's compute; links keep transferring",
        advanced=True,
    )
    lag: float = setting(
        0.0,
        "time from a gate until an asynchronous policy's scores take effect, in units of one layer's compute; scores "
        "that are overtaken by the next gate are dropped",
        advanced=True,
    )
    begin_lag: float | None = setting(
        None, "the same from the begin of an iteration (default: as --lag)", advanced=True
    )
    prefetch_slowdown: float = setting(
        1.0, "a prefetch takes this many times the link ratio, as fewer readers serve prefetches", advanced=True
    )
    compute_spread: float = setting(
        0.0,
        "random variation of a layer's compute, before and after its gate: standard deviation of the logarithm; the "
        "mean is unchanged",
        advanced=True,
    )
    link_spread: float = setting(0.0, "the same of the time to transfer an expert", advanced=True)
    lag_spread: float = setting(0.0, "the same of the lag", advanced=True)
    gate_recall: str | None = setting(
        None,
        "emulate gate lookahead of this recall from the recorded routing; for several layers ahead, separated by "
        "commas; marked in the output",
        advanced=True,
    )
    predictors: str | None = setting(None, "predictors from finemoe trace train, for promoe")
    workers: int | None = setting(None, "processes (default: one per core)")

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
                raise ConfigError(f"{_flag(name)}: {value} is not at least {least}")
        if self.devices > _MOST_DEVICES:
            raise ConfigError(f"--devices: {self.devices} is more than {_MOST_DEVICES}")
        self._check_hardware()

    def _check_times(self) -> None:
        for name in ("gap", "lag", "begin_lag"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{_flag(name)}: {getattr(self, name)} is not a number of at least 0")
        for name in ("compute_spread", "link_spread", "lag_spread"):
            if not 0 <= getattr(self, name) <= _MOST_SPREAD:
                raise ConfigError(f"{_flag(name)}: {getattr(self, name)} is not a number from 0 to {_MOST_SPREAD:g}")

    def _check_hardware(self) -> None:
        if self.hardware is not None and self.hardware not in PRESETS:
            raise ConfigError(f"--hardware: {self.hardware!r} is not one of {', '.join(PRESETS)}")
        if self.shape is not None and self.shape not in SHAPES:
            raise ConfigError(f"--shape: {self.shape!r} is not one of {', '.join(SHAPES)}")
        if (self.hardware is None) != (self.shape is None):
            raise ConfigError("a preset of --machine (or --hardware) and --shape go together: they give the link ratio")
        if self.hardware is not None and self.link_ratio is not None:
            raise ConfigError("--link-ratio: contradicts the machine preset, which gives the link ratio")

    @property
    def learned_share(self) -> float:
        """Share of the trace's requests that policies learn from."""
        return _STORE_SHARE if self.store_split is None else self.store_split

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the policies, clairvoyant bounds included."""
        if self.policy == "all":
            return (*POLICIES, *BOUNDS)

        def name(word: str) -> str:
            policy_or_bound_class(word)
            return word

        return _distinct("policy", self.policy, name)

    @property
    def shares(self) -> tuple[float, ...]:
        """Budgets as shares of all routed experts."""

        def share(word: str) -> float:
            budget = parse_budget(word)
            if budget.share is None:
                raise BudgetError(f"--expert-memory: {word!r}: a trace has no bytes; give shares, such as 25%")
            return budget.share

        return _distinct("expert-memory", self.expert_memory, share)

    @property
    def link_ratios(self) -> tuple[float, ...]:
        """As given, 1 by default; without effect for a machine preset, see `speed_forecast.link_ratios`."""
        read = partial(_number, "link-ratio", sys.float_info.max, "a number of at least 0")
        return _distinct("link-ratio", "1" if self.link_ratio is None else self.link_ratio, read)

    @property
    def gate_recalls(self) -> tuple[float, ...]:
        """Recall of emulated lookahead one layer ahead, two, ...; empty without emulation."""
        read = partial(_number, "gate-recall", 1.0, "a share from 0 to 1")
        return () if self.gate_recall is None else tuple(_values("gate-recall", self.gate_recall, read))


def read_machine(machine: str) -> dict[str, Any]:
    """The settings that `--machine` stands for: `hardware` for a preset, else the fields of a machine file.

    A machine file is a JSON object or, if its name ends in `.toml`, a TOML document, of `MACHINE_FIELDS`; null leaves a
    field at its default.

    Raises:
        ConfigError: no preset and no readable file, or a field is unknown, not a number or out of range.
    """
    if machine in PRESETS:
        return {"hardware": machine}
    settings: dict[str, Any] = {}
    for name, value in _read_object(machine).items():
        if name not in MACHINE_FIELDS:
            raise ConfigError(f"--machine: {machine}: {name!r} is not one of {', '.join(MACHINE_FIELDS)}")
        if value is None:
            continue
        integer = name in _INTEGERS
        if isinstance(value, bool) or not isinstance(value, int if integer else int | float):
            raise ConfigError(f"--machine: {machine}: {name}: {value!r} is not a {'whole ' if integer else ''}number")
        settings[name] = str(value) if name == "link_ratio" else value
    try:
        SimulateConfig(**settings)
    except ConfigError as error:
        raise ConfigError(f"--machine: {machine}: {error}") from error
    return settings


def _read_object(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        found = tomllib.loads(text) if path.endswith(".toml") else json.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"--machine: {path!r} is neither a file nor one of {', '.join(PRESETS)}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--machine: {path} can't be read as JSON, or TOML if named *.toml ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--machine: {path} is not an object of {', '.join(MACHINE_FIELDS)}")
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _number(flag: str, most: float, kind: str, word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value <= most:
        raise ConfigError(f"--{flag}: {word!r} is not {kind}")
    return value


def _distinct(flag: str, text: str, read: Callable[[str], T]) -> tuple[T, ...]:
    """The values of a comma-separated list, without repetitions."""
    return tuple(dict.fromkeys(_values(flag, text, read)))


def _values(flag: str, text: str, read: Callable[[str], T]) -> list[T]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise ConfigError(f"--{flag}: nothing given")
    return [read(word) for word in words]
